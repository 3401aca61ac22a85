"""A bounded pool of PostgreSQL connections, which reconnects after an outage of the server."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from database.slots import PoolBusy, Slots

# Further requests would wait too long, so they are refused at once.
WAITING_MAX_PER_CONNECTION = 20
WAITING_MAX_AT_LEAST = 100
END_TIMEOUT_S = 1.0
IDLE_MAX_S = 280.0  # Neon suspends after 300 s without a query, and its connections die with it
STATEMENTS_MAX = 48  # prepared on one connection; each takes up to 0.6 MB on the server
LIFETIME_S = 1800.0  # frees what the server process of a connection has cached
UNCHECKED_S = 30.0  # a connection that was idle for longer may have been cut off silently
CHECK_TIMEOUT_S = 1.0
# Neon takes 0.5 to 5 s to wake up; requests wait instead of failing.
PATIENCE_S = 5.5
RECONNECT_S = 0.25


Took = Callable[[float], None]


class Connection:
    """One connection and its most recently used statements, each prepared once.

    asyncpg's own pool discards prepared statements when a connection is released. This one keeps them,
    because behind a pooler in transaction mode they save the second round trip.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.used_at = time.monotonic()
        self.expires_at = self.used_at + LIFETIME_S * random.uniform(0.9, 1.1)  # noqa: S311 - not all at once
        self._statements: dict[str, Any] = {}  # the least recently used first

    async def fetch(self, sql: str, arguments: list[Any], took: Took | None = None) -> list[Any]:
        """Run one statement and return its rows; *took* gets the seconds until success or failure."""
        began = time.perf_counter()
        try:
            statement = self._statements.pop(sql, None) or await self.raw.prepare(sql)
            self._statements[sql] = statement
            if len(self._statements) > STATEMENTS_MAX:
                del self._statements[next(iter(self._statements))]  # the driver closes unreferenced ones
            try:
                rows: list[Any] = await statement.fetch(*arguments)
            except asyncpg.InvalidCachedStatementError:
                # A migration changed the table. The server refused the statement without running it.
                statement = self._statements[sql] = await self.raw.prepare(sql)
                rows = await statement.fetch(*arguments)
            return rows
        finally:
            if took:
                took(time.perf_counter() - began)

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self.used_at

    async def answers(self) -> bool:
        """Return whether the server still answers."""
        with suppress(Exception):
            await self.raw.execute("SELECT 1", timeout=CHECK_TIMEOUT_S)
            return True
        return False


@dataclass
class _Outage:
    """A period in which connecting fails, its latest *error*, and *over*, set once a connection is free."""

    error: Exception
    since: float = field(default_factory=time.monotonic)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Pool:
    """At most *size* connections, the most recently used first; waiting requests are served in order.

    A slot is the right to use one connection. While the server is unreachable, requests with a slot wait for
    one task that reconnects. Once the outage has lasted `PATIENCE_S`, they fail at once.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int, *, wait_s: float) -> None:
        self._connect = connect
        self._size = size
        self._wait_s = wait_s
        self._slots = Slots(size, wait_s)
        self._waiting_max = max(WAITING_MAX_AT_LEAST, size * WAITING_MAX_PER_CONNECTION)
        self._idle: list[Connection] = []
        self._alive = 0  # idle or in use
        self._outage: _Outage | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def usage(self) -> dict[str, int]:
        """How many connections are in use and idle, and how many requests wait for one."""
        in_use = self._size - self._slots.free
        return {"in use": in_use, "idle": len(self._idle), "waiting": self._slots.waiting}

    async def fetch(self, sql: str, arguments: list[Any], took: Took | None = None) -> list[Any]:
        """Run one statement on whichever connection is free and return its rows.

        Raises:
            PoolBusy: too many are waiting.
            TimeoutError: no connection was free in time.
        """
        connection = await self._acquire()
        try:
            rows = await connection.fetch(sql, arguments, took)
        except asyncpg.PostgresError:
            self._release(connection)  # the server answered: the connection is in order
            raise
        except BaseException:
            self._discard(connection)  # a late answer must not reach the next request
            raise
        self._release(connection)
        return rows

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection for several statements; it is closed if the block raises.

        Raises:
            PoolBusy: too many are waiting.
            TimeoutError: no connection was free in time.
        """
        connection = await self._acquire()
        try:
            yield connection
        except BaseException:
            self._discard(connection)
            raise
        self._release(connection)

    async def warm(self) -> list[Exception]:
        """Open all connections and return the first error, if any.

        A first connection costs some 20 round trips, which no request should pay. If the server allows fewer
        connections, those that it allows are kept.
        """
        results = await asyncio.gather(*(self._open() for _ in range(self._size)), return_exceptions=True)
        for result in results:
            if isinstance(result, Connection):
                self._add_idle(result)
        return [result for result in results if isinstance(result, Exception)][:1]

    async def close(self) -> None:
        reconnecting = [task for task in self._tasks if task.get_name() != "end"]
        for task in reconnecting:
            task.cancel()
        while self._idle:
            await _end(self._idle.pop().raw)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _acquire(self) -> Connection:
        if not self._slots.take():
            if self._slots.waiting >= self._waiting_max:
                raise PoolBusy(f"{self._slots.waiting} requests are waiting for {self._size} connections")
            await self._slots.wait()
        if self._idle and self._idle[-1].idle_s < UNCHECKED_S and not self._idle[-1].raw.is_closed():
            return self._idle.pop()  # the usual case
        try:
            async with asyncio.timeout(self._wait_s):
                return await self._connection_for_slot()
        except BaseException:
            self._slots.give()
            raise

    async def _connection_for_slot(self) -> Connection:
        while True:
            if connection := await self._take_idle():
                return connection
            if self._outage is None:
                try:
                    return await self._open()
                except Exception as error:  # any failure begins an outage
                    self._begin_outage(error)
            else:
                await self._wait_out(self._outage)

    async def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.raw.is_closed() or connection.idle_s > IDLE_MAX_S:
                self._drop(connection)
            elif connection.idle_s < UNCHECKED_S or await self._is_heard(connection):
                return connection
            else:  # cut off, like all that have been idle for longer
                for stale in (connection, *self._idle):
                    self._drop(stale)
                self._idle.clear()
        return None

    async def _is_heard(self, connection: Connection) -> bool:
        try:
            return await connection.answers()
        except BaseException:  # the request was cancelled
            self._drop(connection)
            raise

    async def _open(self) -> Connection:
        connection = Connection(await self._connect())
        self._alive += 1
        return connection

    def _add_idle(self, connection: Connection) -> None:
        self._idle.append(connection)
        if self._outage:
            self._outage.over.set()

    def _begin_outage(self, error: Exception) -> None:
        if self._outage is None:
            self._outage = _Outage(error)
            self._start(self._reconnect(self._outage), "reconnect")

    async def _wait_out(self, outage: _Outage) -> None:
        """Return when a connection may be free.

        Raises:
            Exception: the last connection error, once the outage has lasted `PATIENCE_S`.
        """
        left_s = outage.since + PATIENCE_S - time.monotonic()
        if self._alive:
            left_s = self._wait_s  # the server allows no more connections, but one of ours will be released
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await outage.over.wait()
        except TimeoutError:
            raise outage.error from None
        if not self._idle and self._outage is outage:
            outage.over.clear()

    async def _reconnect(self, outage: _Outage) -> None:
        while True:
            await asyncio.sleep(RECONNECT_S)
            try:
                connection = await self._open()
            except Exception as error:  # if this task ended, waiting requests would never be woken
                outage.error = error
            else:
                self._add_idle(connection)
                self._outage = None
                return

    def _release(self, connection: Connection) -> None:
        connection.used_at = time.monotonic()
        if connection.raw.is_closed():
            self._alive -= 1
        elif connection.used_at > connection.expires_at:
            self._replace(connection)
            return
        else:
            self._add_idle(connection)
        self._slots.give()

    def _replace(self, connection: Connection) -> None:
        """Close *connection*, open another one, and then release its slot."""
        self._alive -= 1
        replacing = self._start(self._end_and_open(connection), "replace")
        replacing.add_done_callback(lambda _: self._slots.give())

    async def _end_and_open(self, connection: Connection) -> None:
        await _end(connection.raw)
        with suppress(Exception):  # the next request will get the same error and begin an outage
            self._add_idle(await self._open())

    def _drop(self, connection: Connection) -> None:
        self._alive -= 1
        connection.raw.terminate()

    def _discard(self, connection: Connection) -> None:
        """Close *connection*, cancel its statement on the server, and then release its slot."""
        self._alive -= 1
        ending = self._start(_end(connection.raw), "end")
        ending.add_done_callback(lambda _: self._slots.give())

    def _start(self, work: Any, name: str) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _end(raw: Any) -> None:
    """Close a connection, first waiting for the server to cancel an interrupted statement."""
    try:
        await raw.close(timeout=END_TIMEOUT_S)
    except Exception:  # any failure: the server does not answer any more
        raw.terminate()
