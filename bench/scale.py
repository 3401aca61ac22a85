"""How the service scales with rows, connections and requests: `uv run --group bench bench/scale.py`.

Measures page 1 and page 1,000 in growing tables, the cost of a request with more and more connections, the
cost of operations and the disk with 10,000 and with a million users, and the memory after many different
requests, without development packages. Prints the results and adds them to
`scale.json` beside this file. Needs wrk.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import asyncpg
import httpx

import db
from auth import tokens
from bench.hostile import varied
from bench.run import COUNT_TASKS, SECRET, SERVERS, Process, load, prepare, running, summarise
from bench.runtimes import installed
from server import startup
from tests.postgres import Server, running_server

USER = "user0001"
USERS = 500  # one per client, since one user's statements take at most a third of the connections
PAGE, PAGE_SIZE = 1_000, 10
NAME = "this service"
QUERIES = 10_000
TASKS = 20  # of a user
SAMPLE = 10_000  # users who send requests
# By default one address has 256 connections, and 200 requests wait for the database.
MANY_CONNECTIONS = {"MAX_CONNECTIONS_PER_ADDRESS": "900", "DATABASE_POOL_SIZE": "30"}


def user(number: int) -> str:
    return f"user{number:04}"


async def filled(server: Server, rows: int, users: int = 1) -> str:
    """Return the URL of a database in which *users* users have *rows* tasks in total."""
    url = server.url_of(await server.create_database())
    await asyncio.to_thread(startup.migrate, db.connect(url, pool_size=1))
    connection = await asyncpg.connect(url)
    await connection.execute(
        "INSERT INTO task (user_id, title, created_at, updated_at) "
        "SELECT 'user' || lpad((n % $1 + 1)::text, 4, '0'), 'Task number ' || n, t, t FROM "
        "(SELECT n, now() - interval '1 second' * (n * 7919 % 10000000) AS t "
        "FROM generate_series(1, $2::bigint) n) rows",
        users,
        rows,
        timeout=600,
    )
    await connection.execute(COUNT_TASKS)
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.close()
    return url


def deep_page(process: Process, token: str) -> str:
    """Walk to page 1,000 and return its path."""
    path = f"/api/{USER}/tasks?limit={PAGE_SIZE}"
    with httpx.Client(base_url=process.address, headers={"Authorization": f"Bearer {token}"}) as client:
        for _ in range(PAGE - 1):
            path = client.get(path).raise_for_status().links["next"]["url"]
    return path


def lists(server: Server, folder: Path, token_file: Path, token: str, rounds: int) -> list[dict[str, Any]]:
    """Measure page 1 and page 1,000 in tables of three sizes, interleaved."""
    sizes = [10_000, 100_000, 1_000_000]
    services = []
    paths: list[tuple[str, str]] = []
    for rows in sizes:
        manager = running([NAME], asyncio.run(filled(server, rows)), folder)
        (process,) = manager.__enter__()
        services.append((rows, process, manager))
        paths.append((f"/api/{USER}/tasks?limit={PAGE_SIZE}", deep_page(process, token)))
    results: dict[tuple[int, str], list[float]] = {}
    for _ in range(rounds):
        for (rows, process, _), (first, deep) in zip(services, paths, strict=True):
            for label, path in ((f"page 1 of {PAGE_SIZE}", first), (f"page {PAGE} of {PAGE_SIZE}", deep)):
                measured = load(process, "path", token_file, 2, 16, path)
                cost = measured["cpu_s_per_1000"] + measured["postgres_cpu_s_per_1000"]
                results.setdefault((rows, label), []).append(cost)
    for _, _, manager in services:
        manager.__exit__(None, None, None)
    return [
        {"rows": rows, "list": label, "cpu_s_per_1000": statistics.median(costs)}
        for (rows, label), costs in results.items()
    ]


def connections(process: Process, token_file: Path, rounds: int) -> list[dict[str, Any]]:
    results: dict[int, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for count in (32, 128, 512):
            results.setdefault(count, []).append(load(process, "list", token_file, 5, count))
    names = ("cpu_s_per_1000", "requests_per_s", "p50_ms", "p99_ms")
    return [
        {"connections": count, **{name: statistics.median(each[name] for each in rounds_) for name in names}}
        for count, rounds_ in results.items()
    ]


def populations(server: Server, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Measure operations of users all over the table, and what the tables take on disk."""
    found = []
    for users in (10_000, 1_000_000):
        url, loaded_s = asyncio.run(populated(server, users))
        spread = users // SAMPLE
        token_file = tokens_of(SAMPLE, folder / "spread tokens", spread)
        results: dict[str, list[dict[str, float]]] = {}
        with running([NAME], url, folder) as (process,):
            for _ in range(rounds):
                for operation in ("one", "list", "create", "complete"):
                    measured = load(process, operation, token_file, 5, 32, "", str(spread), per_user=TASKS)
                    results.setdefault(operation, []).append(measured)
        costs = {operation: summarise(each) for operation, each in results.items()}
        names = ("cpu_s_per_1000", "postgres_cpu_s_per_1000", "p99_ms")
        found.append(
            {"users": users, "tasks": users * TASKS, "loaded_s": round(loaded_s)}
            | asyncio.run(sizes(url))
            | {operation: {name: costs[operation][name] for name in names} for operation in costs}
        )
        asyncio.run(server.drop_database(url.rpartition("/")[2]))
    return found


async def populated(server: Server, users: int) -> tuple[str, float]:
    """Return the URL of a database whose *users* users have `TASKS` tasks each, and the time to fill it.

    The tasks of a user are as far apart in the table as if all users had made theirs in turn.
    """
    url = server.url_of(await server.create_database())
    await asyncio.to_thread(startup.migrate, db.connect(url, pool_size=1))
    connection = await asyncpg.connect(url, command_timeout=3600)
    started = time.monotonic()
    await connection.execute("SET maintenance_work_mem = '2GB'")
    indexes = await connection.fetch(
        "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'task' AND indexname <> 'pk_task'"
    )
    for index in indexes:
        await connection.execute(f"DROP INDEX {index['indexname']}")
    await connection.execute(
        "INSERT INTO task (id, user_id, title, description, completed, revision, created_at, updated_at) "
        "SELECT n % $1 * $2 + n / $1 + 1, 'user' || lpad(u, greatest(4, length(u)), '0'), "
        "'Task number ' || n, 'Some more about it', n / $1 % 3 = 0, n / $1 + 1, t, t FROM "
        "(SELECT n, (n % $1 + 1)::text AS u, "
        "timestamptz '2026-01-01 00:00:00.123456+00' - interval '1 second' * (n * 7919 % 10000000) AS t "
        "FROM generate_series(0, $1::bigint * $2::bigint - 1) n) rows",
        users,
        TASKS,
    )
    for index in indexes:
        await connection.execute(index["indexdef"])
    await connection.execute(
        "INSERT INTO task_owner (user_id, revision, task_count) "
        "SELECT user_id, max(revision), count(*) FROM task GROUP BY user_id"
    )
    await connection.execute(f"ALTER TABLE task ALTER COLUMN id RESTART WITH {users * TASKS + 1}")
    await connection.execute("VACUUM ANALYZE")
    await connection.close()
    return url, time.monotonic() - started


async def sizes(url: str) -> dict[str, Any]:
    """Return the size in MB of the database's tables, and of each index of the tasks."""
    connection = await asyncpg.connect(url)
    rows = await connection.fetch(
        "SELECT relname, pg_relation_size(oid) AS size FROM pg_class WHERE relkind IN ('r', 'i') "
        "AND (relname LIKE '%task%') ORDER BY size DESC"
    )
    await connection.close()
    return {"mb": {row["relname"]: round(row["size"] / 2**20, 1) for row in rows}}


def memory(process: Process, token_file: Path, requests: int) -> list[dict[str, float]]:
    """Return the resident memory in MB at the start and after each tenth of *requests* of all kinds."""
    queries = token_file.with_name("queries")
    queries.write_text("".join(f"{varied()}\n" for _ in range(QUERIES)))
    done, found = 0.0, []
    while done < requests:
        found.append({"requests": done, "resident_mb": round(process.resident_mb(), 1)})
        step = 0.0
        while step < requests / 10:
            step += load(process, "varied", token_file, 5, 32, str(queries))["requests"]
        done += step
    return [*found, {"requests": done, "resident_mb": round(process.resident_mb(), 1)}]


def tokens_of(users: int, path: Path, spread: int = 1) -> Path:
    """Write the tokens of *users* users, each *spread* after the one before."""
    numbers = range(1, users * spread + 1, spread)
    path.write_text("".join(f"{tokens.issue(user(number), SECRET, 86_400)}\n" for number in numbers))
    return path


PARTS = ("lists", "connections", "populations", "memory")


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1_000_000, help="for the memory")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    options = parser.parse_args()
    path = HERE / "scale.json"
    results: dict[str, Any] = json.loads(path.read_text())
    today = datetime.now(UTC).date().isoformat()
    results["dates"] |= dict.fromkeys(options.parts, today)
    with running_server() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "lists" in options.parts:
            token_file = tokens_of(1, folder / "token")
            token = token_file.read_text().strip()
            results["lists"] = lists(server, folder, token_file, token, options.rounds)
        token_file = tokens_of(USERS, folder / "tokens")
        command, settings = SERVERS[NAME]
        if "connections" in options.parts:
            SERVERS[NAME] = (command, settings | MANY_CONNECTIONS)
            with running([NAME], asyncio.run(filled(server, 20 * USERS, USERS)), folder) as (process,):
                results["connections"] = connections(process, token_file, options.rounds)
        if "populations" in options.parts:
            SERVERS[NAME] = (command, settings)
            results["populations"] = populations(server, folder, options.rounds)
        if "memory" in options.parts:
            python = installed(sys.executable, folder / "environment") / "python"
            SERVERS[NAME] = ([str(python), "main.py"], settings)
            with running([NAME], asyncio.run(prepare(server, USERS)), folder) as (process,):
                results["memory"] = memory(process, token_file, options.requests)
    print(json.dumps(results, indent=2))
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main_()
