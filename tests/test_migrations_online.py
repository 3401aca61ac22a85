"""Migrations of a PostgreSQL database that serves requests at the same time."""

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from alembic import command
from sqlalchemy import Engine, event

import db
from database import failures
from tests.pgbouncer import running_pgbouncer
from tests.postgres import Server
from tests.service import PROJECT, environment
from tests.test_migrations import _alembic

INDEXES = (
    "ix_task_live",
    "ix_task_live_pending",
    "ix_task_live_due_date",
    "ix_task_revision",
    "ix_task_deleted",
    "ix_task_deleted_at",
    "ix_idempotency_key_created_at",
    "ix_idempotency_key_user_id_weight",
    "ix_task_words",
)
BEFORE_INDEXES = "0011"
WITHIN_S = 60
REVISION = "SELECT version_num FROM task_schema_version"
BUILDING = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'CREATE INDEX%'"
)
WAITING = f"{BUILDING} AND wait_event_type = 'Lock'"


@pytest.fixture
async def url(postgres: Server) -> AsyncIterator[str]:
    async with postgres.database() as url:
        yield url


@pytest.fixture
async def watcher(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


async def upgrade(url: str, revision: str = "head") -> None:
    await asyncio.to_thread(command.upgrade, _alembic(db.connect(url, pool_size=1)), revision)


async def command_line(url: str, folder: Path) -> asyncio.subprocess.Process:
    """Start the README's migration command."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "alembic", "upgrade", "head"),
        cwd=PROJECT,
        env=environment(folder, DATABASE_URL=url, BETTER_AUTH_SECRET="x" * 32),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


@contextlib.asynccontextmanager
async def old_snapshot(url: str) -> AsyncIterator[None]:
    """Keep a transaction open for which a concurrent index build has to wait."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM task")
            yield
    finally:
        await connection.close()


async def eventually(connection: asyncpg.Connection, query: str) -> Any:
    async with asyncio.timeout(WITHIN_S):
        while (found := await connection.fetchval(query)) is None:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.02)
    return found


async def validity(connection: asyncpg.Connection) -> dict[str, bool]:
    rows = await connection.fetch(
        "SELECT relname, indisvalid FROM pg_index JOIN pg_class ON oid = indexrelid WHERE relname = ANY($1)",
        INDEXES,
    )
    return dict(tuple(row) for row in rows)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    statements: list[str] = []

    def record(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(" ".join(statement.split()))

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", record)


async def test_an_index_of_an_existing_table_is_always_built_concurrently(url: str) -> None:
    with recorded() as statements:
        await upgrade(url)

    created: set[str] = set()  # in this revision
    built = []
    for statement in statements:
        if "task_schema_version" in statement:
            created = set()
        elif table := re.match(r"CREATE TABLE (\w+)", statement):
            created.add(table[1])
        elif index := re.match(r"CREATE (?:UNIQUE )?INDEX (CONCURRENTLY )?\w+ ON (\w+)", statement):
            built.append(statement)
            assert index[1] or index[2] in created, statement
    assert len(built) > len(INDEXES)


async def test_no_migration_rewrites_the_tasks(url: str, watcher: asyncpg.Connection) -> None:
    await upgrade(url, "0001")
    file = "SELECT pg_relation_filenode('task')"
    before = await watcher.fetchval(file)

    await upgrade(url)

    assert await watcher.fetchval(file) == before


async def test_tasks_are_read_and_written_while_an_index_is_built(
    url: str, watcher: asyncpg.Connection
) -> None:
    await upgrade(url, BEFORE_INDEXES)
    await watcher.execute(
        "INSERT INTO task (user_id, title) "
        "SELECT 'user' || n % 100, 'Task ' || n FROM generate_series(1, 20000) n"
    )
    longest = 0.0
    async with old_snapshot(url):
        building = asyncio.create_task(upgrade(url))
        await eventually(watcher, WAITING)
        for _ in range(20):
            began = time.monotonic()
            await watcher.fetchval("SELECT count(*) FROM task WHERE user_id = 'user1'")
            await watcher.execute("INSERT INTO task (user_id, title) VALUES ('user1', 'Meanwhile')")
            await watcher.execute("UPDATE task SET completed = true WHERE user_id = 'user1' AND id < 200")
            longest = max(longest, time.monotonic() - began)
        assert not building.done()
    await building

    assert longest < 0.5
    assert await validity(watcher) == dict.fromkeys(INDEXES, True)


async def test_an_index_whose_build_was_interrupted_is_built_again(
    url: str, watcher: asyncpg.Connection
) -> None:
    await upgrade(url, BEFORE_INDEXES)
    async with old_snapshot(url):
        building = asyncio.create_task(upgrade(url))
        pid = await eventually(watcher, WAITING)
        await watcher.execute(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(ConnectionError) as failure:
            await building
    assert failures.is_transient(failure.value)  # the next start tries again
    assert False in (await validity(watcher)).values()
    assert await watcher.fetchval(REVISION) == BEFORE_INDEXES

    await upgrade(url)

    assert await validity(watcher) == dict.fromkeys(INDEXES, True)


async def test_a_second_process_waits_for_the_index_build_of_a_killed_one(
    url: str, watcher: asyncpg.Connection, tmp_path: Path
) -> None:
    await upgrade(url, BEFORE_INDEXES)
    async with old_snapshot(url):
        first = await command_line(url, tmp_path)
        await eventually(watcher, WAITING)
        second = await command_line(url, tmp_path)
        await eventually(  # it has tried to lock, and holds no snapshot for which the build would wait
            watcher, "SELECT pid FROM pg_stat_activity WHERE query = 'ROLLBACK;' AND state = 'idle'"
        )
        first.kill()
        await first.wait()
        assert await watcher.fetchval(BUILDING)  # the server goes on although its client was killed
        await eventually(watcher, "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LOCK TABLE%'")
    printed = (await asyncio.wait_for(second.communicate(), WITHIN_S))[0].decode()

    assert second.returncode == 0, printed
    assert await validity(watcher) == dict.fromkeys(INDEXES, True)


async def test_a_role_with_short_timeouts_builds_an_index_that_has_to_wait(
    url: str, watcher: asyncpg.Connection
) -> None:
    await upgrade(url, BEFORE_INDEXES)
    database = await watcher.fetchval("SELECT current_database()")
    for limit in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
        await watcher.execute(f"ALTER DATABASE {database} SET {limit} = '300ms'")
    async with old_snapshot(f"{url}?options=-c%20idle_in_transaction_session_timeout%3D0"):
        building = asyncio.create_task(upgrade(url))
        await eventually(watcher, WAITING)
        await asyncio.sleep(1)
        assert not building.done()
    await building

    assert await validity(watcher) == dict.fromkeys(INDEXES, True)


async def test_a_migration_retries_a_locked_table_and_lets_requests_through(
    url: str, watcher: asyncpg.Connection, tmp_path: Path
) -> None:
    await upgrade(url, "0001")
    other = await asyncpg.connect(url)
    holding = other.transaction()
    await holding.start()
    await other.execute("LOCK TABLE task IN ACCESS SHARE MODE")
    migrating = await command_line(url, tmp_path)
    await eventually(watcher, "SELECT pid FROM pg_locks WHERE NOT granted")

    began = time.monotonic()
    await watcher.fetchval("SELECT count(*) FROM task")
    waited = time.monotonic() - began
    assert migrating.returncode is None
    await holding.rollback()
    printed = (await asyncio.wait_for(migrating.communicate(), WITHIN_S))[0].decode()
    await other.close()

    assert waited < 1.5
    assert migrating.returncode == 0, printed
    assert "a table is locked by another session" in printed
    assert await validity(watcher) == dict.fromkeys(INDEXES, True)


async def test_a_pooler_in_transaction_mode_is_migrated_through(
    url: str, postgres: Server, watcher: asyncpg.Connection, tmp_path: Path
) -> None:
    database = await watcher.fetchval("SELECT current_database()")
    async with running_pgbouncer(postgres, database, tmp_path) as pooled:
        await upgrade(f"{pooled}?pgbouncer=true")
        left = await watcher.fetch(
            "SELECT * FROM pg_locks JOIN pg_database d ON database = d.oid "
            "WHERE locktype = 'advisory' AND datname = current_database()"
        )
        through_pooler = await asyncpg.connect(pooled, statement_cache_size=0)
        limits = [await through_pooler.fetchval(f"SHOW {name}") for name in ("lock_timeout",)]
        await through_pooler.close()

    assert left == []
    assert limits == ["0"]
    assert await validity(watcher) == dict.fromkeys(INDEXES, True)
