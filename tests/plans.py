"""Tables large enough to expose a bad plan, and PostgreSQL's plans of the service's own statements."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg

import db
from database.statements import compile_statement
from queries import filters, lists
from schemas import Filter, Order, Position
from server.startup import migrate
from tests.postgres import Server

OWNER, TASKS = "user1", 10_000
LIMIT = 201  # one more than the page size, to know whether a next page exists
RARE = "heliotrope"
RARE_COUNT = 5

_FILL = f"""
INSERT INTO task (user_id, title, description, completed, due_date, created_at, updated_at)
SELECT 'user' || n % $1 + 1, 'Task number ' || n, CASE WHEN (n / $1) % {TASKS // RARE_COUNT} = 7
THEN 'Water the {RARE}' ELSE 'Some more about it' END, n / $1 % 3 <> 0,
CASE WHEN n / $1 % 4 <> 0 THEN date '2026-01-01' + (n * 7919 % 1000)::int END, t, t
FROM (SELECT n, now() - interval '1 second' * (n * 7919 % 10000000) AS t
FROM generate_series(0, $1::bigint * {TASKS} - 1) n) rows
"""


EVERYTHING, NEWEST_FIRST = Filter(), Order()


@dataclass(frozen=True)
class List:
    """A page of a list as a client requests it; *after* is the last position of the previous page."""

    name: str
    wanted: Filter = EVERYTHING
    order: Order = NEWEST_FIRST
    after: Position | None = None

    @property
    def shape(self) -> filters.Shape:
        return filters.shape_of(self.wanted)

    def compiled(self, owner: str = OWNER, limit: int = LIMIT) -> tuple[str, list[Any]]:
        """Return the SQL and the arguments that the service sends."""
        page = lists.page_of_tasks(self.shape, self.order, lists.start_of(self.after), False)
        key, task_id = self.after or (None, None)
        values = {"owner": owner, "limit": limit, "after_key": key, "after_id": task_id}
        compiled = compile_statement(page, db.Postgres("postgresql://nobody@nowhere/none", 1).dialect)
        return compiled.sql, compiled.arguments(values | filters.values_of(self.wanted))


PENDING = Filter(states=frozenset((False,)))
DUE, DUE_LAST = Order("due_date", descending=False), Order("due_date", descending=True)
NEWEST_ID = 2**62
MIDDLE = Position(datetime.now(UTC) - timedelta(seconds=5_000_000), NEWEST_ID)
SOME_DAY = Position(date(2027, 6, 1), 1)
LISTS = (
    List("the default list"),
    List("the default list, later", after=MIDDLE),
    List("oldest first", order=Order(descending=False)),
    List("status=pending", PENDING),
    List("status=pending, later", PENDING, after=MIDDLE),
    List("sort=due_date", order=DUE),
    List("sort=due_date, later", order=DUE, after=SOME_DAY),
    List("sort=due_date, among those without", order=DUE, after=Position(None, 1)),
    List("sort=-due_date", order=DUE_LAST),
    List("sort=-due_date, later", order=DUE_LAST, after=SOME_DAY),
    List("sort=-due_date, among those without", order=DUE_LAST, after=Position(None, NEWEST_ID)),
    List("search", Filter(words=(RARE,))),
)


async def filled(server: Server, users: int) -> str:
    """Return the URL of a new database in which *users* have 10,000 tasks each."""
    url = server.url_of(await server.create_database())
    await asyncio.to_thread(migrate, db.connect(url, pool_size=1))
    connection = await asyncpg.connect(url)
    # Building the trigram index afterwards is several times faster than maintaining it during the inserts.
    search = await connection.fetchval("SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_task_words'")
    if search:
        await connection.execute("DROP INDEX ix_task_words")
    await connection.execute(_FILL, users, timeout=600)
    if search:
        await connection.execute(search, timeout=600)
    await connection.execute("VACUUM ANALYZE task", timeout=600)
    await connection.close()
    return url


async def plan(connection: Any, sql: str, arguments: list[Any], *, generic: bool) -> dict[str, Any]:
    """Run a statement and return its custom plan, or its generic plan if *generic*."""
    await connection.execute(f"SET plan_cache_mode = force_{'generic' if generic else 'custom'}_plan")
    await connection.execute(f"PREPARE list AS {sql}")
    execute = f"EXECUTE list({', '.join(map(_literal, arguments))})"
    found = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {execute}")
    await connection.execute("DEALLOCATE list")
    root: dict[str, Any] = json.loads(found)[0]
    return root


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"ARRAY[{', '.join(map(_literal, value))}]" if value else "'{}'"
    return "NULL" if value is None else "'" + str(value).replace("'", "''") + "'"


def nodes(node: dict[str, Any], depth: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each node of a plan with its depth."""
    yield depth, node
    for child in node.get("Plans", ()):
        yield from nodes(child, depth + 1)
