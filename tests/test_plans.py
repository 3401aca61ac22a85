import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

import db
from database.statements import Statement, compile_statement
from main import create_app
from queries import bulk, idempotency, lists
from queries.owner import Owner
from queries.rows import new_task
from schemas import Filter, Order, Position, TaskCreate
from server.startup import migrate
from tests.conftest import person, running, settings_for
from tests.plans import LIMIT, LISTS, OWNER, RARE, TASKS, List, filled, nodes, plan
from tests.postgres import Server

USERS = 21
ADD_TO_SQLITE = """INSERT INTO task (user_id, title, created_at, updated_at)
VALUES (?, 'Old', '2026-01-01 00:00:00', '2026-01-01 00:00:00')"""

NOTES = (
    ("Water the HELIOTROPE", None),
    ("Call Zoë", "about the Heliotropes"),
    ("100% sure", "under_score"),
    ("back\\slash", "ÉCOLE"),
)
SEARCHES = {
    "heliotrope": ["Call Zoë", "Water the HELIOTROPE"],
    "zoë heliotropes": ["Call Zoë"],
    "the": ["Call Zoë", "Water the HELIOTROPE"],
    "l": ["back\\slash", "Call Zoë", "Water the HELIOTROPE"],
    "école": ["back\\slash"],
    "%": ["100% sure"],
    "_": ["100% sure"],
    "\\": ["back\\slash"],
    "zoëabout": [],
    "nothing": [],
}


@pytest.fixture(scope="module")
async def url(postgres: Server) -> AsyncIterator[str]:
    """A database in which 21 users have 10,000 tasks each."""
    url = await filled(postgres, USERS)
    yield url
    await postgres.drop_database(url.rpartition("/")[2])


@pytest.fixture(scope="module")
async def connection(url: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT count(*) FROM task") == USERS * TASKS
    yield connection
    await connection.close()


# A filtered list always gets a custom plan, as the test of searches shows.
PLANS = [
    (each, generic) for each in LISTS for generic in (False, True) if each.shape != "filtered" or not generic
]


@pytest.mark.parametrize(
    ("wanted", "generic"),
    PLANS,
    ids=[f"{each.name}-{'any' if generic else 'these'} values" for each, generic in PLANS],
)
async def test_a_page_scans_no_more_rows_than_its_limit(connection: Any, wanted: List, generic: bool) -> None:
    found = await plan(connection, *wanted.compiled(), generic=generic)

    scans = [node for _, node in nodes(found["Plan"]) if "Relation Name" in node]
    assert scans
    assert [node["Node Type"] for node in scans if node["Node Type"] == "Seq Scan"] == []
    assert found["Plan"]["Actual Rows"] >= 1
    assert sum(map(_rows_read, scans)) <= LIMIT


def _rows_read(scan: dict[str, Any]) -> float:
    rejected = scan.get("Rows Removed by Filter", 0) + scan.get("Rows Removed by Index Recheck", 0)
    return float((scan["Actual Rows"] + rejected) * scan["Actual Loops"])


@pytest.mark.parametrize("descending", [False, True])
async def test_pages_by_due_date_go_through_every_task_once(url: str, descending: bool) -> None:
    order = Order("due_date", descending)
    database = db.connect(url, pool_size=1)
    rows: list[Any] = []
    after = None
    while page := (await lists.list_tasks(Owner(OWNER, database), Filter(), order, 777, after)).tasks:
        rows += page
        after = Position(page[-1].due_date, page[-1].id)
    await database.close()

    by_key = sorted(rows, key=lambda row: (row.due_date or date.min, row.id), reverse=descending)
    assert len({row.id for row in rows}) == len(rows) == TASKS
    assert rows == sorted(by_key, key=lambda row: row.due_date is None)


@pytest.mark.parametrize("word", ["number", "om", RARE])
async def test_a_search_always_gets_a_custom_plan(url: str, word: str) -> None:
    wanted = List("search", Filter(words=(word,)))
    database = db.Postgres(url, 1)
    owner = Owner(OWNER, database)
    for _ in range(20):
        assert await lists.list_tasks(owner, wanted.wanted, wanted.order, LIMIT)

    counted = "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement = $1"
    counts = await database.pool.fetch(counted, [wanted.compiled()[0]])
    connection = database.pool._idle[0].raw
    found = await plan(connection, *wanted.compiled(), generic=False)
    await database.close()

    assert counts == [(0, 20)]
    scans = [node for _, node in nodes(found["Plan"]) if "Relation Name" in node]
    assert sum(map(_rows_read, scans)) <= LIMIT + 10


@pytest.mark.parametrize("extensions", ["there", "dropped", "refused"])
async def test_search_finds_the_same_with_and_without_extensions(postgres: Server, extensions: str) -> None:
    name = await postgres.create_database()
    own = Server(postgres.url_of(name))
    url = own.url
    if extensions == "refused":
        # A role that owns the tables but may not create extensions, as a careful administrator grants it.
        await own.execute("CREATE ROLE careful LOGIN; GRANT CREATE ON SCHEMA public TO careful")
        url = url.replace("postgres@", "careful@")
    async with running(create_app(settings_for(url))) as client:
        if extensions == "dropped":
            await own.execute("DROP EXTENSION pg_trgm CASCADE")
        alice = person("alice", client)
        for title, description in NOTES:
            await alice.create(title, description=description)

        answers = {word: await alice.get("", params={"search": word}) for word in SEARCHES}
    indexes = await _indexes(own.url)
    await postgres.drop_database(name)
    if extensions == "refused":
        await postgres.execute("DROP ROLE careful")

    assert ("ix_task_words" in indexes) is (extensions == "there")
    assert {"ix_task_live_pending", "ix_task_live_due_date"} <= indexes
    assert {word: [task["title"] for task in answer.json()] for word, answer in answers.items()} == SEARCHES


async def test_search_folds_case_beyond_ascii_where_lc_ctype_is_c(postgres: Server) -> None:
    name = "task_test_ctype_c"
    await postgres.execute(
        f"CREATE DATABASE {name} TEMPLATE template0 LOCALE_PROVIDER libc LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    try:
        async with running(create_app(settings_for(postgres.url_of(name)))) as client:
            alice = person("alice", client)
            for title, description in NOTES:
                await alice.create(title, description=description)

            answers = {word: (await alice.get("", params={"search": word})).json() for word in SEARCHES}
            by_title = [task["title"] for task in (await alice.get("?sort=title")).json()]
        indexes = await _indexes(postgres.url_of(name))
    finally:
        await postgres.drop_database(name)

    assert {word: [task["title"] for task in found] for word, found in answers.items()} == SEARCHES
    assert by_title == sorted((title for title, _ in NOTES), key=str.lower)
    assert "ix_task_words" in indexes


async def _indexes(url: str) -> set[str]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch("SELECT indexname FROM pg_indexes WHERE tablename = 'task'")
    await connection.close()
    return {row["indexname"] for row in rows}


@pytest.mark.parametrize("statement", [bulk._SELECT_SOME, bulk._UPDATE_SOME, bulk._DELETE_SOME], ids=range(3))
def test_sqlite_bulk_statements_do_little_work_for_untouched_tasks(
    tmp_path: Path, statement: Statement
) -> None:
    database = db.connect(f"sqlite:///{tmp_path / 'tasks.db'}", pool_size=1)
    migrate(database)
    compiled = compile_statement(statement, database.dialect)
    ids = list(range(1, 101))
    row = new_task(TaskCreate(title="New").model_dump(), datetime.now(UTC))
    records = bulk._json({**row, "id": task_id} for task_id in ids)
    arguments = compiled.arguments({"owner": OWNER, "ids": ids, "records": records, "now": datetime.now(UTC)})

    with contextlib.closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)) as connection:
        connection.executemany(ADD_TO_SQLITE, [(OWNER,)] * TASKS)
        steps = itertools.count()
        connection.set_progress_handler(lambda: next(steps) < 0, 100)
        assert len(connection.execute(compiled.sql, arguments).fetchall()) == 100

    # Scanning the 100 records for each of 10,000 tasks took 5,000,000 steps of SQLite's virtual machine.
    assert next(steps) * 100 < 30 * TASKS


async def test_sqlite_weighs_keys_by_a_covering_index(tmp_path: Path) -> None:
    database = db.connect(f"sqlite:///{tmp_path / 'tasks.db'}", pool_size=1)
    await asyncio.to_thread(migrate, database)
    compiled = compile_statement(idempotency._LOCK_AND_FIND, database.dialect)

    with contextlib.closing(sqlite3.connect(tmp_path / "tasks.db")) as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {compiled.sql}", compiled.arguments({})).fetchall()

    assert "USING COVERING INDEX ix_idempotency_key_user_id_weight" in str(plan)
