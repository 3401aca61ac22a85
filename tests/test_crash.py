import asyncio
import contextlib
import itertools
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

import db
from auth import tokens
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import STOP_TIMEOUT_S, UNMEASURED, Service, running_service

# Other tests cover these lines; coverage would only slow the load.
pytestmark = [pytest.mark.no_cover, pytest.mark.process]

KILLS = 4
CLIENTS = 8
FEWEST, MOST = 50, 250  # responses before a kill
ANSWER_S = 0.01  # about the duration of one request, so that the kill falls at any point of one
ROUND_TIMEOUT_S = 60  # a killed service closes its connections at once; a hanging one fails the test


async def test_a_killed_service_leaves_a_task_and_its_key_or_neither(url: str, tmp_path: Path) -> None:
    """A client that retries unanswered requests gets each task exactly once."""
    port, dice = free_port(), random.Random(7)
    address = f"http://127.0.0.1:{port}"
    settings = {"PORT": str(port), "DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off"}
    settings |= UNMEASURED
    sent: set[str] = set()
    answered: set[str] = set()
    for number in range(KILLS):
        before, enough = len(answered), dice.randint(FEWEST, MOST)
        acknowledged = asyncio.Semaphore(0)
        with running_service(tmp_path, MIGRATE_ON_START="true", **settings) as service:
            await asyncio.to_thread(service.wait_for, address)
            async with asyncio.timeout(ROUND_TIMEOUT_S), asyncio.TaskGroup() as group:
                group.create_task(_kill(service, acknowledged, enough, dice.uniform(0, ANSWER_S)))
                for writer in range(CLIENTS):
                    group.create_task(_write(address, f"{number}-{writer}", sent, answered, acknowledged))

        titles, keys = await _rows(url)
        assert len(answered) - before >= enough
        assert titles == keys
        assert answered <= set(keys) <= sent

    with running_service(tmp_path, **settings) as service:
        await asyncio.to_thread(service.wait_for, address)
        async with _client(address) as client:
            for key in sorted(sent):
                assert await _post(client, key) == 201

    titles, keys = await _rows(url)
    assert titles == keys == sorted(sent)


async def _kill(service: Service, acknowledged: asyncio.Semaphore, enough: int, later_s: float) -> None:
    for _ in range(enough):
        await acknowledged.acquire()
    await asyncio.sleep(later_s)
    service.process.kill()
    assert await asyncio.to_thread(service.process.wait, STOP_TIMEOUT_S) == -signal.SIGKILL


def _client(address: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {tokens.issue('alice', SECRET, 3600)}"}
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=ROUND_TIMEOUT_S)


async def _write(
    address: str, name: str, sent: set[str], answered: set[str], acknowledged: asyncio.Semaphore
) -> None:
    """Create tasks until the service is killed."""
    async with _client(address) as client:
        with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):
            for number in itertools.count():
                key = f"{name}-{number}"
                sent.add(key)
                assert await _post(client, key) == 201
                answered.add(key)
                acknowledged.release()


async def _post(client: httpx.AsyncClient, key: str) -> int:
    answer = await client.post("/api/alice/tasks", json={"title": key}, headers={"Idempotency-Key": key})
    assert answer.json()["title"] == key
    return answer.status_code


async def _rows(url: str) -> tuple[list[str], list[str]]:
    """Return the titles of all tasks and all keys, with duplicates."""
    # One statement, hence one snapshot: the server may still be committing a killed client's transaction.
    both = "SELECT title, true FROM task UNION ALL SELECT key, false FROM idempotency_key ORDER BY 1"
    engine = db.connect(url, pool_size=1).engine()
    async with engine.begin() as connection:
        rows: list[Any] = list(await connection.exec_driver_sql(both))
    await engine.dispose()
    return [name for name, is_task in rows if is_task], [name for name, is_task in rows if not is_task]
