import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from sqlmodel import SQLModel

import db
from config import Settings
from main import create_app
from queries.purge import Purge
from server.heads import HEAD_MAX_BYTES
from server.startup import migrate
from tests.conftest import SECRET, Person, person, running, settings_for
from tests.guides import DEPLOY, block, execute, url_as
from tests.postgres import Server, free_port, own_server
from tests.service import PROJECT, running_service
from tests.test_migrations import BETTER_AUTH_TABLES, OUR_TABLES

PASSWORD = "correct horse battery"


@pytest.fixture(scope="module")
async def url() -> AsyncIterator[str]:
    """A database set up as in the guide, beside Better Auth's tables."""
    with own_server() as server:
        await server.execute("CREATE DATABASE tasks")
        url = server.url_of("tasks")
        for table in BETTER_AUTH_TABLES:
            await execute(url, f'CREATE TABLE "{table}" (id TEXT PRIMARY KEY)')
        await execute(url, block("before migrating"))
        migration = url_as("tasks_migration", url)
        await asyncio.to_thread(migrate, db.connect(migration, pool_size=1))
        await execute(migration, block("after migrating"))
        yield url


async def every_operation(client: httpx.AsyncClient, alice: Person) -> set[tuple[str, str]]:
    """Send one request to every operation and return the operations by route."""
    done: set[tuple[str, str]] = set()

    async def send(method: str, path: str, route: str, **options: Any) -> Any:
        answer = await alice.send(method, path, **options)
        assert answer.is_success, answer.text
        done.add((method, route))
        return answer.json() if answer.content else None

    tasks, one = "/api/{user_id}/tasks", "/api/{user_id}/tasks/{task_id}"
    task = await send("POST", "", tasks, json={"title": "Buy milk", "tags": ["a"]})
    for _ in range(2):
        await send("POST", "", tasks, json={"title": "Once"}, headers={"Idempotency-Key": "a"})
    series = {"title": "Water", "due_date": "2026-11-21", "recurring": "daily"}
    again = await send("POST", "", tasks, json=series)
    await send("PATCH", f"/{again['id']}/complete", f"{one}/complete", json={"completed": True})
    await send("PATCH", f"/{task['id']}/complete", f"{one}/complete")
    await send("GET", f"/{task['id']}", one)
    await send("PUT", f"/{task['id']}", one, json={"title": "Buy bread"})
    await send("PATCH", f"/{task['id']}", one, json={"priority": "high"})
    await send("GET", "?search=bread&count=true&sort=due_date", tasks)
    await send("GET", "/stats", f"{tasks}/stats")
    await send("GET", "/changes", f"{tasks}/changes")
    assert (await alice.send("HEAD", "/events")).is_success  # a GET would not end
    done.add(("GET", f"{tasks}/events"))
    operations = [
        {"op": "create", "task": {"title": "Bulk"}},
        {"op": "update", "id": task["id"], "changes": {"title": "Buy both"}},
        {"op": "delete", "id": again["id"]},
    ]
    await send("POST", "/bulk", f"{tasks}/bulk", json={"operations": operations})
    await send("PATCH", "?status=pending", tasks, json={"completed": True})
    await send("DELETE", f"/{task['id']}", one)
    await send("GET", "/trash", f"{tasks}/trash")
    await send("POST", f"/{task['id']}/restore", f"{one}/restore")
    await send("DELETE", "?status=completed", tasks)
    await send("POST", "/restore", f"{tasks}/restore", json={"ids": [task["id"]]})
    await send("DELETE", f"/{task['id']}", one)
    await send("DELETE", f"/trash/{task['id']}", f"{tasks}/trash/{{task_id}}")
    await send("DELETE", "/trash", f"{tasks}/trash")

    account = {"email": f"{alice.user_id}@example.com", "password": PASSWORD}
    auth = "/api/auth"
    created = await send(
        "POST", f"{auth}/sign-up/email", f"{auth}/sign-up/email", json=account | {"name": "A"}
    )
    await send("POST", f"{auth}/sign-in/email", f"{auth}/sign-in/email", json=account)
    bearer = {"Authorization": f"Bearer {created['token']}"}
    await send("GET", f"{auth}/token", f"{auth}/token", headers=bearer)
    await send("GET", f"{auth}/get-session", f"{auth}/get-session", headers=bearer)
    await send("POST", f"{auth}/sign-out", f"{auth}/sign-out", headers=bearer)
    form = {"grant_type": "password", "username": account["email"], "password": PASSWORD}
    granted = await client.post(f"{auth}/token", data=form)
    assert granted.is_success
    bearer = {"Authorization": f"Bearer {granted.json()['access_token']}"}
    await send("POST", f"{auth}/revoke-sessions", f"{auth}/revoke-sessions", headers=bearer)
    for path in ("/health", "/health/ready"):
        assert (await client.get(path)).status_code == 200
    return done | {("POST", f"{auth}/token"), ("GET", "/health"), ("GET", "/health/ready")}


async def test_the_services_role_can_do_every_operation(url: str) -> None:
    settings = settings_for(url_as("tasks_service", url), migrate_on_start=False, local_accounts=True)
    app = create_app(settings)
    async with running(app) as client:
        done = await every_operation(client, person("alice", client))
        await Purge(app.state.services.database, trash_days=0, sync_days=0).once()

    documented = app.openapi()["paths"].items()
    assert done == {(method.upper(), path) for path, methods in documented for method in methods}


async def test_the_services_role_can_do_nothing_else(url: str) -> None:
    service = url_as("tasks_service", url)
    forbidden = [
        "CREATE TABLE more (id int)",
        "UPDATE task_schema_version SET version_num = '9999'",
        "UPDATE local_account SET password_hash = ''",
        "DELETE FROM local_account",
        "UPDATE idempotency_key SET answer = ''",
        *(f"DROP TABLE {table}" for table in OUR_TABLES),
        *(f"ALTER TABLE {table} ADD COLUMN more int" for table in OUR_TABLES),
        *(f"TRUNCATE {table}" for table in OUR_TABLES),
        *(f'SELECT * FROM "{table}"' for table in BETTER_AUTH_TABLES),
        *(f'DELETE FROM "{table}"' for table in BETTER_AUTH_TABLES),
    ]
    for statement in forbidden:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await execute(service, statement)


async def test_the_migrations_role_cannot_read_other_tables_either(url: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await execute(url_as("tasks_migration", url), 'SELECT * FROM "user"')


async def test_the_service_role_has_a_statement_timeout(url: str) -> None:
    connection = await asyncpg.connect(url_as("tasks_service", url))
    assert await connection.fetchval("SHOW statement_timeout") == "5s"
    await connection.close()


async def test_a_missing_grant_is_503(url: str) -> None:
    migration = url_as("tasks_migration", url)
    await execute(migration, "REVOKE SELECT ON task FROM tasks_service")
    async with running(
        create_app(settings_for(url_as("tasks_service", url), migrate_on_start=False))
    ) as client:
        answer = await person("alice", client).get()
    await execute(migration, block("after migrating"))

    assert answer.status_code == 503


async def test_every_operation_works_with_the_primary_key_for_citus(postgres: Server) -> None:
    (key,) = re.findall(r"^ALTER TABLE task .+;$", block("distributing"), re.MULTILINE)
    async with postgres.migrated_database() as url:
        await execute(url, key)

        async with running(create_app(settings_for(url, local_accounts=True))) as client:
            await every_operation(client, person("alice", client))


def test_the_systemd_unit_reloads_by_sighup() -> None:
    assert of_the_unit("ExecReload") == ["/bin/kill", "-HUP", "$MAINPID"]


def of_the_unit(name: str) -> list[str]:
    """Return the words of *name* in the guide's systemd unit, with the paths of this checkout."""
    (unit,) = re.findall(r"^```ini\n(\[Unit\]\n.*?)^```", DEPLOY, re.MULTILINE | re.DOTALL)
    (value,) = re.findall(rf"^{name}=(.*)$", unit, re.MULTILINE)
    programs = str(Path(sys.executable).parent)  # from the same virtual environment
    here = value.replace("/opt/tasks/.venv/bin", programs).replace("/opt/tasks", str(PROJECT))
    return str(here).split()


@pytest.mark.process
async def test_the_systemd_unit_serves_and_stops_as_the_guide_says(url: str, tmp_path: Path) -> None:
    settings = dict(word.split("=") for word in of_the_unit("Environment"))
    settings |= {
        "DATABASE_URL": url_as("tasks_service", url),
        "BETTER_AUTH_SECRET": SECRET,
        "METRICS_PORT": str(free_port()),
        "SHUTDOWN_GRACE_S": "1",
    }
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    _, *command = of_the_unit("ExecStart")
    with running_service(tmp_path, *command, PORT=str(port), **settings) as service:
        await asyncio.to_thread(service.wait_for, address)
        async with httpx.AsyncClient(base_url=address) as client:
            created = await person("alice", client).post(json={"title": "Buy milk"})
            too_large = await client.get("/health", headers={"X-Large": "x" * HEAD_MAX_BYTES})
            metrics = await client.get(f"http://127.0.0.1:{settings['METRICS_PORT']}/metrics")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        await writer.drain()

        async with asyncio.timeout(4):  # that client stalls; the default grace is 10 s
            code = await asyncio.to_thread(service.stop)

        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    assert [answer.status_code for answer in (created, too_large, metrics)] == [201, 431, 200]
    assert "server" not in created.headers.keys() | too_large.headers.keys()
    assert code == 0


def test_the_systemd_unit_raises_limitnofile() -> None:
    usual = 1024  # systemd's default

    assert int(*of_the_unit("LimitNOFILE")) > usual


def test_the_systemd_unit_wants_and_awaits_network_online() -> None:
    assert "network-online.target" in of_the_unit("After")  # After alone does not start the target
    assert of_the_unit("Wants") == ["network-online.target"]


def test_every_table_with_rows_of_users_is_distributed() -> None:
    distributed = re.findall(r"create_distributed_table\('(\w+)', 'user_id'", block("distributing"))
    emptied = re.findall(r"truncate_local_data_after_distributing_table\('(\w+)'", block("distributing"))

    of_users = {name for name, table in SQLModel.metadata.tables.items() if "user_id" in table.c}
    assert set(distributed) == set(emptied) == of_users == set(OUR_TABLES) - {"local_account"}


def test_compose_passes_every_setting_on() -> None:
    environment = (
        (PROJECT / "compose.yaml").read_text().partition("environment:\n")[2].partition("ports:\n")[0]
    )
    of_the_container = {"DATABASE_URL", "MIGRATE_ON_START", "ENVIRONMENT", "HOST", "PORT", "DATA_DIR"}

    passed_on = set(re.findall(r"^ +([A-Z_]+):$", environment, re.MULTILINE))
    assert passed_on == {name.upper() for name in Settings.model_fields} - of_the_container


def test_the_image_has_every_package(tmp_path: Path) -> None:
    allowed = set((PROJECT / ".dockerignore").read_text().splitlines())
    for source in re.findall(r"^COPY (?!--)(.+) \S+$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE):
        for name in source.split():
            assert f"!{name}" in allowed
            for path in PROJECT.glob(name):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, tmp_path / path.name)

    command = [sys.executable, "main.py", "openapi"]
    document = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert document == (PROJECT / "openapi.json").read_text()
