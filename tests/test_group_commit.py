import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from database import sqlite
from database.calls import Call
from database.group_commit import GROUP_MAX, GroupCommit
from database.slots import PoolBusy

INSERT = "INSERT INTO word VALUES (?) RETURNING text"
# Counts to ten million: long enough to be interrupted.
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1e7) SELECT max(i) FROM n"
SLOW = f"INSERT INTO word SELECT ? || ({COUNT}) RETURNING text"


class Writer:
    """A connection for writing, and what was sent to it."""

    def __init__(self, path: Path, statement_s: float) -> None:
        self.path = path
        self.statements: list[str] = []
        self.lock = asyncio.Lock()
        self.commits = GroupCommit(self.lend, waiting_max=200)
        self._statement_s = statement_s

    async def open(self) -> None:
        self.connection: Any = await aiosqlite.Connection(
            partial(sqlite._Timed, self.path, self._statement_s), iter_chunk_size=64
        )
        await self.connection.execute("PRAGMA journal_mode = WAL")
        await self.connection.execute("CREATE TABLE word (text TEXT UNIQUE CHECK (text <> 'bad'))")
        await self.connection.set_trace_callback(self.statements.append)

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[aiosqlite.Connection]:
        async with self.lock:
            yield self.connection

    async def write(self, text: Any, sql: str = INSERT) -> Any:
        return await self.commits.write(Call(sql, [text]))

    async def begin_together(self, *writes: tuple[Any, str]) -> list["asyncio.Task[Any]"]:
        """Begin *writes* while the connection is held, so that they form a group."""
        async with self.lock:
            writing = [asyncio.create_task(self.write(text, sql)) for text, sql in writes]
            await asyncio.sleep(0.01)
        return writing

    async def write_together(self, *texts: Any) -> list[Any]:
        """Write *texts* as a group and return the outcomes."""
        writing = await self.begin_together(*((text, INSERT) for text in texts))
        return await asyncio.gather(*writing, return_exceptions=True)

    def stored(self) -> list[str]:
        """Return what another process would find after a crash."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return sorted(text for (text,) in connection.execute("SELECT text FROM word"))


@pytest.fixture
def statement_s() -> float:
    return 60


@pytest.fixture
async def writer(tmp_path: Path, statement_s: float) -> AsyncIterator[Writer]:
    writer = Writer(tmp_path / "words.db", statement_s)
    await writer.open()
    yield writer
    await writer.commits.close()
    await writer.connection.close()


async def test_writes_that_wait_are_committed_together(writer: Writer) -> None:
    outcomes = await writer.write_together("a", "b", "c")

    assert outcomes == [[("a",)], [("b",)], [("c",)]]
    assert writer.stored() == ["a", "b", "c"]
    assert [statement for statement in writer.statements if "INSERT" not in statement] == [
        "BEGIN IMMEDIATE",
        "COMMIT",
    ]


async def test_the_time_of_a_write_includes_its_commit(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = sqlite._Timed.execute

    def execute_on_a_slow_disk(connection: sqlite._Timed, *statement: Any) -> sqlite3.Cursor:
        if statement[0] == "COMMIT":
            time.sleep(0.05)
        return execute(connection, *statement)

    monkeypatch.setattr(sqlite._Timed, "execute", execute_on_a_slow_disk)
    writes = [Call(INSERT, [text]) for text in "ab"]
    async with writer.lock:
        writing = [asyncio.create_task(writer.commits.write(write)) for write in writes]
        await asyncio.sleep(0.01)
    await asyncio.gather(*writing)

    assert all(write.seconds >= 0.05 for write in writes)


async def test_a_single_write_needs_no_transaction(writer: Writer) -> None:
    assert await writer.write("a") == [("a",)]

    assert [statement.partition(" ")[0] for statement in writer.statements] == ["INSERT"]


@pytest.mark.parametrize("wrong", ["a", "bad", object(), 2**64], ids=["unique", "check", "type", "overflow"])
async def test_a_statement_that_fails_fails_alone(writer: Writer, wrong: object) -> None:
    first, failed, last = await writer.write_together("a", wrong, "c")

    assert (first, last) == ([("a",)], [("c",)])
    assert isinstance(failed, Exception)
    assert writer.stored() == ["a", "c"]


@pytest.mark.parametrize("statement_s", [0.1])
async def test_a_statement_that_takes_too_long_fails_alone(writer: Writer) -> None:
    writing = await writer.begin_together(("a", INSERT), ("slow", SLOW), ("c", INSERT))
    first, slow, last = await asyncio.gather(*writing, return_exceptions=True)

    assert (first, last) == ([("a",)], [("c",)])
    assert isinstance(slow, sqlite3.OperationalError)
    assert slow.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT
    assert writer.stored() == ["a", "c"]


async def test_a_cancelled_write_is_interrupted_and_the_others_are_done(writer: Writer) -> None:
    writing = await writer.begin_together(("a", INSERT), ("slow", SLOW), ("c", INSERT))
    await asyncio.sleep(0.05)  # it is running

    writing[1].cancel()
    async with asyncio.timeout(1):
        first, slow, last = await asyncio.gather(*writing, return_exceptions=True)

    assert (first, last) == ([("a",)], [("c",)])
    assert isinstance(slow, asyncio.CancelledError)
    assert writer.stored() == ["a", "c"]


async def test_a_write_that_is_cancelled_while_it_waits_is_not_begun(writer: Writer) -> None:
    async with writer.lock:
        first, second = (asyncio.create_task(writer.write(text)) for text in ("a", "b"))
        await asyncio.sleep(0.01)
        first.cancel()
    assert await second == [("b",)]

    assert writer.stored() == ["b"]


async def test_no_write_is_acknowledged_when_the_commit_fails(writer: Writer) -> None:
    await writer.connection.execute("PRAGMA foreign_keys = ON")
    await writer.connection.execute("CREATE TABLE parent (id INTEGER PRIMARY KEY)")
    await writer.connection.execute(
        "CREATE TABLE child (id INTEGER REFERENCES parent DEFERRABLE INITIALLY DEFERRED)"
    )
    orphan = "INSERT INTO child VALUES (?)"
    writing = await writer.begin_together(("a", INSERT), (7, orphan))
    outcomes = await asyncio.gather(*writing, return_exceptions=True)

    assert all(isinstance(outcome, sqlite3.IntegrityError) for outcome in outcomes)
    assert writer.stored() == []
    assert await writer.write("b") == [("b",)]


async def test_a_database_that_another_process_holds_fails_the_group_and_not_the_next(writer: Writer) -> None:
    await writer.connection.execute("PRAGMA busy_timeout = 10")
    with contextlib.closing(sqlite3.connect(writer.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        outcomes = await writer.write_together("a", "b")
        other.execute("ROLLBACK")

    assert all(isinstance(outcome, sqlite3.OperationalError) for outcome in outcomes)
    assert await writer.write("c") == [("c",)]
    assert writer.stored() == ["c"]


async def test_more_writes_than_may_wait_are_refused(writer: Writer) -> None:
    writer.commits._waiting_max = 2

    outcomes = await writer.write_together("a", "b", "c")

    assert outcomes[:2] == [[("a",)], [("b",)]]
    assert isinstance(outcomes[2], PoolBusy)


async def test_a_group_has_a_limit_and_the_rest_is_written_next(writer: Writer) -> None:
    await writer.write_together(*(f"{number:03}" for number in range(GROUP_MAX + 2)))

    assert len(writer.stored()) == GROUP_MAX + 2
    assert writer.statements.count("COMMIT") == 2


async def test_a_connection_that_cannot_be_lent_fails_what_waits(writer: Writer) -> None:
    @contextlib.asynccontextmanager
    async def refuse() -> AsyncIterator[aiosqlite.Connection]:
        raise TimeoutError
        yield

    writer.commits._lend = refuse
    with pytest.raises(TimeoutError):
        await writer.write("a")
    writer.commits._lend = writer.lend

    assert await writer.write("b") == [("b",)]
