"""A fixed set of PostgreSQL connections that requests take turns with."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

WAIT_S = 3.0  # for a turn; longer, and the client is better told to come back
END_TIMEOUT_S = 1.0
IDLE_MAX_S = 280.0  # Neon suspends after 300 s without a query, and its connections die with it


Took = Callable[[float], None]


class Connection:
    """One connection and the statements it has prepared, each parsed by the server once.

    asyncpg's own pool takes prepared statements away whenever a connection is handed back. They must
    outlive that: behind a pooler in transaction mode they are what saves the second round trip.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.used_at = time.monotonic()
        self._statements: dict[str, Any] = {}

    async def fetch(self, sql: str, arguments: list[Any], took: Took | None = None) -> list[Any]:
        """Run one statement, return its rows and tell *took* how many seconds that took, or failing did."""
        began = time.perf_counter()
        try:
            return await self._fetch(sql, arguments)
        finally:
            if took:
                took(time.perf_counter() - began)

    async def _fetch(self, sql: str, arguments: list[Any]) -> list[Any]:
        statement = self._statements.get(sql)
        if statement is None:
            statement = self._statements[sql] = await self.raw.prepare(sql)
        try:
            rows: list[Any] = await statement.fetch(*arguments)
        except asyncpg.InvalidCachedStatementError:
            # A migration changed the table below us. The server refused before it did anything.
            statement = self._statements[sql] = await self.raw.prepare(sql)
            rows = await statement.fetch(*arguments)
        return rows

    def usable(self) -> bool:
        return not self.raw.is_closed() and time.monotonic() - self.used_at < IDLE_MAX_S


class Pool:
    """At most *size* connections, the most recently used first; waiters are served in order."""

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int) -> None:
        self._connect = connect
        self._size = size
        self._turns = asyncio.Semaphore(size)
        self._idle: list[Connection] = []
        self._ending: set[asyncio.Task[None]] = set()
        self._in_use = self._waiting = 0

    @property
    def usage(self) -> dict[str, int]:
        """How many connections are in use and idle, and how many requests wait for one."""
        return {"in use": self._in_use, "idle": len(self._idle), "waiting": self._waiting}

    async def fetch(self, sql: str, arguments: list[Any], took: Took | None = None) -> list[Any]:
        """Run one statement on whichever connection is free and return its rows.

        Raises:
            TimeoutError: all connections were in use for `WAIT_S`.
        """
        connection = await self._acquire()
        try:
            rows = await connection.fetch(sql, arguments, took)
        except asyncpg.PostgresError:
            self._release(connection)  # the server answered: the connection is in order
            raise
        except BaseException:
            self._discard(connection)  # an answer may be on its way; nobody may read it as theirs
            raise
        self._release(connection)
        return rows

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Lend a connection for several statements; a block that raises costs the connection.

        Raises:
            TimeoutError: all connections were in use for `WAIT_S`.
        """
        connection = await self._acquire()
        try:
            yield connection
        except BaseException:
            self._discard(connection)
            raise
        self._release(connection)

    async def warm(self) -> list[Exception]:
        """Connect as often as allowed and return the first error, if any.

        A first connection costs some 20 round trips, better not a request's. A server that allows fewer
        connections than we would like is no reason to have none.
        """
        attempts = (self.fetch("SELECT pg_backend_pid()", []) for _ in range(self._size))
        results = await asyncio.gather(*attempts, return_exceptions=True)
        return [result for result in results if isinstance(result, Exception)][:1]

    async def close(self) -> None:
        while self._idle:
            await _end(self._idle.pop().raw)
        await asyncio.gather(*self._ending)

    def _discard(self, connection: Connection) -> None:
        """End *connection*, and what the server still does for it, and then give its turn back."""
        ending = asyncio.create_task(_end(connection.raw))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        ending.add_done_callback(lambda _: self._end_turn())

    async def _acquire(self) -> Connection:
        await self._begin_turn()
        try:
            return self._take_idle() or Connection(await self._connect())
        except BaseException:
            self._end_turn()
            raise

    async def _begin_turn(self) -> None:
        if self._turns.locked():
            self._waiting += 1
            try:
                async with asyncio.timeout(WAIT_S):
                    await self._turns.acquire()
            finally:
                self._waiting -= 1
        else:
            await self._turns.acquire()
        self._in_use += 1

    def _end_turn(self) -> None:
        self._in_use -= 1
        self._turns.release()

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
            connection.raw.terminate()
        return None

    def _release(self, connection: Connection) -> None:
        if not connection.raw.is_closed():
            connection.used_at = time.monotonic()
            self._idle.append(connection)
        self._end_turn()


async def _end(raw: Any) -> None:
    """Close a connection, first waiting for the server to cancel what was interrupted."""
    try:
        await raw.close(timeout=END_TIMEOUT_S)
    except (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.PostgresError):
        raw.terminate()  # it does not answer any more
