"""SQLite by aiosqlite: one connection writes while others read (WAL), each on its own thread."""

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any

import aiosqlite
import msgspec
from sqlalchemy import Connection as EngineConnection
from sqlalchemy import NullPool, event
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from database.base import DEFAULT_TIMEOUTS, Database, Executor, Timeouts, share_of
from database.calls import Call, InterruptibleConnection
from database.failures import translated
from database.fair_share import FairShare
from database.group_commit import GroupCommit
from database.readers import Readers
from database.slots import PoolBusy, Slots
from database.statements import Compiled, Row, Statement, compile_statement
from errors import Unavailable

READERS = 4
WAITING_MAX = 200  # further requests would wait too long, so they are refused at once
STEPS = 10_000  # of SQLite's virtual machine between two checks of the deadline: about a millisecond
BUSY_TIMEOUT_MS = 5_000  # other processes may be writing to the file
INTERRUPT_S = 0.05  # between two interrupts of a statement whose request was cancelled

_UNUSABLE_FILE = {
    sqlite3.SQLITE_NOTADB: "names a file that is not a SQLite database",
    sqlite3.SQLITE_CORRUPT: "names a SQLite database that is damaged",
    sqlite3.SQLITE_CANTOPEN: "names a file that cannot be opened",
}


class SQLite(Database):
    """A database file. Writes share one connection and queue in order, so that none fails on a lock.

    If a request is cancelled, its connection serves the next one only after its statement has ended.
    """

    start_wait_s = 10.0  # a local file takes that long only on a slow machine

    def __init__(self, url: str, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
        self._timeouts = timeouts
        # As compact as SQLite writes JSON itself, so that equal lists are equal texts.
        self.dialect = SQLiteDialect_aiosqlite(
            json_serializer=lambda value: msgspec.json.encode(value).decode(),
            json_deserializer=msgspec.json.decode,
        )
        path = make_url(url).database
        if not path or path == ":memory:":
            raise ValueError("must name a file: a database in memory ends with its connection")
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError("names a folder that cannot be made") from error
        _check_file(self.path)
        self.share = FairShare(share_of(READERS))
        self._readers, self._writer = Readers(WAITING_MAX, timeouts.wait_s), _Connections(timeouts.wait_s)
        self._group_commit = GroupCommit(self._writer.lend, WAITING_MAX)

    async def open(self) -> None:
        if not self._writer.all:
            self._writer.add(await self._connect())
        while len(self._readers.connections) < READERS:
            self._readers.add(await self._connect())

    @property
    def usage(self) -> dict[str, int]:
        idle, waiting = self._writer.idle, self._writer.waiting + self._group_commit.waiting
        return {"in use": len(self._writer.all) - idle, "idle": idle, "waiting": waiting}

    async def close(self) -> None:
        await self._group_commit.close()
        await self._readers.close()
        await self._writer.close()

    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        compiled = compile_statement(statement, self.dialect)
        call = Call(compiled.sql, compiled.arguments(values))
        run = self._readers.read if compiled.reads else self._group_commit.write
        with translated:
            try:
                found = await run(call)
            finally:
                if call.seconds:  # else it has not run
                    self.took(compiled, call.seconds)
        return compiled.rows(found)

    async def fetch(self, connection: aiosqlite.Connection, compiled: Compiled, values: Row) -> list[Any]:
        with translated:
            began = time.perf_counter()
            try:
                found = await connection.execute_fetchall(compiled.sql, compiled.arguments(values))
            finally:
                self.took(compiled, time.perf_counter() - began)
        return compiled.rows(found)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        async with self._writer.lend() as connection:
            try:
                with translated:
                    await connection.execute("BEGIN IMMEDIATE")
                yield _Transaction(self, connection)
                with translated:
                    await connection.commit()
            except BaseException:
                # The thread takes calls in order, so the next write starts after the rollback.
                await asyncio.shield(asyncio.create_task(connection.rollback()))
                raise

    def engine(self) -> AsyncEngine:
        connect = partial(self._connect, patient=True)
        engine = create_async_engine("sqlite+aiosqlite://", async_creator=connect, poolclass=NullPool)
        event.listen(engine.sync_engine, "begin", _begin_immediately)
        return engine

    async def _connect(self, *, patient: bool = False) -> aiosqlite.Connection:
        statement_s = inf if patient else self._timeouts.statement_s
        return await aiosqlite.Connection(
            partial(self._connect_on_its_thread, statement_s), iter_chunk_size=64
        )

    def _connect_on_its_thread(self, statement_s: float) -> sqlite3.Connection:
        connection = _Timed(self.path, statement_s)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # What PostgreSQL has and SQLite has not: lower case beyond ASCII, order by code point.
        connection.create_function("lower", 1, _lower, deterministic=True)
        connection.create_function("has_words", 3, _has_words, deterministic=True)
        connection.create_collation("C", lambda a, b: (a > b) - (a < b))
        return connection


class _Transaction(Executor):
    def __init__(self, database: SQLite, connection: aiosqlite.Connection) -> None:
        self._database = database
        self._connection = connection

    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        compiled = compile_statement(statement, self._database.dialect)
        return await self._database.fetch(self._connection, compiled, values)


class _Connections:
    """Connections of one kind, each lent to one request at a time. Requests wait in order."""

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self.all: list[aiosqlite.Connection] = []
        self._idle: list[aiosqlite.Connection] = []
        self._slots = Slots(0, wait_s)
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def waiting(self) -> int:
        return self._slots.waiting

    def add(self, connection: aiosqlite.Connection) -> None:
        self.all.append(connection)
        self._add_idle(connection)

    async def close(self) -> None:
        self._idle.clear()
        self._slots = Slots(0, self._wait_s)
        while self.all:
            await self.all.pop().close()  # each is a thread that would keep the process alive

    def lend(self) -> "_Loan":
        return _Loan(self)

    async def take(self) -> aiosqlite.Connection:
        """Return a free connection.

        Raises:
            Unavailable: none is open, or none was free in time.
            Overloaded: `WAITING_MAX` requests are waiting already.
        """
        if not self.all:
            raise Unavailable
        if not self._slots.take():
            with translated:
                if self.waiting >= WAITING_MAX:
                    raise PoolBusy(f"{self.waiting} requests are waiting for {len(self.all)} connections")
                await self._slots.wait()
        return self._idle.pop()

    def give_back(self, connection: aiosqlite.Connection) -> None:
        if connection in self.all:  # else all have been closed meanwhile
            self._add_idle(connection)

    def _add_idle(self, connection: aiosqlite.Connection) -> None:
        self._idle.append(connection)
        self._slots.give()

    def give_back_when_ended(self, connection: aiosqlite.Connection) -> None:
        """Interrupt the statement of a cancelled request, and give the connection back when it has ended."""
        ending = asyncio.create_task(self._end_statement(connection))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _end_statement(self, connection: aiosqlite.Connection) -> None:
        # The thread takes calls in order, so this one ends after the statement. An interrupt has no effect
        # before the thread has begun the statement, so it is repeated.
        ended = asyncio.ensure_future(connection.execute_fetchall("SELECT 1"))
        with contextlib.suppress(Exception):  # it may have been closed meanwhile
            while not ended.done():
                await connection.interrupt()
                await asyncio.wait({ended}, timeout=INTERRUPT_S)
            await ended
        self.give_back(connection)


class _Loan:
    """The right to use one connection until the block ends; if it is cancelled, until its statement has."""

    def __init__(self, connections: _Connections) -> None:
        self._connections = connections

    async def __aenter__(self) -> aiosqlite.Connection:
        self._connection = await self._connections.take()
        return self._connection

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            self._connections.give_back_when_ended(self._connection)
        else:
            self._connections.give_back(self._connection)


class _Timed(InterruptibleConnection):
    """Interrupts a statement that takes longer than *statement_s* or is cancelled (`SQLITE_INTERRUPT`)."""

    def __init__(self, path: Path, statement_s: float) -> None:
        # Without an isolation level the driver never begins a transaction by itself.
        super().__init__(path, isolation_level=None)
        self._statement_s = statement_s
        self._deadline = inf
        self.set_progress_handler(self._must_stop, STEPS)

    def execute(self, *statement: Any) -> sqlite3.Cursor:
        self._deadline = time.monotonic() + self._statement_s
        return super().execute(*statement)

    def _must_stop(self) -> bool:
        return time.monotonic() > self._deadline or self.is_cancelled()


def _check_file(path: Path) -> None:
    """Read the schema of the database at *path*, if there is one.

    Raises:
        ValueError: it cannot be used until the operator replaces it.
    """
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    except sqlite3.DatabaseError as error:
        if clause := _UNUSABLE_FILE.get(error.sqlite_errorcode & 0xFF):
            raise ValueError(f"{clause}: {path}") from error


def _begin_immediately(connection: EngineConnection) -> None:
    # A transaction that reads first and locks later fails if another one wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _lower(value: str | None) -> str | None:
    # PostgreSQL maps each character by itself; Python maps Σ by its context, and İ to two characters.
    return value.replace("\u03a3", "\u03c3").replace("\u0130", "i").lower() if value is not None else None


def _has_words(title: str, description: str | None, words: str) -> bool:
    """Whether *title* or *description* holds each of *words*, a JSON array, in any case."""
    text = _lower(f"{title} {description or ''}") or ""
    return all(word in text for word in _lowered(words))


@lru_cache(maxsize=64)
def _lowered(words: str) -> list[str]:
    return [_lower(word) or "" for word in msgspec.json.decode(words)]
