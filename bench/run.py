"""Compare this service with a lower bound and with a typical back end: `uv run --group bench bench/run.py`.

Needs wrk (Debian: apt-get install wrk); without npm it leaves Fastify out. Starts and seeds its own
PostgreSQL, runs each server on one core and the load on the other in interleaved rounds, and writes
`results.json` and `results.svg` beside this file. Fails if the servers do not give the same answers.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import asyncpg
import httpx

import db
from auth import tokens
from server import startup
from tests.postgres import Server, free_port, running_server

SECRET = "a-secret-for-the-benchmark-only-00001"
USERS, TASKS_PER_USER = 1_000, 1_000
LABELS = {
    "one": "GET one",
    "list": "GET list of 20",
    "list200": "GET list of 200",
    "known": "GET list of 20, 304",  # if a server has an ETag for it; the others answer in full
    "create": "POST",
    "complete": "PATCH complete",
}
BARE = {"ACCESS_LOG": "false", "RATE_LIMIT": "off", "METRICS": "false"}
MAIN = [sys.executable, "main.py"]
UVICORN = [sys.executable, "-m", "uvicorn", "--no-access-log"]
FASTIFY = HERE / "fastify"
SERVERS: dict[str, tuple[list[str], dict[str, str]]] = {
    "floor": ([*UVICORN, "bench.floor:app"], {}),
    "floor with remembered tokens": ([*UVICORN, "bench.floor:app"], {"REMEMBER_TOKENS": "true"}),
    "this service": (MAIN, BARE),
    "this service, default": (MAIN, {"ENVIRONMENT": "production"}),
    "this service, SQLite": (MAIN, BARE),
    "Fastify": (["node", str(FASTIFY / "server.mjs")], {"NODE_ENV": "production"}),
    "the usual back end": ([*UVICORN, "bench.usual:app"], {}),
}
MADE = ("id", "completed_at", "created_at", "updated_at")  # a server chooses their values
SEEDED_AT = "2026-01-01 00:00:00.123456+00"
COUNT_TASKS = (
    "INSERT INTO task_owner (user_id, task_count) SELECT user_id, count(*) FROM task GROUP BY user_id"
)
TICKS = os.sysconf("SC_CLK_TCK")


class Process:
    """A server pinned to the first core; /proc tells the CPU time and memory of it and its children."""

    def __init__(self, name: str, database_url: str, folder: Path) -> None:
        self.name, self.port = name, free_port()
        command, settings = SERVERS[name]
        environment = (
            os.environ
            | settings
            | {
                "DATABASE_URL": database_url,
                "BETTER_AUTH_SECRET": SECRET,
                "DATA_DIR": str(folder),
            }
        )
        environment |= dict.fromkeys(("PORT", "UVICORN_PORT", "GRANIAN_PORT"), str(self.port))
        self.log_path = folder / f"{self.port}.log"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                ["taskset", "-c", "0", *command], cwd=HERE.parent, env=environment, stdout=log, stderr=log
            )
        self.address = f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.address}/health").raise_for_status()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} did not start")

    def log(self) -> str:
        return self.log_path.read_text()[-3000:]

    def get(self, query: str, token: str, tag: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} | ({"If-None-Match": tag} if tag else {})
        return httpx.get(f"{self.address}/api/user0001/tasks{query}", headers=headers)

    def cpu_s(self) -> float:
        return sum(map(cpu_s, self._pids()))

    def peak_mb(self) -> float:
        return self._memory_mb("VmHWM")

    def resident_mb(self) -> float:
        return self._memory_mb("VmRSS")

    def _memory_mb(self, name: str) -> float:
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in self._pids()]
        return sum(int(status.partition(f"{name}:")[2].split()[0]) for status in statuses) / 1024

    def _pids(self) -> list[int]:
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def postgres_cpu_s() -> float:
    """Return the CPU seconds of all PostgreSQL processes of this run."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            if "(postgres)" in text:
                total += cpu_s(int(text.split()[0]))
    return total


async def seed(url: str, users: int) -> None:
    database = db.connect(url, pool_size=1)
    await asyncio.to_thread(startup.migrate, database)
    connection = await asyncpg.connect(url)
    await connection.execute(
        "INSERT INTO task (id, user_id, title, description, completed, created_at, updated_at) "
        "SELECT n, 'user' || lpad(((n - 1) / $1 + 1)::text, 4, '0'), 'Task number ' || n, "
        "'Some more about it', n % 3 = 0, t, t FROM "
        f"(SELECT n, timestamptz '{SEEDED_AT}' - interval '1 second' * (n * 7919 % 10000000) AS t "
        "FROM generate_series(1, $1::bigint * $2::bigint) n) rows",
        TASKS_PER_USER,
        users,
        timeout=600,
    )
    await connection.execute(COUNT_TASKS)
    await connection.execute(f"ALTER TABLE task ALTER COLUMN id RESTART WITH {users * TASKS_PER_USER + 1}")
    await connection.execute("VACUUM ANALYZE", timeout=600)
    await connection.close()


def seed_sqlite(path: Path, users: int) -> str:
    """Create the same rows in a SQLite file and return its URL."""
    url = f"sqlite:///{path}"
    startup.migrate(db.connect(url, pool_size=1))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < :users * :each) "
            "INSERT INTO task (id, user_id, title, description, completed, created_at, updated_at) "
            "SELECT n, printf('user%04d', (n - 1) / :each + 1), 'Task number ' || n, 'Some more about it', "
            "n % 3 = 0, t, t FROM (SELECT n, strftime('%Y-%m-%d %H:%M:%S', :at, "
            "printf('-%d seconds', n * 7919 % 10000000)) || substr(:at, 20, 7) AS t FROM n)",
            {"users": users, "each": TASKS_PER_USER, "at": SEEDED_AT.removesuffix("+00")},
        )
    return url


@contextlib.contextmanager
def running(names: list[str], url: str, folder: Path, sqlite_url: str = "") -> Iterator[list[Process]]:
    processes = [Process(name, sqlite_url if "SQLite" in name else url, folder) for name in names]
    try:
        for process in processes:
            process.wait()
        yield processes
    finally:
        for process in processes:
            process.process.terminate()
            process.process.wait()


def check_answers(processes: list[Process], token: str) -> None:
    """Fail unless all servers give the same answers, but for the ids and times that they make."""
    queries = ("/7", "?limit=20", "?limit=200")
    _assert_equal(
        processes, [[_answer(process.get(query, token)) for query in queries] for process in processes]
    )
    _assert_equal(processes, [_written(process, token) for process in processes])
    for process in processes:
        tag = tag_of(process.get("?limit=20", token))
        answer = process.get("?limit=20", token, tag)
        if (answer.status_code, len(answer.content) == 0) != ((304, True) if tag else (200, False)):
            raise RuntimeError(f"{process.name}: {answer.status_code} for the tag {tag!r}")


def tag_of(answer: httpx.Response) -> str:
    return answer.headers.get("etag", "")


def _written(process: Process, token: str) -> list[Any]:
    url, headers = f"{process.address}/api/user0001/tasks", {"Authorization": f"Bearer {token}"}
    body = {"title": "Buy milk", "description": "Two bottles of it"}
    created = httpx.post(url, json=body, headers=headers)
    completed = httpx.patch(f"{url}/{created.json()['id']}/complete", headers=headers)
    return [_answer(answer, MADE) for answer in (created, completed)]


def _answer(answer: httpx.Response, made: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Return the status, the media type and the rows, with the types of what the server has *made*."""
    content = answer.json()
    rows = [
        {name: type(value) if name in made else _instant(name, value) for name, value in row.items()}
        for row in (content if isinstance(content, list) else [content])
    ]
    return answer.status_code, answer.headers["content-type"].partition(";")[0], rows


def _instant(name: str, value: Any) -> Any:
    return datetime.fromisoformat(value) if name.endswith("_at") and value else value


def _assert_equal(processes: list[Process], answers: list[Any]) -> None:
    for process, answer in zip(processes, answers, strict=True):
        if answer != answers[0]:
            differing = next(pair for pair in zip(answers[0], answer, strict=True) if pair[0] != pair[1])
            raise RuntimeError(f"{processes[0].name}, {process.name}: {differing} {process.log()}")


def write_tags(process: Process, token_file: Path) -> Path:
    """Write the present entity tag of each user's list into a file, an empty line if there is none."""
    with httpx.Client(base_url=process.address) as client:
        tags = [
            tag_of(
                client.get(
                    f"/api/user{number:04}/tasks?limit=20", headers={"Authorization": f"Bearer {token}"}
                )
            )
            for number, token in enumerate(token_file.read_text().splitlines(), 1)
        ]
    path = token_file.with_name("tags")
    path.write_text("".join(f"{tag}\n" for tag in tags))
    return path


def load(
    process: Process,
    operation: str,
    token_file: Path,
    seconds: int,
    connections: int,
    *path: str,
    per_user: int = TASKS_PER_USER,
) -> dict[str, float]:
    command = [
        "taskset",
        "-c",
        "1",
        "wrk",
        "-t1",
        f"-c{connections}",
        f"-d{seconds}s",
        "--timeout=10s",
        "-s",
        HERE / "requests.lua",
    ]
    if operation == "known":
        path = (str(write_tags(process, token_file)),)
    command += [process.address, "--", operation, token_file, str(per_user), *path]
    before, before_postgres = process.cpu_s(), postgres_cpu_s()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{process.name}, {operation}: {done.stderr} {process.log()}")
    output = done.stdout
    result = json.loads(next(line for line in output.splitlines() if line.startswith("RESULT"))[7:])
    if result["errors"]:
        raise RuntimeError(f"{process.name}, {operation}: {output}")
    thousands = result["requests"] / 1000
    return {
        "cpu_s_per_1000": (process.cpu_s() - before) / thousands,
        "postgres_cpu_s_per_1000": (postgres_cpu_s() - before_postgres) / thousands,
        "requests": result["requests"],
        "requests_per_s": result["requests"] / result["seconds"],
        "p50_ms": result["p50_ms"],
        "p99_ms": result["p99_ms"],
    }


def summarise(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def report(results: dict[str, Any]) -> None:
    """Print all figures, and README's table."""
    for operation in results["operations"]:
        print(f"\n{LABELS[operation]}")
        print(f"{'':29}{'CPU s/1000':>11}{'of first':>10}{'range':>12}", end="")
        print(f"{'req/s':>9}{'p50 ms':>8}{'p99 ms':>8}{'PG CPU':>8}")
        for name, by_operation in results["servers"].items():
            row = by_operation[operation]
            shares = "{:.0%}-{:.0%}".format(*row["of_floor_range"])
            print(
                f"{name:29}{row['cpu_s_per_1000']:11.3f}{row['of_floor']:10.0%}{shares:>12}"
                f"{row['requests_per_s']:9.0f}{row['p50_ms']:8.1f}{row['p99_ms']:8.1f}{row['postgres_cpu_s_per_1000']:8.3f}"
            )
    print("\npeak memory, MB:", results["peak_mb"])
    print("\n| |", *(f"{LABELS[operation]} |" for operation in results["operations"]))
    print("|---" * (len(results["operations"]) + 1) + "|")
    for name, by_operation in results["servers"].items():
        cells = (
            f"{row['of_floor']:.0%} · {row['cpu_s_per_1000']:.2f} s · {row['p99_ms']:.0f} ms |"
            for row in by_operation.values()
        )
        print(f"| {name} |", *cells)


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "bench"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4))
    names = [name for name in results["servers"] if name != "floor"]
    operations = results["operations"]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        shares = [results["servers"][name][operation]["of_floor"] * 100 for operation in operations]
        bars = axes.bar([x + place * width for x in range(len(operations))], shares, width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.axhline(100, color="black", linewidth=0.8)
    middle = 0.4 - width / 2
    axes.set_xticks([x + middle for x in range(len(operations))], [LABELS[o] for o in operations], fontsize=8)
    axes.set_ylabel("% of the floor's speed per CPU second")
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def install_fastify() -> bool:
    """Install Fastify if necessary, and return whether it can run."""
    if not shutil.which("npm"):
        print("Fastify is left out: Node.js with npm is not installed", file=sys.stderr)
        return False
    if not (FASTIFY / "node_modules").exists():
        command = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
        subprocess.run(command, cwd=FASTIFY, check=True, stdout=sys.stderr)
    return True


async def prepare(server: Server, users: int) -> str:
    url = server.url_of(await server.create_database())
    await seed(url, users)
    return url


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--users", type=int, default=USERS, help="each with 1,000 tasks")
    return parser


def measure(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the servers *names*, also as shares of the first one's."""
    if not shutil.which("wrk"):
        raise SystemExit("wrk is not installed (Debian: apt-get install wrk)")
    with running_server() as server, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = asyncio.run(prepare(server, options.users))
        made = [tokens.issue(f"user{n:04}", SECRET, 86_400) for n in range(1, options.users + 1)]
        token_file = folder / "tokens"
        token_file.write_text("\n".join(made) + "\n")
        sqlite_url = seed_sqlite(folder / "tasks.db", options.users)
        with running(names, url, folder, sqlite_url) as processes:
            check_answers(processes, made[0])
            has_tags = any(tag_of(process.get("?limit=20", made[0])) for process in processes)
            operations = [operation for operation in LABELS if operation != "known" or has_tags]
            measured: dict[str, dict[str, list[dict[str, float]]]] = {
                name: {operation: [] for operation in operations} for name in names
            }
            for number in range(options.rounds + 1):
                for operation in operations:
                    for process in processes:
                        seconds = options.seconds if number else 1  # the first round is the warm-up
                        result = load(process, operation, token_file, seconds, options.connections)
                        if number:
                            measured[process.name][operation].append(result)
                print(f"round {number} of {options.rounds}", file=sys.stderr)
            results: dict[str, Any] = {
                "date": datetime.now(UTC).date().isoformat(),
                "command": "uv run --group bench bench/run.py",
                "python": platform.python_version(),
                "tasks": options.users * TASKS_PER_USER,
                "connections": options.connections,
                "operations": operations,
                "peak_mb": {process.name: round(process.peak_mb()) for process in processes},
                "servers": {
                    name: {operation: summarise(rounds) for operation, rounds in by_operation.items()}
                    for name, by_operation in measured.items()
                },
            }
    for name, by_operation in results["servers"].items():
        for operation, row in by_operation.items():
            first = results["servers"][names[0]][operation]["cpu_s_per_1000"]
            row["of_floor"] = first / row["cpu_s_per_1000"]
            pairs = zip(measured[names[0]][operation], measured[name][operation], strict=True)
            shares = [first["cpu_s_per_1000"] / each["cpu_s_per_1000"] for first, each in pairs]
            row["of_floor_range"] = [min(shares), max(shares)]
    return results


def main_() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--servers", nargs="*", default=list(SERVERS), choices=list(SERVERS))
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    names = [name for name in options.servers if name != "Fastify" or install_fastify()]
    results = measure(names, options)
    report(results)
    if not options.no_write:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        draw(results, HERE / "results.svg")


if __name__ == "__main__":
    main_()
