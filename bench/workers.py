"""What workers cost: `uv run --group bench bench/workers.py`. Needs wrk.

Starts its own PostgreSQL and the service without workers, with a parent and one worker (`auto` on one core),
and with two and four, all on the first core; the load is on the other, in interleaved rounds. More workers
than cores show what changing between processes adds.
"""

import asyncio
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.run import MAIN, SERVERS, load, prepare, running
from bench.scale import tokens_of
from tests.postgres import running_server

COUNTS = ("1", "auto", "2", "4")
OPERATIONS = ("one", "list", "create")
ROUNDS, SECONDS, CONNECTIONS, USERS = 5, 2, 32, 100


def name(count: str) -> str:
    return f"WORKERS={count}"


def main_() -> None:
    for count in COUNTS:
        SERVERS[name(count)] = (
            MAIN,
            {"WORKERS": count, "ENVIRONMENT": "production", "RATE_LIMIT": "off"},
        )
    costs: dict[tuple[str, str], list[float]] = defaultdict(list)
    with running_server() as server, tempfile.TemporaryDirectory() as folder:
        token_file = tokens_of(USERS, Path(folder, "tokens"))
        url = asyncio.run(prepare(server, USERS))
        with running([name(count) for count in COUNTS], url, Path(folder)) as processes:
            for process in processes:  # until all workers have started and prepared their statements
                for operation in OPERATIONS:
                    load(process, operation, token_file, SECONDS, CONNECTIONS)
            for _ in range(ROUNDS):
                for operation in OPERATIONS:
                    for process in processes:
                        measured = load(process, operation, token_file, SECONDS, CONNECTIONS)
                        costs[operation, process.name].append(measured["cpu_s_per_1000"])
    print("CPU s per 1,000 requests, median, and its ratio to the first, median and range of the rounds")
    for operation in OPERATIONS:
        alone = costs[operation, name(COUNTS[0])]
        for count in COUNTS:
            found = costs[operation, name(count)]
            ratios = [each / one for each, one in zip(found, alone, strict=True)]
            print(
                f"{operation:8} {name(count):13} {statistics.median(found):.3f} "
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            )


if __name__ == "__main__":
    main_()
