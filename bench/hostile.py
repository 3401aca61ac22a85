"""How much one user can slow down the others: `uv run --group bench bench/hostile.py`.

Memory: how much the service and each PostgreSQL backend grow after 2,000 different list queries. Searches:
the status and latency of another user's reads while one user sends as many expensive searches as the rate
limit admits, on both databases, directly and with the settings for a pooler.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import quantiles
from typing import Any
from urllib.parse import urlencode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import asyncpg
import httpx

from auth import tokens
from bench.run import SECRET
from tests.postgres import Server, free_port, running_server
from tests.service import Service, running_service

TASKS = 10_000
WORDS = [
    "task",
    "number",
    "some",
    "more",
    "about",
    "water",
    "milk",
    "bread",
    "call",
    "write",
    "om",
    "a",
    "b",
    "c",
]
SORTS = ("created_at", "updated_at", "title", "priority", "due_date")


def varied() -> str:
    """Return a random list query: any filters, up to eight words, any order."""
    pick = random.Random(random.getrandbits(64))
    query: list[tuple[str, Any]] = [
        ("status", pick.choice(("all", "pending", "completed"))),
        ("sort", pick.choice(("", "-")) + pick.choice(SORTS)),
        ("limit", pick.randint(1, 50)),
        ("count", pick.choice(("true", "false"))),
    ]
    if words := pick.randint(0, 8):
        query.append(("search", " ".join(pick.sample(WORDS, words))))
    for name, values in {
        "priority": ("high", "none"),
        "category": ("home", "work"),
        "tags": ("a", "b"),
    }.items():
        query += [(name, value) for value in values if pick.random() < 0.3]
    query += [(name, "2027-01-01") for name in ("due_date_from", "due_date_to") if pick.random() < 0.3]
    return urlencode(query)


class Client:
    def __init__(self, port: int, user: str) -> None:
        token = tokens.issue(user, SECRET, 86_400)
        self.tasks = f"http://127.0.0.1:{port}/api/{user}/tasks"
        self._client = httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}, timeout=30)

    async def get(self, query: str) -> int:
        return (await self._client.get(f"{self.tasks}?{query}")).status_code

    async def fill(self) -> None:
        text = "task number some more about water milk bread call write " * 16
        one = {"op": "create", "task": {"title": text[:190], "description": text[:950]}}
        for _ in range(TASKS // 50):
            answer = await self._client.post(f"{self.tasks}/bulk", json={"operations": [one] * 50})
            answer.raise_for_status()


def resident_mb(pid: int) -> float:
    """Return the memory of a process; for a PostgreSQL backend, its unshared memory only."""
    fields = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return (
        sum(int(fields.partition(f"{name}:")[2].split()[0]) for name in ("Private_Dirty", "Private_Clean"))
        / 1024
    )


async def backends(url: str) -> list[int]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()
    return [row["pid"] for row in rows]


async def memory(port: int, url: str | None, service: Service, lists: int) -> dict[str, float]:
    client = Client(port, "alice")
    for _ in range(50):
        await client.get("limit=10")
    before = resident_mb(service.process.pid)
    earlier = {pid: resident_mb(pid) for pid in await backends(url)} if url else {}
    for _ in range(lists // 10):
        statuses = await asyncio.gather(*(client.get(varied()) for _ in range(10)))
        assert set(statuses) == {200}, statuses
    grown = (
        [resident_mb(pid) - earlier[pid] for pid in await backends(url) if pid in earlier] if url else [0.0]
    )
    return {
        "service_grew_mb": round(resident_mb(service.process.pid) - before, 1),
        "backends_grew_mb_max": round(max(grown), 1),
    }


async def neighbours(port: int, seconds: float) -> dict[str, Any]:
    attacker, reader = Client(port, "mallory"), Client(port, "bob")
    await attacker.fill()
    await reader.get("limit=20")
    attacked: Counter[int] = Counter()
    answered: Counter[int] = Counter()
    times_s: list[float] = []
    attacks = set()

    async def attack() -> None:
        attacked[await attacker.get("search=t+a+s+k+n+u+m+%21")] += 1

    ends = time.monotonic() + seconds
    while time.monotonic() < ends:  # ten per second, the default rate limit
        attacks.add(asyncio.create_task(attack()))
        for _ in range(2):
            began = time.monotonic()
            answered[await reader.get("limit=20")] += 1
            times_s.append(time.monotonic() - began)
            await asyncio.sleep(0.05)
    await asyncio.gather(*attacks)
    return {
        "attacker": dict(attacked),
        "reader": dict(answered),
        "p50_ms": round(quantiles(times_s, n=100)[49] * 1000, 1),
        "p95_ms": round(quantiles(times_s, n=100)[94] * 1000, 1),
    }


def measure(name: str, server: Server | None, options: argparse.Namespace, suffix: str = "") -> None:
    port = free_port()
    settings = {"BETTER_AUTH_SECRET": SECRET, "PORT": str(port), "ACCESS_LOG": "false", "RATE_LIMIT": "off"}
    url = None
    if server:
        url = server.url_of(asyncio.run(server.create_database()))
        settings |= {"DATABASE_URL": url + suffix, "MIGRATE_ON_START": "true"}
    with tempfile.TemporaryDirectory() as folder, running_service(Path(folder), **settings) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        found = asyncio.run(memory(port, url, service, options.lists))
        found |= asyncio.run(neighbours(port, options.seconds))
    print(json.dumps({"database": name, **found}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=int, default=2_000)
    parser.add_argument("--seconds", type=float, default=15)
    options = parser.parse_args()
    measure("SQLite", None, options)
    with running_server() as server:
        measure("PostgreSQL", server, options)
        measure("PostgreSQL, pgbouncer=true", server, options, "?pgbouncer=true")


if __name__ == "__main__":
    main()
