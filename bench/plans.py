"""How PostgreSQL runs the lists: `uv run bench/plans.py`.

Prints the custom and the generic plan of each list of a user with 10,000 tasks in a table of 1,000,000, and
the ratio of the times of page 1,000 and page 1. Starts its own PostgreSQL.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import asyncpg

import db
from queries import lists
from queries.owner import Owner
from schemas import Filter, Order, Position
from tests.plans import DUE, DUE_LAST, LISTS, OWNER, RARE, TASKS, List, filled, nodes, plan
from tests.postgres import running_server

PAGE_SIZE = 10
PAGES = (1, TASKS // PAGE_SIZE // 2, TASKS // PAGE_SIZE)
# Searches that no index can answer alone: many matches, or words shorter than a trigram.
HARDER = (
    List("search, a word in every task", Filter(words=("number",))),
    List("search, two letters", Filter(words=("om",))),
    List("search, two words", Filter(words=("water", RARE))),
    List("search among the completed", Filter(states=frozenset((True,)), words=(RARE,))),
    List("tags", Filter(tags=("home",))),
    List("sort=title", order=Order("title", descending=False)),
    List("sort=priority", order=Order("priority", descending=False)),
)
SHOWN = ("Index Cond", "Recheck Cond", "Filter", "Sort Key", "One-Time Filter")


def describe(found: dict[str, Any]) -> None:
    for depth, node in nodes(found["Plan"]):
        name = " ".join(filter(None, (node["Node Type"], node.get("Scan Direction"), node.get("Index Name"))))
        rejected = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
        rows = f"{node['Actual Rows']:.0f} rows" + (f", {rejected:.0f} rejected" if rejected else "")
        print(f"    {'  ' * depth}{name}: {rows}")
        for key in SHOWN:
            if key in node:
                print(f"    {'  ' * depth}  {key.lower()}: {node[key]}")


async def plans(url: str) -> None:
    connection = await asyncpg.connect(url)
    for wanted in (*LISTS, *HARDER):
        for generic in (False, True):
            sql, arguments = wanted.compiled()
            await plan(connection, sql, arguments, generic=generic)  # warms the cache
            found = await plan(connection, sql, arguments, generic=generic)
            label = "any values" if generic else "these values"
            print(
                f"\n{wanted.name}, for {label}: {found['Execution Time']:.2f} ms after "
                f"{found['Planning Time']:.2f} ms of planning, {found['Plan']['Shared Hit Blocks']} blocks"
            )
            describe(found)
    await connection.close()


async def pages(url: str, rounds: int) -> None:
    """Run the pages alternately and compare their median times."""
    database = db.connect(url, pool_size=1)
    owner = Owner(OWNER, database)
    print(f"\npages of {PAGE_SIZE}, ms (times of page 1)")
    for name, order in (("the default list", Order()), ("sort=due_date", DUE), ("sort=-due_date", DUE_LAST)):
        rows = (await lists.list_tasks(owner, Filter(), order, TASKS)).tasks
        last = {page: rows[(page - 1) * PAGE_SIZE - 1] for page in PAGES if page > 1}
        starts = [
            Position(getattr(last[page], order.field), last[page].id) if page in last else None
            for page in PAGES
        ]
        taken: dict[int, list[float]] = {page: [] for page in PAGES}
        for _ in range(rounds):
            for page, after in zip(PAGES, starts, strict=True):
                start = time.perf_counter()
                found = await lists.list_tasks(owner, Filter(), order, PAGE_SIZE + 1, after)
                taken[page].append((time.perf_counter() - start) * 1000)
                assert len(found.tasks) >= PAGE_SIZE
        medians = {page: statistics.median(times) for page, times in taken.items()}
        print(
            f"{name:20}"
            + "".join(f"  page {page}: {ms:.3f} ({ms / medians[1]:.2f})" for page, ms in medians.items())
        )
    await database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=100, help="each with 10,000 tasks")
    parser.add_argument("--rounds", type=int, default=1_000)
    options = parser.parse_args()
    with running_server() as server:
        url = asyncio.run(filled(server, options.users))
        print(f"{options.users * TASKS:,} tasks, {TASKS:,} of them of one user")
        asyncio.run(plans(url))
        asyncio.run(pages(url, options.rounds))


if __name__ == "__main__":
    main()
