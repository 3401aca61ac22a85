import asyncio
import contextlib
import random
import time
from pathlib import Path
from typing import Any

import httpx

import db
import tokens
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import Service, running_service

KILLS = 3
CLIENTS = 8


async def test_a_killed_service_leaves_a_task_and_its_key_or_neither(url: str, tmp_path: Path) -> None:
    """Whoever sends again what was not answered has each task once."""
    port, dice = free_port(), random.Random(7)
    address = f"http://127.0.0.1:{port}"
    settings = {"PORT": str(port), "DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off"}
    sent: set[str] = set()
    answered: set[str] = set()
    for number in range(KILLS):
        with running_service(tmp_path, MIGRATE_ON_START="true", **settings) as service:
            await asyncio.to_thread(service.wait_for, address)
            kill = asyncio.to_thread(_kill, service, dice.uniform(0.5, 2.0))
            writers = (_write(address, f"{number}-{client}", sent, answered) for client in range(CLIENTS))
            await asyncio.gather(kill, *writers)

        titles, keys = await _rows(url)
        assert titles == keys
        assert answered <= set(keys) <= sent

    with running_service(tmp_path, **settings) as service:
        await asyncio.to_thread(service.wait_for, address)
        async with _client(address) as client:
            for key in sent:
                assert await _post(client, key) == 201

    titles, keys = await _rows(url)
    assert len(sent) > KILLS
    assert titles == keys == sorted(sent)


def _kill(service: Service, after_s: float) -> None:
    time.sleep(after_s)
    service.process.kill()
    service.process.wait()


def _client(address: str) -> httpx.AsyncClient:
    token = tokens.issue("alice", SECRET, 3600)
    return httpx.AsyncClient(base_url=address, headers={"Authorization": f"Bearer {token}"})


async def _write(address: str, name: str, sent: set[str], answered: set[str]) -> None:
    """Create tasks until the service is gone."""
    async with _client(address) as client:
        with contextlib.suppress(httpx.TransportError):
            for number in range(100_000):
                key = f"{name}-{number}"
                sent.add(key)
                assert await _post(client, key) == 201
                answered.add(key)


async def _post(client: httpx.AsyncClient, key: str) -> int:
    answer = await client.post("/api/alice/tasks", json={"title": key}, headers={"Idempotency-Key": key})
    assert answer.json()["title"] == key
    return answer.status_code


async def _rows(url: str) -> tuple[list[str], list[str]]:
    """Return the titles of all tasks and all keys, each as often as it is there."""
    # One statement: a server that has not noticed yet that the service is gone may still be committing.
    both = "SELECT title, true FROM task UNION ALL SELECT key, false FROM idempotency_key ORDER BY 1"
    engine = db.connect(url, pool_size=1).engine()
    async with engine.begin() as connection:
        rows: list[Any] = list(await connection.exec_driver_sql(both))
    await engine.dispose()
    return [name for name, is_task in rows if is_task], [name for name, is_task in rows if not is_task]
