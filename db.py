"""From a database URL to one object that runs the statements of `queries.py`, a round trip each."""

import asyncio
import contextlib
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiosqlite
import asyncpg
import orjson
from sqlalchemy import Connection, NullPool, TypeDecorator, event
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

import database_url
import metrics
from errors import NotMigrated, Overloaded, Unavailable
from fair_share import UNLIMITED, FairShare
from logs import BoundedLog
from pool import Connection as PooledConnection
from pool import Pool, PoolBusy

Row = dict[str, Any]
S = TypeVar("S", bound=Executable)

_log = BoundedLog("database")

CANCEL_S = 0.5
SLOW_STATEMENT_S = 0.5
UNNAMED = "unnamed"
SQLITE_READERS = 4
SQLITE_QUEUE_MAX = 200  # more would wait longer than they are worth, and are told so at once
SQLITE_STEPS = 10_000  # about a millisecond
SQLITE_BUSY_TIMEOUT_MS = 5_000  # other processes may be writing to the file

# "Try again": the classes and codes of PostgreSQL's appendix A that a healthy database outgrows.
_TRANSIENT_CLASSES = ("08", "53")
_TRANSIENT_CODES = {
    "57P01", "57P02", "57P03", "57P05", "57014", "55P03", "55000",
    "25006", "25P03", "40001", "40P01", "58000",
}  # fmt: skip


_TRANSIENT_SQLITE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip


def named(name: str, statement: S) -> S:
    """Return *statement* with the name that metrics and the log know it by."""
    return statement.execution_options(name=name)


class Deferred(NamedTuple):
    """A statement that *build* makes of *arguments*, for its compilation only.

    An expression takes some 200 KB, its SQL 5 KB: one of which there are many is not kept.
    """

    build: Callable[..., Executable]
    arguments: tuple[Any, ...]


Statement = Executable | Deferred


@dataclass(frozen=True)
class Compiled:
    """A statement as one driver wants it: SQL, values in order, and conversions both ways."""

    sql: str
    reads: bool
    parameters: Sequence[tuple[str, Any, Callable[[Any], Any] | None]]
    columns: Sequence[tuple[str, Callable[[Any], Any] | None]]
    name: str = UNNAMED

    def arguments(self, values: Row) -> list[Any]:
        return [
            convert(values.get(name, default)) if convert else values.get(name, default)
            for name, default, convert in self.parameters
        ]

    def converted(self, rows: list[Row]) -> list[Row]:
        """Return *rows* with the values that their columns' types make of what the driver returns."""
        for name, convert in self._conversions:
            for row in rows:
                row[name] = convert(row[name])
        return rows

    @cached_property
    def _conversions(self) -> list[tuple[str, Callable[[Any], Any]]]:
        return [(name, convert) for name, convert in self.columns if convert]


@lru_cache(maxsize=1024)
def compile_statement(statement: Statement, dialect: Dialect) -> Compiled:
    """Compile once; statements are built once too, so identity is the key."""
    if isinstance(statement, Deferred):
        statement = statement.build(*statement.arguments)
    compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined] # not in its stubs
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - for the type checker
    parameters = []
    for name in compiled.positiontup or []:
        bind = compiled.binds[name]
        convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
        parameters.append((name, bind.effective_value, convert))
    columns = [
        (str(column.name), _result_processor(column.type, dialect))
        for column in statement.exported_columns  # type: ignore[attr-defined] # not in its stubs
    ]
    name = statement.get_execution_options().get("name", UNNAMED)
    return Compiled(compiled.string, statement.is_select, parameters, columns, name)


def _result_processor(kind: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    if dialect.name == "postgresql" and not isinstance(kind, TypeDecorator):
        return None  # its driver returns what Python has
    return kind.dialect_impl(dialect).result_processor(dialect, None)


@dataclass(frozen=True)
class TimeLimits:
    """How long a database may take, in seconds: to connect, to run a statement, to have a connection free."""

    connect_s: float = 6.0
    statement_s: float = 4.0
    wait_s: float = 6.0


class Runner(ABC):
    """Runs statements. Values are named as its `bindparam`s are."""

    share = UNLIMITED  # of one user

    @abstractmethod
    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        """Return every row of *statement*.

        Raises:
            Unavailable: the database cannot be used right now.
        """

    async def one(self, statement: Statement, **values: Any) -> Row | None:
        """Return the first row of *statement*, or None."""
        rows = await self.all(statement, **values)
        return rows[0] if rows else None


class Database(Runner):
    """Runs statements, each in a transaction of its own, unless `transaction` holds some together."""

    dialect: Dialect
    slow_statement_s = SLOW_STATEMENT_S

    @property
    @abstractmethod
    def usage(self) -> dict[str, int]:
        """How many connections are in which state."""

    @abstractmethod
    async def open(self) -> None:
        """Connect ahead of the first request; a database that is away does not keep us from starting."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[Runner]:
        """Lend a runner whose statements stand or fall together: they fall when the block raises."""

    @abstractmethod
    def engine(self) -> AsyncEngine:
        """Return a SQLAlchemy engine on the same database, for migrations."""

    def took(self, compiled: Compiled, seconds: float) -> None:
        """Note how long a statement has taken; a slow one is named in the log, without its values."""
        metrics.statement_ran(compiled.name, seconds)
        if seconds > self.slow_statement_s:
            _log.warning("slow statement", reason=compiled.name, duration_ms=round(seconds * 1000, 1))


class Postgres(Database):
    def __init__(self, url: str, pool_size: int, limits: TimeLimits = TimeLimits()) -> None:
        self.dialect = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # not in its stubs
        self.target = database_url.parse(url)
        self.share = FairShare(_share_of(pool_size))
        self._pool_size = pool_size
        self._limits = limits
        # A pooler refuses settings at the start, and a role's own setting is its owner's choice.
        self._limits_server = not self.target.pooled

    @cached_property
    def pool(self) -> Pool:
        return Pool(self._connect, self._pool_size, wait_s=self._limits.wait_s)

    @property
    def usage(self) -> dict[str, int]:
        return self.pool.usage

    async def open(self) -> None:
        for error in await self.pool.warm():
            if not _is_transient(error):
                raise error
            _unavailable(error)

    async def close(self) -> None:
        await self.pool.close()

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        compiled = compile_statement(statement, self.dialect)
        try:
            return await self.fetch(self.pool, compiled, values)
        except Unavailable as error:
            if not error.lost or not compiled.reads:  # a write may have been done
                raise
            return await self.fetch(self.pool, compiled, values)

    async def fetch(
        self, connection: "Pool | PooledConnection", compiled: Compiled, values: Row
    ) -> list[Row]:
        with _translated:
            records = await connection.fetch(
                compiled.sql, compiled.arguments(values), partial(self.took, compiled)
            )
        return compiled.converted([dict(record.items()) for record in records])

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Runner]:
        failure: Exception | None = None
        with _translated:
            async with self.pool.connection() as connection:
                await connection.raw.execute("BEGIN")
                try:
                    yield _PostgresTransaction(self, connection)
                except Unavailable:
                    raise  # the connection is done for, and the transaction with it
                except Exception as error:
                    await connection.raw.execute("ROLLBACK")
                    failure = error
                else:
                    await connection.raw.execute("COMMIT")
        if failure:  # the block's own, and not the database's to translate
            raise failure

    def engine(self) -> AsyncEngine:
        # A migration may take its time, and may have to wait for another process that migrates.
        connect = partial(self._connect, patient=True)
        return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)

    async def _connect(self, *, patient: bool = False) -> Any:
        arguments = {**self.target.arguments}
        arguments["timeout"] = arguments["timeout"] or self._limits.connect_s
        if not patient:
            # The server should be the first to give up: then the connection is in order.
            arguments["command_timeout"] = self._limits.statement_s + CANCEL_S
            if self._limits_server:
                timeout = {"statement_timeout": str(round(self._limits.statement_s * 1000))}
                arguments["server_settings"] = timeout | arguments["server_settings"]
        try:
            return await asyncpg.connect(**arguments)
        except asyncpg.ProtocolViolationError as error:
            if not self._limits_server or patient:
                raise ConnectionError(str(error)) from error
            self._limits_server = False  # an undeclared pooler: it refuses startup parameters
            return await self._connect()
        except OSError:  # TimeoutError too
            raise
        except Exception as error:  # whatever it says: without a connection we cannot serve
            raise ConnectionError(str(error)) from error


class _PostgresTransaction(Runner):
    def __init__(self, database: Postgres, connection: PooledConnection) -> None:
        self._database = database
        self._connection = connection

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        compiled = compile_statement(statement, self._database.dialect)
        return await self._database.fetch(self._connection, compiled, values)


class SQLite(Database):
    """One connection writes, others read beside it (WAL). Each is a thread that runs one call at a time.

    A statement runs to its end on its thread even when the request behind it is cancelled, so writers
    queue up in order, none fails and none is half done.
    """

    def __init__(self, url: str, limits: TimeLimits = TimeLimits()) -> None:
        self._limits = limits
        # As compact as SQLite writes JSON itself, so that equal lists are equal texts.
        self.dialect = SQLiteDialect_aiosqlite(json_serializer=lambda value: orjson.dumps(value).decode())
        path = make_url(url).database
        if not path or path == ":memory:":
            raise ValueError("must name a file: a database in memory ends with its connection")
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError("names a folder that cannot be made") from error
        _check_file(self.path)
        self.share = FairShare(_share_of(SQLITE_READERS))
        self._connections: list[aiosqlite.Connection] = []
        self._free_readers: asyncio.LifoQueue[aiosqlite.Connection] = asyncio.LifoQueue()
        self._writing = asyncio.Lock()  # a write waits for it no longer than `wait_s`
        self._waiting_to_read = self._waiting_to_write = 0
        self._ending: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        while len(self._connections) < 1 + SQLITE_READERS:
            self._connections.append(await self._connect())
        for reader in self.readers:
            self._free_readers.put_nowait(reader)

    @property
    def usage(self) -> dict[str, int]:
        in_use = int(self._writing.locked())
        return {"in use": in_use, "idle": 1 - in_use, "waiting": self._waiting_to_write}

    @property
    def writer(self) -> aiosqlite.Connection:
        if not self._connections:
            raise Unavailable
        return self._connections[0]

    @property
    def readers(self) -> list[aiosqlite.Connection]:
        return self._connections[1:]

    async def close(self) -> None:
        self._free_readers = asyncio.LifoQueue()
        while self._connections:
            await self._connections.pop().close()  # each is a thread that would keep the process alive

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        compiled = compile_statement(statement, self.dialect)
        if compiled.reads:
            return await self._read(compiled, values)
        async with self._write_slot():
            return await self.fetch(self.writer, compiled, values)

    async def _read(self, compiled: Compiled, values: Row) -> list[Row]:
        connection = await self._free_reader()
        with self._release_after(connection, partial(self._free_readers.put_nowait, connection)):
            return await self.fetch(connection, compiled, values)

    async def _free_reader(self) -> aiosqlite.Connection:
        if not self._connections:
            raise Unavailable
        if not self._free_readers.empty():
            return self._free_readers.get_nowait()
        with _translated:
            if self._waiting_to_read >= SQLITE_QUEUE_MAX:
                raise PoolBusy(f"{self._waiting_to_read} requests are waiting to read")
            self._waiting_to_read += 1
            try:
                async with asyncio.timeout(self._limits.wait_s):
                    return await self._free_readers.get()
            finally:
                self._waiting_to_read -= 1

    def _ended(self, leave: Callable[[], None], ending: "asyncio.Task[Any]") -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # it may have been closed meanwhile, which is all the same
        leave()

    @contextlib.contextmanager
    def _release_after(self, connection: aiosqlite.Connection, leave: Callable[[], None]) -> Iterator[None]:
        """Call *leave* when the block has ended. If it was cancelled, its statement is ended first."""
        try:
            yield
        except asyncio.CancelledError:
            ending = asyncio.create_task(_interrupt(connection))
            self._ending.add(ending)
            ending.add_done_callback(partial(self._ended, leave))
            raise
        except BaseException:
            leave()
            raise
        leave()

    async def fetch(self, connection: aiosqlite.Connection, compiled: Compiled, values: Row) -> list[Row]:
        with _translated:
            began = time.perf_counter()
            try:
                found = await connection.execute_fetchall(compiled.sql, compiled.arguments(values))
            finally:
                self.took(compiled, time.perf_counter() - began)
        names = [name for name, _ in compiled.columns]
        return compiled.converted([dict(zip(names, row, strict=True)) for row in found])

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Runner]:
        async with self._write_slot():
            try:
                with _translated:
                    await self.writer.execute("BEGIN IMMEDIATE")
                yield _SQLiteTransaction(self)
                with _translated:
                    await self.writer.commit()
            except BaseException:
                # The thread takes calls in order, so the next write starts after the rollback.
                await asyncio.shield(asyncio.create_task(self.writer.rollback()))
                raise

    @asynccontextmanager
    async def _write_slot(self) -> AsyncIterator[None]:
        with _translated:
            if self._waiting_to_write >= SQLITE_QUEUE_MAX:
                raise PoolBusy(f"{self._waiting_to_write} requests are waiting to write")
        self._waiting_to_write += 1
        try:
            with _translated:
                async with asyncio.timeout(self._limits.wait_s):
                    await self._writing.acquire()
        finally:
            self._waiting_to_write -= 1
        with self._release_after(self.writer, self._writing.release):
            yield

    def engine(self) -> AsyncEngine:
        connect = partial(self._connect, patient=True)
        engine = create_async_engine("sqlite+aiosqlite://", async_creator=connect, poolclass=NullPool)
        event.listen(engine.sync_engine, "begin", _begin_immediately)
        return engine

    async def _connect(self, *, patient: bool = False) -> aiosqlite.Connection:
        statement_s = inf if patient else self._limits.statement_s
        return await aiosqlite.Connection(
            partial(self._connect_on_its_thread, statement_s), iter_chunk_size=64
        )

    def _connect_on_its_thread(self, statement_s: float) -> sqlite3.Connection:
        connection = _Timed(self.path, statement_s)
        connection.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # What PostgreSQL has and SQLite has not: lower case beyond ASCII, order by code point.
        connection.create_function("lower", 1, _lower, deterministic=True)
        connection.create_function("has_words", 3, _has_words, deterministic=True)
        connection.create_collation("C", lambda a, b: (a > b) - (a < b))
        return connection


class _Timed(sqlite3.Connection):
    """Ends what is executed and takes longer than *statement_s*: `SQLITE_INTERRUPT`."""

    def __init__(self, path: Path, statement_s: float) -> None:
        # Without an isolation level the driver never opens a transaction on its own account.
        super().__init__(path, isolation_level=None)
        self._statement_s = statement_s
        self._deadline = inf
        self.set_progress_handler(self._is_late, SQLITE_STEPS)

    def execute(self, *statement: Any) -> sqlite3.Cursor:
        self._deadline = time.monotonic() + self._statement_s
        return super().execute(*statement)

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline


class _SQLiteTransaction(Runner):
    def __init__(self, database: SQLite) -> None:
        self._database = database

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        compiled = compile_statement(statement, self._database.dialect)
        return await self._database.fetch(self._database.writer, compiled, values)


def connect(url: str, *, pool_size: int, limits: TimeLimits = TimeLimits()) -> Database:
    """Return the database at *url*, not opened yet.

    Raises:
        ValueError: a clause about the URL, fit to follow `DATABASE_URL: `.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("sqlite", "sqlite+aiosqlite"):
        try:
            return SQLite(url, limits)
        except ArgumentError as error:
            raise ValueError("is not a valid URL") from error
    if scheme in ("postgres", "postgresql", "postgres+asyncpg", "postgresql+asyncpg"):
        return Postgres(url, pool_size, limits)
    raise ValueError("must begin with postgresql:// or sqlite:///")


_UNUSABLE_FILE = {
    sqlite3.SQLITE_NOTADB: "names a file that is not a SQLite database",
    sqlite3.SQLITE_CORRUPT: "names a SQLite database that is damaged",
    sqlite3.SQLITE_CANTOPEN: "names a file that cannot be opened",
}


def _check_file(path: Path) -> None:
    """Read the schema of the database at *path*, if there is one.

    Raises:
        ValueError: that needs a person, and no time will help.
    """
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=0)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()
    except sqlite3.DatabaseError as error:
        if clause := _UNUSABLE_FILE.get(error.sqlite_errorcode & 0xFF):
            raise ValueError(f"{clause}: {path}") from error


async def _interrupt(connection: aiosqlite.Connection) -> None:
    """Return when the thread of *connection* has ended the statement of a request that was cancelled."""
    await connection.interrupt()
    await connection.execute_fetchall("SELECT 1")  # the thread takes calls in order


def _share_of(connections: int) -> int:
    """Return how many of *connections* one user may occupy: a third, and at least one."""
    return max(1, connections // 3)


def _begin_immediately(connection: Connection) -> None:
    # A transaction that reads first and locks later fails where another one wrote in between.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _lower(value: str | None) -> str | None:
    # Character by character, as PostgreSQL does: Python looks around Σ and makes two characters of İ.
    return value.replace("\u03a3", "\u03c3").replace("\u0130", "i").lower() if value is not None else None


def _has_words(title: str, description: str | None, words: str) -> bool:
    """Whether *title* or *description* holds each of *words*, a JSON array, in any case."""
    text = _lower(f"{title} {description or ''}") or ""
    return all(word in text for word in _lowered(words))


@lru_cache(maxsize=64)
def _lowered(words: str) -> list[str]:
    return [_lower(word) or "" for word in orjson.loads(words)]


class _Translated:
    """Raises what a driver raises as what a route understands."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and _is_transient(error):
            raise _unavailable(error) from error
        if isinstance(error, asyncpg.InsufficientPrivilegeError):  # somebody has yet to GRANT it
            raise _unavailable(error) from error
        if isinstance(error, Exception) and _is_not_migrated(error):
            raise _unavailable(error, NotMigrated) from error


_translated = _Translated()  # one for all: it keeps nothing, and a generator for each statement would cost


def _unavailable(error: Exception, kind: type[Unavailable] = Unavailable) -> Unavailable:
    metrics.database_unavailable(type(error).__name__)
    _log.warning("database unavailable", reason=type(error).__name__, error=str(error))
    if isinstance(error, PoolBusy):
        return Overloaded()
    unavailable = kind()
    unavailable.lost = _is_lost(error)
    return unavailable


def _is_lost(error: Exception) -> bool:
    """Whether the connection broke, rather than that something took too long."""
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code[:2] == "08" or code in ("57P01", "57P02", "57P03")
    if isinstance(error, TimeoutError):
        return False
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError)


def is_transient(error: BaseException | None) -> bool:
    """Whether *error*, or what it was raised from, may have gone when the same is tried later."""
    while error is not None:
        if isinstance(error, Exception) and _is_transient(error):
            return True
        error = error.__cause__
    return False


def _is_not_migrated(error: Exception) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith(("no such table", "no such column"))
    return isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError)


def _is_transient(error: Exception) -> bool:
    """Whether the same statement may succeed later; all else is a bug of ours."""
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code[:2] in _TRANSIENT_CLASSES or code in _TRANSIENT_CODES
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError)  # a value that does not fit its type
    if isinstance(error, sqlite3.OperationalError):
        return error.sqlite_errorcode & 0xFF in _TRANSIENT_SQLITE
    # The driver says InternalClientError when a connection ends while it is between two states.
    return isinstance(error, OSError | TimeoutError | PoolBusy | asyncpg.InternalClientError)
