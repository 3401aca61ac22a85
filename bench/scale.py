"""How the service scales with rows, connections and requests: `uv run --group bench bench/scale.py`.

Measures page 1 and page 1,000 in growing tables, the cost of a request with more and more connections, and
the memory after many different requests, without development packages. Prints the results and adds them to
`scale.json` beside this file. Needs wrk.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
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
from bench.run import COUNT_TASKS, SECRET, SERVERS, Process, load, prepare, running
from bench.runtimes import installed
from server import startup
from tests.postgres import Server, running_server

USER = "user0001"
USERS = 500  # one per client, since one user's statements take at most a third of the connections
PAGE, PAGE_SIZE = 1_000, 10
NAME = "this service"
QUERIES = 10_000
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


def tokens_of(users: int, path: Path) -> Path:
    path.write_text("".join(f"{tokens.issue(user(n), SECRET, 86_400)}\n" for n in range(1, users + 1)))
    return path


PARTS = ("lists", "connections", "memory")


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=1_000_000, help="for the memory")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    options = parser.parse_args()
    path = HERE / "scale.json"
    results: dict[str, Any] = json.loads(path.read_text()) | {
        "date": datetime.now(UTC).date().isoformat(),
        "command": "uv run --group bench bench/scale.py",
    }
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
        if "memory" in options.parts:
            python = installed(sys.executable, folder / "environment") / "python"
            SERVERS[NAME] = ([str(python), "main.py"], settings)
            with running([NAME], asyncio.run(prepare(server, USERS)), folder) as (process,):
                results["memory"] = memory(process, token_file, options.requests)
    print(json.dumps(results, indent=2))
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main_()
