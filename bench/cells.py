"""What the proxies of `docs/cells.md` cost: `uv run --group bench bench/cells.py`.

One service on PostgreSQL, asked for one task directly and through HAProxy and nginx, in turn: latency with
one connection, CPU per 1,000 requests with 16, and the size of maps with many users. Needs wrk, haproxy and
nginx.
"""

import contextlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import httpx

from auth import tokens
from bench.run import SECRET, cpu_s
from tests.postgres import free_port, running_process
from tests.proxies import PROXIES, Proxy, running_proxy
from tests.service import running_service

ROUNDS = 5
SECONDS = 2
MANY = 1_000_000


def processes_of(pid: int) -> list[int]:
    """Return *pid* and its children: a proxy has workers."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def cpu_of(pid: int) -> float:
    return sum(map(cpu_s, processes_of(pid)))


def memory_mb(pid: int) -> float:
    """Return the memory of *pid* and its children; pages that they share count in part."""
    texts = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in processes_of(pid)]
    return sum(int(text.partition("\nPss:")[2].split()[0]) for text in texts) / 1024


def load(address: str, token: str, path: str, connections: int) -> dict[str, float]:
    script = Path(tempfile.gettempdir()) / f"cells-{secrets.token_hex(4)}.lua"
    script.write_text(
        f'wrk.headers["Authorization"] = "Bearer {token}"\n'
        "function done(summary, latency) io.write(string.format("
        '\'RESULT {"requests": %d, "p50_ms": %f, "p99_ms": %f, "errors": %d}\\n\', summary.requests, '
        "latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, summary.errors.status)) end\n"
    )
    command = ["wrk", "-t1", f"-c{connections}", f"-d{SECONDS}s", "-s", str(script), f"{address}{path}"]
    output = subprocess.check_output(command, text=True)
    script.unlink()
    found: dict[str, float] = json.loads(output.partition("RESULT ")[2])
    assert not found["errors"], found
    return found


@contextlib.contextmanager
def proxies(folder: Path, port: int, users: dict[str, str]) -> Iterator[list[Proxy]]:
    with contextlib.ExitStack() as ends:
        found = []
        for kind in PROXIES:
            (folder / kind.name).mkdir()
            found.append(ends.enter_context(running_proxy(kind, folder / kind.name, [[port] * 2] * 2, users)))
        yield found


def cost(folder: Path) -> dict[str, dict[str, float]]:
    """Return the medians of latency and of CPU seconds, by way."""
    port = free_port()
    settings = {"BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off", "RATE_LIMIT_ANONYMOUS": "off"}
    settings |= {"MIGRATE_ON_START": "true", "TRUSTED_PROXIES": "127.0.0.1", "ENVIRONMENT": "production"}
    settings |= {"LOCAL_ACCOUNTS": "false", "LOG_LEVEL": "warning", "PORT": str(port)}
    with running_process() as database:
        service = running_service(folder, DATABASE_URL=database.url, **settings)
        with service as running, proxies(folder, port, {"alice": "two"}) as between:
            direct = f"http://127.0.0.1:{port}"
            running.wait_for(direct)
            token = tokens.issue("alice", SECRET, 3600)
            made = httpx.post(
                f"{direct}/api/alice/tasks",
                json={"title": "Buy milk"},
                headers={"Authorization": f"Bearer {token}"},
            )
            path = made.headers["location"]
            ways = {"direct": (direct, None)} | {each.name: (each.address, each.pid) for each in between}
            results: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
            for _ in range(ROUNDS):
                for way, (address, pid) in ways.items():
                    alone = load(address, token, path, 1)
                    results[way]["p50_ms"].append(alone["p50_ms"])
                    results[way]["p99_ms"].append(alone["p99_ms"])
                    before = cpu_s(running.process.pid), cpu_of(pid) if pid else 0.0
                    requests = load(address, token, path, 16)["requests"] / 1000
                    after = cpu_s(running.process.pid), cpu_of(pid) if pid else 0.0
                    results[way]["service CPU s"].append((after[0] - before[0]) / requests)
                    results[way]["proxy CPU s"].append((after[1] - before[1]) / requests)
    return {
        way: {name: round(statistics.median(values), 3) for name, values in found.items()}
        for way, found in results.items()
    }


def size(folder: Path) -> dict[str, dict[str, float]]:
    """Return seconds until a proxy serves and its memory, with `MANY` users in its map."""
    users = {secrets.token_urlsafe(24).replace("-", "a"): "two" for _ in range(MANY)}
    found = {}
    for kind in PROXIES:
        (folder / kind.name).mkdir()
        began = time.perf_counter()
        with running_proxy(kind, folder / kind.name, [[1] * 2] * 2, users) as proxy:
            while len(processes_of(proxy.pid)) == 1:  # it listens before it starts its workers
                time.sleep(0.05)
            found[kind.name] = {
                "s": round(time.perf_counter() - began, 1),
                "MB": round(memory_mb(proxy.pid)),
            }
    return found


def main() -> None:
    os.environ.pop("COVERAGE_PROCESS_START", None)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        print(json.dumps(cost(Path(one)), indent=2))
        print(json.dumps(size(Path(two)), indent=2))


if __name__ == "__main__":
    main()
