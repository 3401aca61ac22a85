"""Starts with a blocked or unresponsive database: the port opens, and a signal stops the service."""

import asyncio
import contextlib
import socket
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import asyncpg
import httpx
import pytest
from alembic import command
from sqlalchemy import text

import db
from auth import tokens
from main import create_app
from server.startup import migrate
from tests.conftest import SECRET, running, settings_for
from tests.postgres import Process, free_port, running_process
from tests.service import Service, running_service
from tests.test_migrations import _alembic

pytestmark = pytest.mark.process

MIGRATION_LOCK = 7_240_115_033
GRACE_S = 2
STOPPED_WITHIN_S = GRACE_S + 1.5
# On an idle machine the port opens 2.5 s after the start; waiting for a connection would take a minute.
CONNECT_TIMEOUT_S = 60
STARTED_WITHIN_S = 20  # more than SQLite's `start_wait_s`


def settings_of(url: str, *, migrates: bool = True) -> dict[str, str]:
    return {
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "DATABASE_CONNECT_TIMEOUT_S": str(CONNECT_TIMEOUT_S),
        "MIGRATE_ON_START": str(migrates).lower(),
        "SHUTDOWN_GRACE_S": str(GRACE_S),
    }


@contextlib.contextmanager
def starting(folder: Path, settings: dict[str, str]) -> Iterator[tuple[Service, str]]:
    port = free_port()
    with running_service(folder, PORT=str(port), **settings) as service:
        yield service, f"http://127.0.0.1:{port}"


async def open_port(service: Service, address: str) -> None:
    async with asyncio.timeout(STARTED_WITHIN_S):
        await asyncio.to_thread(service.wait_for, address)


async def assert_stops(service: Service) -> None:
    began = time.monotonic()

    assert await asyncio.to_thread(service.stop) == 0

    assert time.monotonic() - began < STOPPED_WITHIN_S
    assert "Traceback" not in service.logged


async def is_ready(address: str) -> bool:
    async with httpx.AsyncClient(timeout=10) as client:
        return (await client.get(f"{address}/health/ready")).status_code == 200


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(STARTED_WITHIN_S):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.05)


async def logged(service: Service, sentence: str) -> None:
    async def is_logged() -> bool:
        return sentence in service.logged

    await eventually(is_logged)


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that accepts database connections and never responds."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        yield f"postgresql://nobody@127.0.0.1:{listening.getsockname()[1]}/nowhere?sslmode=disable"


async def test_the_service_starts_and_stops_while_its_migration_is_blocked(
    empty_postgres_url: str, tmp_path: Path
) -> None:
    other = await asyncpg.connect(empty_postgres_url)
    await other.execute(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
    with starting(tmp_path, settings_of(empty_postgres_url)) as (service, address):
        await open_port(service, address)
        assert not await is_ready(address)
        await logged(service, "cannot be migrated yet")

        await assert_stops(service)
    await other.close()


async def test_a_blocked_migration_runs_once_the_other_session_ends(
    empty_postgres_url: str, tmp_path: Path
) -> None:
    other = await asyncpg.connect(empty_postgres_url)
    await other.execute(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
    with starting(tmp_path, settings_of(empty_postgres_url)) as (service, address):
        await open_port(service, address)
        await logged(service, "cannot be migrated yet")

        await other.close()

        await eventually(partial(is_ready, address))
        await assert_stops(service)


@pytest.mark.parametrize("migrates", [True, False])
async def test_the_service_starts_and_stops_while_its_database_never_answers(
    black_hole: str, tmp_path: Path, migrates: bool
) -> None:
    with starting(tmp_path, settings_of(black_hole, migrates=migrates)) as (service, address):
        await open_port(service, address)
        assert not await is_ready(address)

        await assert_stops(service)


@pytest.mark.parametrize("migrates", [True, False])
async def test_the_service_stops_while_its_startup_waits_for_the_database(
    black_hole: str, tmp_path: Path, migrates: bool
) -> None:
    with starting(tmp_path, settings_of(black_hole, migrates=migrates)) as (service, _):
        await logged(service, "Waiting for application startup")

        await assert_stops(service)


async def test_a_migration_stopped_midway_leaves_each_revision_applied_or_not(
    empty_postgres_url: str, tmp_path: Path
) -> None:
    await asyncio.to_thread(command.upgrade, _alembic(db.connect(empty_postgres_url, pool_size=1)), "0001")
    other = await asyncpg.connect(empty_postgres_url)
    holding = other.transaction()
    await holding.start()
    await other.execute("LOCK TABLE task IN ACCESS SHARE MODE")  # revision 0002 passes, 0003 has to wait
    with starting(tmp_path, settings_of(empty_postgres_url)) as (service, address):
        await open_port(service, address)
        await eventually(partial(other.fetchval, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))

        await assert_stops(service)

    assert await other.fetchval("SELECT version_num FROM task_schema_version") == "0002"
    assert await other.fetchval("SELECT to_regclass('local_account')") == "local_account"
    assert await other.fetchval("SELECT to_regclass('idempotency_key')") is None
    await holding.rollback()
    await asyncio.to_thread(migrate, db.connect(empty_postgres_url, pool_size=1))
    assert await other.fetchval("SELECT to_regclass('idempotency_key')") == "idempotency_key"
    await other.close()


@pytest.fixture(scope="module")
def own_process() -> Iterator[Process]:
    with running_process() as process:
        yield process


async def test_the_service_stops_when_the_database_freezes_during_a_migration(
    own_process: Process, tmp_path: Path
) -> None:
    other = await asyncpg.connect(own_process.url)
    await other.execute(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
    with starting(tmp_path, settings_of(own_process.url)) as (service, address):
        await open_port(service, address)
        own_process.freeze()

        try:
            await assert_stops(service)
        finally:
            own_process.thaw()
    await other.close()


@pytest.mark.parametrize("migrated", [True, False])
async def test_the_service_starts_and_stops_while_its_sqlite_file_is_locked(
    tmp_path: Path, migrated: bool
) -> None:
    path = tmp_path / "tasks.db"
    if migrated:
        await asyncio.to_thread(migrate, db.connect(f"sqlite:///{path}", pool_size=1))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with starting(tmp_path, settings_of(f"sqlite:///{path}")) as (service, address):
            await open_port(service, address)
            headers = {"Authorization": f"Bearer {tokens.issue('alice', SECRET, 3600)}"}
            async with httpx.AsyncClient(base_url=address, headers=headers, timeout=15) as client:
                assert (await client.get("/health/ready")).status_code in ((200, 503) if migrated else (503,))
                assert (await client.post("/api/alice/tasks", json={"title": "Buy milk"})).status_code == 503

            await assert_stops(service)


async def test_a_locked_sqlite_file_is_served_once_the_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")  # not in WAL mode yet, in which it could be read meanwhile
        with starting(tmp_path, settings_of(f"sqlite:///{path}")) as (service, address):
            await open_port(service, address)
            assert not await is_ready(address)

            other.execute("COMMIT")

            await eventually(partial(is_ready, address))
            await assert_stops(service)


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])  # the latter keeps it from being opened
async def test_the_service_stops_while_its_startup_waits_for_a_locked_sqlite_file(
    tmp_path: Path, lock: str
) -> None:
    path = tmp_path / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(f"PRAGMA journal_mode = {'WAL' if lock == 'IMMEDIATE' else 'DELETE'}")
        other.execute(f"BEGIN {lock}")
        with starting(tmp_path, settings_of(f"sqlite:///{path}")) as (service, _):
            await logged(service, "Waiting for application startup")

            await assert_stops(service)


async def test_a_start_on_sqlite_waits_for_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "tasks.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode = WAL")
        other.execute("BEGIN IMMEDIATE")
        with starting(tmp_path, settings_of(f"sqlite:///{path}")) as (service, address):
            await logged(service, "Waiting for application startup")
            asyncio.get_running_loop().call_later(2.0, other.execute, "COMMIT")  # PostgreSQL gets 1.5 s

            await open_port(service, address)

            assert await is_ready(address)
            await assert_stops(service)


async def test_a_signal_before_the_server_listens_for_signals_is_not_lost(tmp_path: Path) -> None:
    code = (
        "import main, os, signal\nfrom server import run\n"
        "run.inherited_sockets = lambda: os.kill(os.getpid(), signal.SIGTERM)\n"  # runs before serving
        "main.main([])"
    )
    with running_service(tmp_path, "-c", code, PORT=str(free_port())) as service:
        assert await asyncio.to_thread(service.process.wait, STARTED_WITHIN_S) == 0


@pytest.mark.parametrize("newer", [False, True], ids=["now", "by a newer release"])
async def test_a_migrated_database_is_served_without_alembic(
    url: str, monkeypatch: pytest.MonkeyPatch, newer: bool
) -> None:
    if newer:
        engine = db.connect(url, pool_size=1).engine()
        async with engine.begin() as connection:
            await connection.execute(text("UPDATE task_schema_version SET version_num = '9999'"))
        await engine.dispose()
    monkeypatch.setitem(sys.modules, "alembic", None)  # importing it fails

    async with running(create_app(settings_for(url))) as client:
        assert (await client.get("/health/ready")).status_code == 200
