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


@dataclass
class Pooled:
    """The app behind a pooler in transaction mode, and what it sends to that pooler."""

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


async def test_nothing_is_left_on_the_servers_connections(pooled: Pooled) -> None:
    await _lifecycle(person("alice", pooled.client))

    through_pooler = await asyncpg.connect(pooled.proxy.url, statement_cache_size=0)
    names = await through_pooler.fetch("SELECT name FROM pg_prepared_statements WHERE name <> ''")
    await through_pooler.close()

    assert names == []


async def test_a_request_is_one_round_trip(pooled: Pooled) -> None:
    alice = person("alice", pooled.client)
    for _ in range(12):  # every connection of the pool learns the statements once
        await asyncio.gather(*(_lifecycle(alice) for _ in range(10)))
    pooled.proxy.clear()

    for _ in range(5):
        await _lifecycle(alice)

    assert pooled.proxy.round_trips == len(pooled.proxy.statements) == 5 * 8
