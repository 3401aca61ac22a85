import asyncio
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.script import ScriptDirectory
from fastapi import FastAPI

import db
from errors import Unavailable
from main import create_app
from server import readiness
from server.readiness import AWAY, OUTDATED, Readiness, outdated_revisions
from server.startup import migrate
from tests.conftest import Log, person, running, settings_for
from tests.postgres import Server, own_server
from tests.test_errors import assert_problem
from tests.test_migrations import _alembic

ANSWERED_WITHIN_S = 2.0


def unmigrated(url: str) -> FastAPI:
    return create_app(settings_for(url, migrate_on_start=False))


async def run(url: str, sql: str) -> None:
    engine = db.connect(url, pool_size=1).engine()
    async with engine.begin() as connection:
        await connection.exec_driver_sql(sql)
    await engine.dispose()


async def ready(client: httpx.AsyncClient) -> httpx.Response:
    began = time.perf_counter()
    answer = await client.get("/health/ready")
    assert time.perf_counter() - began < ANSWERED_WITHIN_S
    assert (await client.get("/health")).status_code == 200
    return answer


def assert_hindered(answer: httpx.Response, sentence: str) -> None:
    assert_problem(answer, 503, "Service Unavailable", sentence)
    assert int(answer.headers["retry-after"]) > 0


async def test_a_migrated_database_is_ready(client: httpx.AsyncClient) -> None:
    answer = await ready(client)

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_an_empty_database_is_not_ready_until_it_is_migrated(empty_url: str) -> None:
    async with running(unmigrated(empty_url)) as client:
        assert_hindered(await ready(client), OUTDATED)

        await asyncio.to_thread(migrate, db.connect(empty_url, pool_size=1))

        assert (await ready(client)).status_code == 200
        assert (await person("alice", client).post(json={"title": "Buy milk"})).status_code == 201


async def test_a_schema_that_is_behind_is_not_ready(empty_url: str) -> None:
    database = db.connect(empty_url, pool_size=1)
    for revision, downgrade in (("0001", False), ("base", True)):
        step = command.downgrade if downgrade else command.upgrade
        await asyncio.to_thread(step, _alembic(database), revision)
        async with running(unmigrated(empty_url)) as client:
            assert_hindered(await ready(client), OUTDATED)


async def test_a_schema_that_is_ahead_is_ready(url: str) -> None:
    await run(url, "UPDATE task_schema_version SET version_num = '9999'")

    async with running(unmigrated(url)) as client:
        assert (await ready(client)).status_code == 200


async def test_without_a_schema_requests_are_503_and_the_start_logs_why(
    empty_url: str,
    log: Log,
) -> None:
    async with running(unmigrated(empty_url)) as client:
        answer = await person("alice", client).get()

    assert_problem(answer, 503, "Service Unavailable", Unavailable.sentence)
    assert [line["reason"] for line in log.events("not ready")] == [OUTDATED]
    assert log.events("crash") == []


async def test_a_stopped_database_is_not_ready(tmp_path: Path) -> None:
    with own_server() as server:
        url = server.url_of(await server.create_database())
        app = create_app(settings_for(url))
        lifespan = app.router.lifespan_context(app)
        await lifespan.__aenter__()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as client:
        assert_hindered(await ready(client), AWAY)
    await lifespan.__aexit__(None, None, None)


async def test_a_frozen_database_is_not_ready_until_it_resumes() -> None:
    with own_server() as server:
        async with running(create_app(settings_for(server.url, database_pool_size=2))) as client:
            assert (await ready(client)).status_code == 200
            processes = _processes_of(server)
            try:
                _signal(processes, signal.SIGSTOP)
                for answer in await asyncio.gather(*(ready(client) for _ in range(5))):
                    assert_hindered(answer, AWAY)
                assert_hindered(await ready(client), AWAY)
            finally:
                _signal(processes, signal.SIGCONT)
            async with asyncio.timeout(10):
                while (await ready(client)).status_code != 200:
                    pass


def _processes_of(server: Server) -> list[str]:
    """Return the ids of the server and all its children."""
    port = server.url.rpartition("/")[0].rpartition(":")[2]
    listed = subprocess.check_output(["ps", "-ww", "-eo", "pid,ppid,args"], text=True).splitlines()
    rows = [line.split(None, 2) for line in listed]
    (parent,) = [pid for pid, _, command in rows if f"-p {port}" in command]
    return [parent, *(pid for pid, parent_id, _ in rows if parent_id == parent)]


def _signal(processes: list[str], number: int) -> None:
    for process in processes:
        subprocess.run(["kill", f"-{number}", process], check=False)


async def test_concurrent_readiness_probes_share_one_statement(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings_for(database_url))
    statements: list[Any] = []
    run_all = app.state.services.database.all

    async def counted(statement: Any, **values: Any) -> Any:
        statements.append(statement)
        return await run_all(statement, **values)

    async with running(app) as client:
        monkeypatch.setattr(app.state.services.database, "all", counted)
        answers = await asyncio.gather(*(client.get("/health/ready") for _ in range(50)))

    assert {answer.status_code for answer in answers} == {200}
    assert len(statements) == 1


async def test_a_cancelled_readiness_probe_does_not_cancel_another(database_url: str) -> None:
    database = db.connect(database_url, pool_size=1)
    await database.open()
    asked = Readiness(database)
    hasty, patient = [asyncio.create_task(asked.not_ready_reason()) for _ in range(2)]
    await asyncio.sleep(0)
    hasty.cancel()

    assert await patient in (None, OUTDATED)
    await database.close()


def test_the_outdated_revisions_are_those_of_alembic() -> None:
    script = ScriptDirectory(str(readiness.VERSIONS.parent))
    known = {revision.revision for revision in script.walk_revisions()}

    assert len(known) >= 3
    assert outdated_revisions(readiness.VERSIONS) == known - set(script.get_heads())
