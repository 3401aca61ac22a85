"""Event streams and concurrent writers: `uv run --group bench bench/live.py`. Prints a table for each.

Starts its own PostgreSQL, the service on one core and the clients on the other.
"""

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx

import db
from auth import tokens
from bench.run import MAIN, SECRET, SERVERS, Process, postgres_cpu_s, running
from server import startup
from tests.postgres import running_server

PER_USER = 10
IDLE_S = 20.0
WRITES = 2_000
MANY = {"MAX_CONNECTIONS": "6000", "MAX_CONNECTIONS_PER_ADDRESS": "6000", "MAX_TASKS_PER_USER": "0"}
SERVERS["live"] = (MAIN, {"ENVIRONMENT": "production", "RATE_LIMIT": "off", **MANY})


def token(user_id: str) -> str:
    return tokens.issue(user_id, SECRET, 3600)


def head(method: str, path: str, user_id: str) -> str:
    bearer = f"Authorization: Bearer {token(user_id)}"
    return f"{method} /api/{user_id}/tasks{path} HTTP/1.1\r\nHost: x\r\n{bearer}\r\n"


async def open_stream(port: int, user_id: str) -> asyncio.StreamReader:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
    writer.write(f"{head('GET', '/events', user_id)}\r\n".encode())
    await reader.readuntil(b"event: ready")
    reader.writer = writer  # type: ignore[attr-defined] # keeps the connection open
    return reader


async def streams(process: Process, count: int) -> None:
    users = [f"user{number}" for number in range(count // PER_USER)]
    await _create_each(process, users[:1])  # warm
    before = process.resident_mb()
    readers = []
    for user_id in users:
        readers += await asyncio.gather(*(open_stream(process.port, user_id) for _ in range(PER_USER)))
    memory_kb = (process.resident_mb() - before) * 1024 / len(readers)
    await asyncio.sleep(2)  # the first look at each user
    idle_s, postgres_s = process.cpu_s(), postgres_cpu_s()
    await asyncio.sleep(IDLE_S)
    idle_s, postgres_s = process.cpu_s() - idle_s, postgres_cpu_s() - postgres_s

    began, cpu_s = time.perf_counter(), process.cpu_s()
    arriving = [asyncio.create_task(reader.readuntil(b"event: changed")) for reader in readers]
    await _create_each(process, users)
    sent_s = time.perf_counter() - began
    await asyncio.gather(*arriving)
    all_s = time.perf_counter() - began
    print("| streams | KB each | CPU while idle | PostgreSQL | last event after last write | CPU per event |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {len(readers):,} | {memory_kb:.1f} | {idle_s / IDLE_S:.1%} | {postgres_s / IDLE_S:.1%} "
        f"| {1000 * (all_s - sent_s):.0f} ms | {1e6 * (process.cpu_s() - cpu_s) / len(readers):.0f} µs |"
    )


async def _create_each(process: Process, users: list[str]) -> None:
    async with httpx.AsyncClient(base_url=process.address) as client:
        for user_id in users:
            await _create(client, user_id)


async def _create(client: httpx.AsyncClient, user_id: str) -> None:
    headers = {"Authorization": f"Bearer {token(user_id)}"}
    answer = await client.post(f"/api/{user_id}/tasks", json={"title": "Buy milk"}, headers=headers)
    assert answer.status_code == 201, answer.text


async def writers(process: Process, users: list[str]) -> tuple[float, float, float]:
    """Return the seconds, and the CPU seconds of service and PostgreSQL, of `WRITES` by 100 at once."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=process.address, limits=limits, timeout=60) as client:
        began, cpu_s, postgres_s = time.perf_counter(), process.cpu_s(), postgres_cpu_s()
        turns = [iter(range(WRITES // 100)) for _ in range(100)]

        async def write(number: int) -> None:
            for _ in turns[number]:
                await _create(client, users[number % len(users)])

        await asyncio.gather(*map(write, range(100)))
        return time.perf_counter() - began, process.cpu_s() - cpu_s, postgres_cpu_s() - postgres_s


async def main(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (8192, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        await asyncio.to_thread(startup.migrate, db.connect(server.url, pool_size=1))
        with running(["live"], server.url, Path(folder)) as (process,):
            await streams(process, count)
            print("\n| 100 writers | writes/s | service, ms of CPU | PostgreSQL |\n|---|---|---|---|")
            one, many = ["alice"], [f"writer{number}" for number in range(100)]
            for name, users in (("of one user", one), ("of 100 users", many)) * 3:
                took_s, cpu_s, postgres_s = await writers(process, users)
                each = 1000 / WRITES
                print(f"| {name} | {WRITES / took_s:.0f} | {cpu_s * each:.3f} | {postgres_s * each:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=2_000)
    asyncio.run(main(parser.parse_args().streams))
