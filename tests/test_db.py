import asyncio
import contextlib
import random
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Integer, Select, func, literal, literal_column, select, text
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

import db
from database import failures, sqlite
from database.base import Executor
from database.calls import Call, InterruptibleConnection
from database.fair_share import UNLIMITED
from database.statements import Deferred, Row, Statement, compile_statement
from errors import NotFound, Overloaded, Unavailable
from main import create_app
from queries import lists, tasks
from queries.owner import Owner
from refusals import TaskNotFound
from schemas import Filter, Order, TaskCreate
from tests.conftest import Person, pages, person, running, settings_for
from tests.postgres import Server

WRITERS = 32
TASKS = 2_000


@pytest.mark.no_cover  # coverage of the same lines many times is slow
async def test_concurrent_writes_with_cancelled_requests_lose_nothing(alice: Person) -> None:
    """Every tenth client disconnects; its write is applied or not, and no other client is affected."""
    numbers = iter(range(TASKS))
    acknowledged: list[int] = []

    async def write() -> None:
        for number in numbers:
            request = asyncio.create_task(alice.post(json={"title": str(number)}))
            if number % 10 == 0:
                await asyncio.sleep(0.001)
                request.cancel()
            (answer,) = await asyncio.gather(request, return_exceptions=True)
            if isinstance(answer, asyncio.CancelledError):
                continue
            assert not isinstance(answer, BaseException)
            assert answer.status_code == 201
            acknowledged.append(number)

    await asyncio.gather(*(write() for _ in range(WRITERS)))

    kept = [int(task["title"]) for page in await pages(alice, "?limit=1000") for task in page]
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)
    assert {number for number in range(TASKS) if number % 10} <= set(acknowledged)


async def test_concurrent_updates_of_one_task_all_count(alice: Person) -> None:
    task = await alice.create()

    answers = await asyncio.gather(
        *(alice.put(f"/{task['id']}", json={"description": str(number)}) for number in range(100))
    )

    assert {answer.status_code for answer in answers} == {200}
    assert (await alice.get(f"/{task['id']}")).json()["version"] == task["version"] + 100


async def test_sqlite_uses_wal_full_sync_and_foreign_keys(sqlite_url: str) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    columns: list[Any] = [literal_column(name) for name in expected]
    pragmas: Select[Any] = select(*columns).select_from(
        text(", ".join(f"pragma_{name}" for name in expected))
    )
    async with _opened(sqlite_url) as database:
        async with database.transaction() as writer:
            assert await writer.one(pragmas) == expected
        for found in await asyncio.gather(*(database.one(pragmas) for _ in range(2 * sqlite.READERS))):
            assert found == expected


async def test_sqlite_waits_for_another_process_that_writes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    async with running(create_app(settings_for(url))) as client:
        alice = person("alice", client)
        other = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        waiting = asyncio.create_task(alice.post(json={"title": "Buy milk"}))
        reading = await alice.get()  # reads do not wait for the writer
        assert not waiting.done()
        other.execute("COMMIT")
        other.close()

        assert reading.status_code == 200
        assert (await waiting).status_code == 201


async def test_sqlite_that_stays_locked_is_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "BUSY_TIMEOUT_MS", 50)
    async with running(create_app(settings_for(f"sqlite:///{tmp_path / 'tasks.db'}"))) as client:
        alice = person("alice", client)
        other = sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")

        answer = await alice.post(json={"title": "Buy milk"})
        other.close()

        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await alice.post(json={"title": "Buy milk"})).status_code == 201


async def test_an_unreachable_postgres_is_503_until_it_is_back(postgres: Server) -> None:
    name = await postgres.create_database()
    async with running(create_app(settings_for(postgres.url_of(name)))) as client:
        alice = person("alice", client)
        await alice.create()
        await postgres.drop_database(name)

        answers = [await alice.get() for _ in range(3)]

        assert {answer.status_code for answer in answers} == {503}
        assert answers[0].headers["retry-after"] == "1"
        assert "database" not in answers[0].text


async def test_the_service_starts_while_its_database_is_unreachable(postgres: Server) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nowhere"
    async with running(create_app(settings_for(url, migrate_on_start=False))) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await person("alice", client).get()).status_code == 503


async def test_a_terminated_connection_is_replaced(postgres_url: str) -> None:
    async with running(create_app(settings_for(postgres_url, database_pool_size=1))) as client:
        alice = person("alice", client)
        task = await alice.create()
        await Server(postgres_url).execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

        answers = [await alice.get(f"/{task['id']}") for _ in range(2)]

        assert [answer.json() for answer in answers] == [task, task]


async def test_a_column_type_change_does_not_break_prepared_statements(postgres_url: str) -> None:
    async with running(create_app(settings_for(postgres_url, database_pool_size=1))) as client:
        alice = person("alice", client)
        task = await alice.create()
        assert (await alice.get(f"/{task['id']}")).status_code == 200
        other = Server(postgres_url)
        await other.execute("ALTER TABLE task ALTER COLUMN version TYPE bigint")

        assert (await alice.get(f"/{task['id']}")).json() == task


GUIDE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
COUNT_LOADED = GUIDE.partition("need their owners' counts:")[2].split("```")[1].removeprefix("sql")


async def test_rows_inserted_with_user_id_and_title_only_are_tasks(database_url: str, alice: Person) -> None:
    engine = db.connect(database_url, pool_size=1).engine()
    async with engine.begin() as connection:
        await connection.exec_driver_sql(
            f"INSERT INTO task (user_id, title) VALUES ('{alice.user_id}', 'loaded')"
        )
        if not database_url.startswith("sqlite"):  # there a trigger does it
            await connection.exec_driver_sql(COUNT_LOADED)
    await engine.dispose()

    (task,) = (await alice.get()).json()

    assert (task["title"], task["completed"], task["version"]) == ("loaded", False, 1)
    assert task["created_at"] == task["updated_at"]
    assert (await alice.patch(f"/{task['id']}/complete")).json()["completed"] is True
    assert (await alice.create())["id"] > task["id"]


@pytest.mark.parametrize(
    ("url", "clause"),
    [
        ("mysql://h/d", "must begin with postgresql:// or sqlite:///"),
        ("postgresql+psycopg://h/d", "must begin with postgresql:// or sqlite:///"),
        ("nonsense", "must begin with postgresql:// or sqlite:///"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("sqlite:nonsense", "is not a valid URL"),
        ("sqlite:////dev/null/tasks.db", "names a folder that cannot be made"),
        ("postgresql://", "names no host"),
    ],
)
def test_an_unusable_database_url_is_refused_with_a_reason(url: str, clause: str) -> None:
    with pytest.raises(ValueError, match=clause):
        db.connect(url, pool_size=1)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg", "postgres+asyncpg"])
def test_every_postgres_url_scheme_is_accepted(scheme: str) -> None:
    assert isinstance(db.connect(f"{scheme}://user@host/name", pool_size=1), db.Postgres)


def test_statements_are_compiled_once() -> None:
    database = db.connect("postgresql://user@host/name", pool_size=1)

    first, again = (
        compile_statement(Deferred(lists.page_of_tasks, ("all", Order(), "first", False)), database.dialect)
        for _ in range(2)
    )

    assert again is first


@pytest.mark.parametrize(
    ("sqlstate", "transient"),
    [
        *((code, True) for code in ("08006", "08P01", "53300", "53100", "57P01", "57P02", "57P03", "57P05")),
        *((code, True) for code in ("57014", "55P03", "55000", "25006", "25P03", "40001", "40P01", "58000")),
        *((code, False) for code in ("23505", "22001", "42P01", "42601", "XX000", "22P05")),
    ],
)
def test_a_sqlstate_is_classified_as_transient_or_not(sqlstate: str, transient: bool) -> None:
    error = asyncpg.PostgresError("message")
    error.sqlstate = sqlstate

    assert failures.is_transient_error(error) is transient


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (asyncpg.InterfaceError("connection is closed"), True),
        (asyncpg.exceptions._base.DataError("invalid input for query argument"), False),
        (ValueError(), False),
        (KeyError(), False),
    ],
)
def test_a_driver_error_is_classified_as_transient_or_not(error: Exception, transient: bool) -> None:
    assert failures.is_transient_error(error) is transient


async def test_a_blocked_statement_times_out_and_is_cancelled_on_the_server(postgres_url: str) -> None:
    settings = settings_for(postgres_url, database_statement_timeout_s=0.3)
    async with running(create_app(settings)) as client:
        alice = person("alice", client)
        task = await alice.create()
        other, watcher = [await asyncpg.connect(postgres_url) for _ in range(2)]
        async with other.transaction():
            await other.execute("SELECT * FROM task FOR UPDATE")

            answer = await alice.patch(f"/{task['id']}/complete")
            waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
            async with asyncio.timeout(5):
                while await watcher.fetchval(waiting):
                    pass

        await other.close()
        await watcher.close()
        assert answer.status_code == 503
        assert (await alice.patch(f"/{task['id']}/complete")).json()["completed"] is True


async def test_a_full_sqlite_queue_is_overloaded_at_once(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite, "WAITING_MAX", 3)
    async with _opened(sqlite_url) as database:
        holder, *owners = (Owner(f"user{number}", database) for number in range(10))
        async with holder.transaction():
            writing = [asyncio.create_task(_add(owner)) for owner in owners[:3]]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await _add(owners[3])
        await asyncio.gather(*writing)

        reading = await asyncio.gather(*map(_titles, owners), return_exceptions=True)
        readable = sqlite.READERS + 3
        assert [type(each) for each in reading] == [list] * readable + [Overloaded] * (9 - readable)
        assert [len(await _titles(owner)) for owner in owners] == [1] * 3 + [0] * 6


async def _served_within(timeout_s: float, database: db.Database) -> Row | None:
    async with asyncio.timeout(timeout_s):
        while True:
            with contextlib.suppress(Overloaded):
                return await database.one(select(literal(1).label("one")))
            await asyncio.sleep(0.01)


async def test_reads_on_sqlite_are_served_by_the_readers_that_are_free(sqlite_url: str) -> None:
    async with _opened(sqlite_url, db.Timeouts(statement_s=60)) as database:
        endless: Select[Any] = select(literal_column("n")).select_from(
            text(f"({COUNTING.format(10**12)}) AS counted")
        )
        busy = [asyncio.create_task(database.all(endless)) for _ in range(sqlite.READERS - 1)]
        await asyncio.sleep(0.01)

        async with asyncio.timeout(5):
            for _ in range(3 * sqlite.READERS):
                assert await database.one(select(literal(1).label("one"))) == {"one": 1}
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)


async def test_a_read_that_waits_too_long_for_a_reader_of_sqlite_is_unavailable(sqlite_url: str) -> None:
    timeouts = db.Timeouts(statement_s=0.3, wait_s=0.1)
    async with _opened(sqlite_url, timeouts) as database:
        endless: Select[Any] = select(literal_column("n")).select_from(
            text(f"({COUNTING.format(10**12)}) AS counted")
        )
        busy = [asyncio.create_task(database.all(endless)) for _ in range(sqlite.READERS)]
        await asyncio.sleep(0.01)

        with pytest.raises(Unavailable):
            await database.one(select(literal(1).label("one")))
        assert {type(error) for error in await asyncio.gather(*busy, return_exceptions=True)} == {Unavailable}
        assert await database.one(select(literal(1).label("one"))) == {"one": 1}


async def test_a_cancelled_statement_is_interrupted_on_sqlite(sqlite_url: str) -> None:
    async with _opened(sqlite_url, db.Timeouts(statement_s=60)) as database:
        endless: Select[Any] = select(literal_column("n")).select_from(
            text(f"({COUNTING.format(10**12)}) AS counted")
        )
        for _ in range(5):
            reading = [asyncio.create_task(database.all(endless)) for _ in range(8)]
            await asyncio.sleep(0.01)
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

        assert await _served_within(2, database) == {"one": 1}


@pytest.mark.parametrize("started_s", [0, 0.0001, 0.001])
async def test_a_statement_that_is_cancelled_before_its_thread_begins_frees_its_reader(
    sqlite_url: str, started_s: float
) -> None:
    async with _opened(sqlite_url, db.Timeouts(statement_s=60)) as database:
        assert isinstance(database, db.SQLite)
        endless: Select[Any] = select(literal_column("n")).select_from(
            text(f"({COUNTING.format(10**12)}) AS counted")
        )
        for _ in range(30):
            reading = asyncio.create_task(database.all(endless))
            await asyncio.sleep(started_s)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

        async with asyncio.timeout(5):
            while database._readers.idle < sqlite.READERS:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.01)


COUNTING = """
WITH RECURSIVE n(i) AS (SELECT CAST(1 AS BIGINT) UNION ALL SELECT i + 1 FROM n WHERE i < {})
SELECT count(*) AS n FROM n
"""


async def test_a_migration_may_take_longer_than_a_request(url: str) -> None:
    engine = db.connect(url, pool_size=1, timeouts=db.Timeouts(statement_s=0.05)).engine()

    async with engine.connect() as connection:
        start = time.monotonic()
        await connection.exec_driver_sql(COUNTING.format(2_000_000))
        assert time.monotonic() - start > 0.1
    await engine.dispose()


async def test_a_statement_that_times_out_frees_its_connection(url: str) -> None:
    database = db.connect(url, pool_size=POOL_SIZE, timeouts=db.Timeouts(statement_s=0.2))
    await database.open()

    endless: Select[Any] = select(literal_column("n")).select_from(
        text(f"({COUNTING.format(10**12)}) AS counted")
    )
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(Unavailable):
            await database.all(endless)
    with pytest.raises(Unavailable):
        async with database.transaction() as runner:
            await runner.all(endless)
    assert time.monotonic() - start < 3

    await database.all(select(literal(1).label("one")))
    await database.close()


async def test_an_invalid_sqlite_statement_is_not_unavailable(tmp_path: Path) -> None:
    database = db.SQLite(f"sqlite:///{tmp_path / 'tasks.db'}")
    await database.open()

    with pytest.raises(sqlite3.OperationalError, match="no such function"):
        await database.all(select(func.nonsense()))
    await database.close()


POOL_SIZE = 3


@pytest.fixture
async def owner(url: str) -> AsyncIterator[Owner]:
    """An owner with an empty database of their own."""
    async with _opened(url) as database:
        yield Owner("alice", database)


@asynccontextmanager
async def _opened(url: str, timeouts: db.Timeouts | None = None) -> AsyncIterator[db.Database]:
    database = db.connect(url, pool_size=POOL_SIZE, timeouts=timeouts or db.Timeouts())
    database.share = UNLIMITED  # here, one user may take every connection
    await database.open()
    yield database
    await database.close()


async def _add(owner: Owner, title: str = "Buy milk", **fields: object) -> None:
    await tasks.create_task(owner, dict(TaskCreate(title=title)) | fields)


async def _titles(owner: Owner) -> list[str]:
    return [row.title for row in (await lists.list_tasks(owner, Filter(), Order(), 10_000)).tasks]


async def _write_at_once(owner: Owner) -> None:
    """Fail unless every connection is usable and no lock is held."""
    async with asyncio.timeout(2):
        await asyncio.gather(*(_add(owner, "afterwards") for _ in range(POOL_SIZE)))
        async with owner.transaction() as within:
            await _add(within, "afterwards")
    assert (await _titles(owner)).count("afterwards") == POOL_SIZE + 1


async def test_a_transaction_is_invisible_to_others_until_it_commits(owner: Owner) -> None:
    async with owner.transaction() as within:
        await _add(within)
        await _add(within)
        assert len(await _titles(within)) == 2
        assert await _titles(owner) == []

    assert len(await _titles(owner)) == 2


@pytest.mark.parametrize(
    "error", [NotFound(), Unavailable(), ValueError(), OSError(), TimeoutError(), TaskNotFound()]
)
async def test_an_exception_rolls_back_the_transaction_and_propagates(owner: Owner, error: Exception) -> None:
    async def write() -> None:
        async with owner.transaction() as within:
            await _add(within)
            raise error

    with pytest.raises(type(error)) as raised:
        await write()

    assert raised.value is error
    assert await _titles(owner) == []
    await _write_at_once(owner)


async def test_a_constraint_violation_rolls_back_the_transaction(owner: Owner) -> None:
    async def write() -> None:
        async with owner.transaction() as within:
            await _add(within)
            await _add(within, completed=None)

    with pytest.raises((asyncpg.NotNullViolationError, sqlite3.IntegrityError)):
        await write()

    assert await _titles(owner) == []
    await _write_at_once(owner)


async def test_a_refusal_in_a_transaction_keeps_its_connection(postgres_url: str) -> None:
    async with _opened(postgres_url) as database:
        assert isinstance(database, db.Postgres)
        before = await database.pool.fetch("SELECT pg_backend_pid()", [])
        with pytest.raises(NotFound):
            async with database.transaction():
                raise NotFound

        assert await database.pool.fetch("SELECT pg_backend_pid()", []) == before


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_transaction_is_rolled_back(owner: Owner, times: int) -> None:
    written = asyncio.Event()

    async def write() -> None:
        async with owner.transaction() as within:
            await _add(within)
            written.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(write())
    await written.wait()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task

    await _write_at_once(owner)
    assert "Buy milk" not in await _titles(owner)


async def test_transactions_cancelled_at_any_moment_are_atomic(owner: Owner) -> None:
    """Others write concurrently; every transaction that was not cancelled has committed."""
    dice = random.Random(7)

    async def write(title: str) -> None:
        async with owner.transaction() as within:
            for _ in range(3):
                await _add(within, title)

    async def write_and_cancel(title: str) -> None:
        task = asyncio.create_task(write(title))
        await asyncio.sleep(dice.uniform(0, 0.02))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def cancel_many(number: int) -> None:
        for attempt in range(25):
            await write_and_cancel(f"cancelled {number} {attempt}")

    async def write_many(number: int) -> None:
        for attempt in range(25):
            await write(f"kept {number} {attempt}")

    await asyncio.gather(*map(cancel_many, range(4)), *map(write_many, range(2)))

    counts = Counter(await _titles(owner))
    assert set(counts.values()) == {3}
    assert sum(title.startswith("kept") for title in counts) == 50
    assert sum(title.startswith("cancelled") for title in counts) < 100
    await _write_at_once(owner)


async def test_concurrent_transactions_lose_no_update(owner: Owner) -> None:
    await _add(owner, description="0")
    ((task_id,),) = [(row.id,) for row in (await lists.list_tasks(owner, Filter(), Order(), 1)).tasks]

    async def change(number: int) -> None:
        async with owner.transaction() as within:
            await tasks.update_task(within, task_id, {"description": f"first {number}"})
            await asyncio.sleep(0)
            await tasks.update_task(within, task_id, {"description": f"second {number}"})

    await asyncio.gather(*map(change, range(20)))

    task = await tasks.get_task(owner, task_id)
    assert task is not None
    assert task["version"] == 1 + 2 * 20


async def test_postgres_runs_transactions_concurrently(postgres_url: str) -> None:
    async with _opened(postgres_url) as database:
        alice, bob = Owner("alice", database), Owner("bob", database)
        async with asyncio.timeout(2), alice.transaction() as one, bob.transaction() as two:
            await _add(one)
            await _add(two)
            assert len(await _titles(one)) == len(await _titles(two)) == 1
        assert len(await _titles(alice)) == len(await _titles(bob)) == 1


async def test_waiting_too_long_for_the_sqlite_writer_is_unavailable(sqlite_url: str) -> None:
    async with _opened(sqlite_url, db.Timeouts(wait_s=0.05)) as database:
        owner = Owner("alice", database)
        async with owner.transaction():
            with pytest.raises(Unavailable):
                await _add(owner)
            with pytest.raises(Unavailable):
                async with owner.transaction():
                    pass
        await _write_at_once(owner)


CUT_OFF = """
CREATE SEQUENCE tries;
CREATE FUNCTION cut_off() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM nextval('tries'); PERFORM pg_terminate_backend(pg_backend_pid(), 1000); RETURN NULL; END $$;
CREATE TRIGGER cut_off AFTER UPDATE ON task FOR EACH ROW EXECUTE FUNCTION cut_off();
"""


@pytest.mark.parametrize(("versions", "tries"), [(None, 1), ([1], tasks.SERIES_ATTEMPTS)])
async def test_only_a_versioned_write_is_retried_after_a_lost_connection(
    postgres_url: str, versions: list[int] | None, tries: int
) -> None:
    server = Server(postgres_url)
    async with _opened(postgres_url) as database:
        owner = Owner("alice", database)
        task = await tasks.create_task(owner, dict(TaskCreate(title="Buy milk")))
        await server.execute(CUT_OFF)

        with pytest.raises(Unavailable):
            await tasks.update_task(owner, task["id"], {"title": "changed"}, versions)

        counted = select(literal_column("last_value", Integer).label("tries")).select_from(text("tries"))
        assert await database.one(counted) == {"tries": tries}


class _Overtaken(Executor):
    """Runs statements, and *change* after the first."""

    def __init__(self, database: Executor, change: Callable[[], Awaitable[object]]) -> None:
        self.database, self.change = database, change
        self.names: list[str] = []

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        rows = await self.database.all(statement, **values)
        if not self.names:
            await self.change()
        self.names.append(compile_statement(statement, DIALECT).name)
        return rows


DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # not in its stubs


@pytest.mark.parametrize(
    "changes",
    [{"title": "changed"}, {"completed": True, "recurring": None}, {"completed": True, "due_date": None}],
)
async def test_a_change_that_ends_no_series_is_only_tried_again(
    owner: Owner, changes: dict[str, Any]
) -> None:
    """Citus cannot run `complete_in_series` with such values: its condition is constantly false."""
    task = await tasks.create_task(owner, dict(TaskCreate(title="Buy milk")))
    overtaken = _Overtaken(owner.db, lambda: tasks.update_task(owner, task["id"], {"title": "Buy oats"}))

    after = await tasks.update_task(replace(owner, db=overtaken), task["id"], changes, [2])

    assert after["version"] == 3
    assert overtaken.names == ["update_task", "get_task", "update_task"]


ON_COMMIT = """
CREATE FUNCTION on_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {}; RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER on_commit AFTER INSERT ON task DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW WHEN (NEW.title = 'refuse') EXECUTE FUNCTION on_commit();
"""


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("RAISE SQLSTATE '40001'", Unavailable),
        ("PERFORM pg_sleep(60)", Unavailable),
        ("RAISE check_violation USING CONSTRAINT = 'rule'", asyncpg.CheckViolationError),
        ("PERFORM pg_terminate_backend(pg_backend_pid())", Unavailable),
    ],
)
async def test_a_failed_commit_raises_as_a_failed_statement_does(
    postgres_url: str, what: str, expected: type[Exception]
) -> None:
    async with _opened(postgres_url, db.Timeouts(statement_s=0.3)) as database:
        owner = Owner("alice", database)
        await Server(postgres_url).execute(ON_COMMIT.format(what))

        start = time.monotonic()
        with pytest.raises(expected):
            async with owner.transaction() as within:
                await _add(within, "refuse")

        assert time.monotonic() - start < 2
        assert await _titles(owner) == []
        await _write_at_once(owner)


async def test_an_error_of_sqlite_does_not_quote_what_is_stored() -> None:
    with contextlib.closing(InterruptibleConnection(":memory:")) as connection:
        outcome = Call("SELECT CAST(x'ff' || 'Buy milk' AS TEXT)", []).run(connection)

    assert isinstance(outcome, sqlite3.DataError)
    assert "milk" not in str(outcome)
