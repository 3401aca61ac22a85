import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx
import pytest

from main import create_app
from tests.conftest import Person, person, running, settings_for
from tests.pgbouncer import running_pgbouncer
from tests.postgres import Server
from tests.postgres_proxy import Proxy, running_proxy

CLIENTS = 20

pytestmark = pytest.mark.usefixtures("without_background_statements")


@dataclass
class Pooled:
    """The app with a pooler in transaction mode, and a proxy that records what it sends to the pooler."""

    client: httpx.AsyncClient
    proxy: Proxy
    direct_url: str


@pytest.fixture(scope="module")
async def pooled(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pooled]:
    name = await postgres.create_database()
    folder: Path = tmp_path_factory.mktemp("pgbouncer")
    async with running_pgbouncer(postgres, name, folder) as url, running_proxy(url) as proxy:
        app = create_app(settings_for(f"{proxy.url}?pgbouncer=true"))
        async with running(app) as client:
            yield Pooled(client, proxy, postgres.url_of(name))
    await postgres.drop_database(name)


async def _lifecycle(someone: Person) -> None:
    task = await someone.create()
    path = f"/{task['id']}"
    answers = [
        await someone.get(path),
        await someone.get("?count=true&sort=title"),
        await someone.put(path, json={"title": "Buy oat milk"}),
        await someone.patch(f"{path}/complete"),
        await someone.patch(f"{path}/complete", json={"completed": False}),
        await someone.get(),
        await someone.delete(path),
    ]
    assert [answer.status_code for answer in answers] == [200] * 6 + [204]


async def test_many_clients_share_few_server_connections(pooled: Pooled) -> None:
    people = [person("alice", pooled.client) for _ in range(CLIENTS)]

    await asyncio.gather(*(_lifecycle(someone) for someone in people for _ in range(5)))


async def test_no_prepared_statement_is_left_on_pooled_connections(pooled: Pooled) -> None:
    await _lifecycle(person("alice", pooled.client))

    through_pooler = await asyncpg.connect(pooled.proxy.url, statement_cache_size=0)
    names = await through_pooler.fetch("SELECT name FROM pg_prepared_statements WHERE name <> ''")
    await through_pooler.close()

    assert names == []


async def _transactions(someone: Person) -> None:
    """Send requests that take several statements; each response shows whether all of them ran."""
    first, again = [
        await someone.post(json={"title": "Buy milk"}, headers={"Idempotency-Key": "once"}) for _ in range(2)
    ]
    assert first.json() == again.json()
    assert again.headers["Idempotent-Replayed"] == "true"

    task = await someone.create("Water the plants", recurring="weekly", due_date="2026-06-01", tags=["home"])
    assert (await someone.patch(f"/{task['id']}/complete")).is_success
    due = [task["due_date"] for task in (await someone.get("?sort=due_date&tags=home")).json()]
    assert due == ["2026-06-01", "2026-06-08"]

    operations = [
        {"op": "update", "id": task["id"], "changes": {"tags": ["home", "plants"]}},
        {"op": "create", "task": {"title": "Bake bread", "tags": ["home"]}},
        {"op": "delete", "id": first.json()["id"]},
    ]
    results = (await someone.post("/bulk", json={"operations": operations})).json()["results"]
    assert [result["status"] for result in results] == [200, 201, 204]
    refused = await someone.post("/bulk", json={"operations": operations})  # the last task no longer exists
    assert refused.status_code == 404
    assert (await someone.patch("?status=pending", json={"completed": True})).json() == {"count": 2}
    assert len((await someone.get()).json()) == 4


STATES = (
    "SELECT DISTINCT state FROM pg_stat_activity WHERE datname = current_database() "
    "AND pid <> pg_backend_pid()"
)


async def test_transactions_leave_no_lock_or_statement_on_pooled_connections(pooled: Pooled) -> None:
    pooled.proxy.clear()

    await asyncio.gather(*(_transactions(person("alice", pooled.client)) for _ in range(CLIENTS)))

    direct = await asyncpg.connect(pooled.direct_url)
    async with asyncio.timeout(5):
        while [tuple(row) for row in await direct.fetch(STATES)] != [("idle",)]:
            await direct.execute("SELECT pg_sleep(0.01)")  # a sweep may be running
    locks = await direct.fetch(
        "SELECT * FROM pg_locks JOIN pg_database ON database = pg_database.oid "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    await direct.close()
    through_pooler = await asyncpg.connect(pooled.proxy.url, statement_cache_size=0)
    names = await through_pooler.fetch("SELECT name FROM pg_prepared_statements WHERE name <> ''")
    await through_pooler.close()

    assert locks == names == []
    assert [statement for statement in pooled.proxy.statements if "set_config" in statement] == []


async def test_a_request_is_one_round_trip(pooled: Pooled) -> None:
    alice = person("alice", pooled.client)
    for _ in range(12):  # each connection of the pool prepares the statements once
        await asyncio.gather(*(_lifecycle(alice) for _ in range(10)))
    pooled.proxy.clear()

    for _ in range(5):
        await _lifecycle(alice)

    assert pooled.proxy.round_trips == len(pooled.proxy.statements) == 5 * 8
