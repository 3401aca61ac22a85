"""The reading connections of SQLite, whose threads take calls from one queue.

A thread that is busy takes the next call without being woken, and the event loop is woken once for several
results. With one queue per connection, a GET of one task took 135 µs of CPU, not 93 (record 20).
"""

import asyncio
import time
from queue import SimpleQueue
from typing import Any

import aiosqlite

from database.calls import Call, InterruptibleConnection, Outcome
from database.slots import PoolBusy
from errors import Unavailable


class Readers:
    """Runs each call on whichever connection is free first; calls wait in order, at most *wait_s* seconds."""

    def __init__(self, waiting_max: int, wait_s: float) -> None:
        self._waiting_max, self._wait_s = waiting_max, wait_s
        self.connections: list[aiosqlite.Connection] = []
        self._queue: SimpleQueue[tuple[Call, float] | None] = SimpleQueue()
        self._serving: list[asyncio.Future[None]] = []
        self._unfinished = 0

    @property
    def idle(self) -> int:
        return max(0, len(self.connections) - self._unfinished)

    def add(self, connection: aiosqlite.Connection) -> None:
        self.connections.append(connection)
        # No public method of aiosqlite runs a function on the connection's thread.
        serving = connection._execute(  # type: ignore[no-untyped-call] # not annotated
            self._serve, connection._conn, asyncio.get_running_loop()
        )
        self._serving.append(asyncio.ensure_future(serving))

    async def read(self, call: Call) -> list[Any]:
        """Return the rows of *call*.

        Raises:
            Unavailable: no connection is open.
            PoolBusy: too many calls are waiting.
            TimeoutError: no connection was free in time.
            sqlite3.Error: the statement failed.
        """
        if not self.connections:
            raise Unavailable
        waiting = self._unfinished - len(self.connections)
        if waiting >= self._waiting_max:
            raise PoolBusy(f"{waiting} requests are waiting for {len(self.connections)} connections")
        self._unfinished += 1
        self._queue.put((call, time.monotonic() + self._wait_s))
        return await call.rows

    async def close(self) -> None:
        """Finish the calls in the queue and close the connections."""
        for _ in self._serving:
            self._queue.put(None)
        await asyncio.gather(*self._serving)
        self._serving.clear()
        while self.connections:
            await self.connections.pop().close()

    def _serve(self, connection: InterruptibleConnection, loop: asyncio.AbstractEventLoop) -> None:
        while (item := self._queue.get()) is not None:
            call, begin_by = item
            outcome = call.run(connection) if time.monotonic() < begin_by else TimeoutError()
            loop.call_soon_threadsafe(self._finish, call, outcome)

    def _finish(self, call: Call, outcome: Outcome) -> None:
        self._unfinished -= 1
        call.resolve(outcome)
