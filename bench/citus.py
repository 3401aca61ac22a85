"""What Citus costs: `TEST_CITUS_URL=… uv run bench/citus.py`. Prints a table.

Needs a cluster on this machine, because /proc tells the CPU time of its processes. The service's own
functions run in turns on the distributed database and on a plain one beside it, on the coordinator's server.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import asyncpg

import db
from bench.run import TICKS
from queries import lists, tasks
from queries.owner import Owner
from schemas import Filter, Order, TaskCreate
from server import startup
from tests.citus import Cluster
from tests.guides import execute

USERS, TASKS_PER_USER = 200, 50
CLIENTS = 8
NEW = TaskCreate(title="Buy milk", description="Two litres", tags=["home"]).model_dump()
PLAIN = "tasks_plain"
# ms of CPU for one operation and their ratios; how many ms a client alone waits for it
COLUMNS = ("", "plain", "coordinator", "workers", "all : plain", "coordinator : plain", "alone", "on Citus")


class Subject:
    """A database with tasks, and the processes of its servers."""

    def __init__(self, url: str, postmasters: Sequence[int]) -> None:
        self.database = db.connect(url, pool_size=CLIENTS)
        self.postmasters = postmasters
        self.owners = [Owner(f"user{number}", self.database) for number in range(USERS)]
        self.ids: dict[str, int] = {}

    async def fill(self) -> None:
        for owner in self.owners:
            for _ in range(TASKS_PER_USER):
                self.ids[owner.user_id] = (await tasks.create_task(owner, NEW))["id"]

    async def get(self, owner: Owner, _: int) -> None:
        await tasks.get_task(owner, self.ids[owner.user_id])

    async def list_20(self, owner: Owner, _: int) -> None:
        await lists.list_tasks(owner, Filter(), Order(), 21)

    async def create(self, owner: Owner, _: int) -> None:
        await tasks.create_task(owner, NEW)

    async def update(self, owner: Owner, number: int) -> None:
        await tasks.update_task(owner, self.ids[owner.user_id], {"title": f"Buy milk {number}"})

    async def complete(self, owner: Owner, _: int) -> None:
        await tasks.toggle_task(owner, self.ids[owner.user_id])

    async def run(self, operation: str, clients: int, seconds: float) -> tuple[int, float, list[float]]:
        """Return how often *operation* was done, the mean time of one in ms, and each server's CPU in s."""
        do: Callable[[Owner, int], Awaitable[None]] = getattr(self, operation)
        before, start = [*map(cpu_s, self.postmasters)], time.perf_counter()

        async def client(first: int) -> int:
            number = first
            while time.perf_counter() - start < seconds:
                await do(self.owners[number % USERS], number)
                number += clients
            return (number - first) // clients

        count = sum(await asyncio.gather(*map(client, range(clients))))
        took = time.perf_counter() - start
        spent = [after - cpu for after, cpu in zip(map(cpu_s, self.postmasters), before, strict=True)]
        return count, took * clients / count * 1000, spent


def cpu_s(postmaster: int) -> float:
    """Return the CPU time of a server: its processes, and those that have ended."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid, fields = int(folder.name), fields_of(int(folder.name))
            if pid == postmaster:
                total += sum(map(int, fields[11:15]))
            elif int(fields[1]) == postmaster:
                total += sum(map(int, fields[11:13]))
    return total / TICKS


async def postmaster_of(url: str) -> int:
    connection = await asyncpg.connect(url)
    backend = await connection.fetchval("SELECT pg_backend_pid()")
    parent = fields_of(backend)[1]
    await connection.close()
    return int(parent)


def fields_of(pid: int) -> list[str]:
    """Return what /proc tells of a process, from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


async def compare(plain: Subject, citus: Subject, operation: str, rounds: int, seconds: float) -> None:
    cpu: list[list[float]] = [[], [], []]  # of the plain database, the coordinator and the workers
    alone: dict[Subject, list[float]] = {plain: [], citus: []}
    for subject in (plain, citus):
        await subject.run(operation, CLIENTS, seconds)  # every connection prepares the statement
    for _ in range(rounds):
        count, _, (spent,) = await plain.run(operation, CLIENTS, seconds)
        cpu[0].append(spent / count * 1000)
        count, _, (coordinator, *workers) = await citus.run(operation, CLIENTS, seconds)
        cpu[1].append(coordinator / count * 1000)
        cpu[2].append(sum(workers) / count * 1000)
        for subject, times in alone.items():
            times.append((await subject.run(operation, 1, seconds / 2))[1])
    one, coordinator, workers = map(statistics.median, cpu)
    ratios = f"{(coordinator + workers) / one:.1f} | {coordinator / one:.1f}"
    times = " | ".join(f"{statistics.median(each):.2f}" for each in alone.values())
    print(f"| {operation} | {one:.3f} | {coordinator:.3f} | {workers:.3f} | {ratios} | {times} |", flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    cluster = Cluster.at(os.environ["TEST_CITUS_URL"])
    await cluster.make_database()
    server = cluster.servers[0]
    await execute(server, f"DROP DATABASE IF EXISTS {PLAIN} WITH (FORCE)")
    await execute(server, f"CREATE DATABASE {PLAIN}")
    url = server.removesuffix("/postgres") + f"/{PLAIN}"
    await asyncio.to_thread(startup.migrate, db.connect(url, pool_size=1))
    postmasters = [await postmaster_of(each) for each in cluster.servers]
    plain = Subject(url, postmasters[:1])
    citus = Subject(cluster.url_as("tasks_service"), postmasters)
    subjects: Any = (plain, citus)
    for subject, place in zip(subjects, (url, cluster.url), strict=True):
        await subject.fill()
        connection = await asyncpg.connect(place)
        await connection.execute("ANALYZE")
        await connection.close()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for operation in ("get", "list_20", "create", "update", "complete"):
        await compare(plain, citus, operation, options.rounds, options.seconds)
    for subject in subjects:
        await subject.database.close()
    await execute(server, f"DROP DATABASE {PLAIN} WITH (FORCE)")


if __name__ == "__main__":
    asyncio.run(main())
