"""The guide to Citus on a real cluster; `docs/citus.md` says how to start one."""

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
from alembic import command
from alembic.config import Config

import db
from database.statements import Compiled, Deferred, PerDatabase, Statement, compile_statement
from main import create_app
from queries import bulk, idempotency
from queries.purge import Purge
from queries.rows import new_task
from schemas import TaskCreate
from tests.citus import Cluster
from tests.conftest import Person, person, running, settings_for
from tests.guides import CITUS, execute
from tests.service import PROJECT
from tests.statements import sent
from tests.test_deploy import PASSWORD, every_operation
from tests.test_migrations import OUR_TABLES

RUNS = 7  # from the sixth on, PostgreSQL may keep one plan for all values
FIRST_ID_OF_A_WORKER = 2**48  # the coordinator's start at 1
NOW = datetime.now(UTC)
ROW = new_task(TaskCreate(title="Buy milk", completed=True).model_dump(), NOW)
# The sort key of the task before a page, by the type that is sent.
KEYS = {
    "TIMESTAMP WITH TIME ZONE": NOW,
    "VARCHAR(200)": "Buy milk",
    "SMALLINT": "high",
    "INTEGER": NOW.date(),
}
TASK = {"title": "Buy milk"}
PEOPLE = [f"user{number}" for number in range(20)]
VALUES: dict[str, Any] = {f"new_{name}": value for name, value in ROW.items()}
VALUES |= {"owner": "alice", "owners": PEOPLE, "tasks_max": 1000, "limit": 10, "sets_completed": True}
VALUES |= {"now": NOW, "expiry": NOW, "until": NOW, "after_id": 1, "after_revision": 0, "known_from": 0}
VALUES |= {"task_id": 1, "versions": [1], "ids": [1, 2], "new_count": 2}
VALUES |= {"records": bulk._json([{**ROW, "id": 1}, {**ROW, "id": 2}])}
VALUES |= {"key": "k", "fingerprint": "f", "answer": "{}", "weight": 1}
VALUES |= {"states": [True, False], "tags": [], "longest_word": "%milk%", "due_date_from": date(2026, 1, 1)}


@pytest.fixture(scope="module")
async def citus(cluster: Cluster) -> Cluster:
    await cluster.make_database()
    return cluster


@pytest.fixture
async def client(citus: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    settings = settings_for(citus.url_as("tasks_service"), migrate_on_start=False, local_accounts=True)
    async with running(create_app(settings)) as client:
        yield client


async def test_the_services_role_can_do_every_operation(citus: Cluster) -> None:
    settings = settings_for(citus.url_as("tasks_service"), migrate_on_start=False, local_accounts=True)
    app = create_app(settings)
    async with running(app) as client:
        done = await every_operation(client, person("alice", client))
        database = app.state.services.database
        await Purge(database, trash_days=0, sync_days=0).once()
        await idempotency.remove_expired(database)

    documented = app.openapi()["paths"].items()
    assert done == {(method.upper(), path) for path, methods in documented for method in methods}


async def test_tables_of_users_are_distributed_and_the_others_on_the_coordinator(citus: Cluster) -> None:
    distributed = await citus.rows("SELECT logicalrelid::text FROM pg_dist_partition ORDER BY 1")

    assert distributed == [("idempotency_key",), ("task",), ("task_owner",)]
    assert {name for (name,) in distributed} == set(OUR_TABLES) - {"local_account"}


@dataclass
class Asked:
    """How many commands an execution of a statement sent at most, and to how many nodes."""

    commands: int = 0
    nodes: int = 0

    def note(self, messages: list[Any]) -> None:
        places = [each.detail.partition(" connectionId")[0] for each in messages if _is_command(each)]
        self.commands, self.nodes = max(self.commands, len(places)), max(self.nodes, len(set(places)))


def _is_command(message: Any) -> bool:
    is_issued = message.message.startswith("issuing ") and message.detail is not None
    return is_issued and not re.match("issuing (BEGIN|SELECT assign|SET LOCAL|ROLLBACK)", message.message)


async def test_every_statement_asks_one_node_except_those_in_the_guide(citus: Cluster) -> None:
    statements = sent()
    assert len(statements) > 150

    asked = {each.name: Asked() for each in map(compiled, statements)}
    connection = await asyncpg.connect(citus.url_as("tasks_service"))
    messages: list[Any] = []
    connection.add_log_listener(lambda _, message: messages.append(message))
    try:
        await connection.execute("SET citus.log_remote_commands = on")
        for statement in statements:
            prepared = await connection.prepare(compiled(statement).sql)
            for _ in range(RUNS):
                transaction = connection.transaction()
                await transaction.start()
                messages.clear()
                await prepared.fetch(*arguments(statement))
                await asyncio.sleep(0)  # for the listener
                asked[compiled(statement).name].note(messages)
                await transaction.rollback()
    finally:
        await connection.close()

    table = CITUS.partition("| statement | ")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert {name for name, each in asked.items() if each.nodes > 1} == named
    several = {name: each.commands for name, each in asked.items() if each.commands > 1}
    assert {name: count for name, count in several.items() if name not in named} == {
        "create_task": 3,
        "create_some": 3,
    }


DIALECT = db.Postgres("postgresql://nobody@nowhere/none", 1).dialect


def compiled(statement: Statement) -> Compiled:
    return compile_statement(statement, DIALECT)


def arguments(statement: Statement) -> list[Any]:
    key = None
    if isinstance(statement, PerDatabase):
        statement = statement.postgresql
    if not isinstance(statement, Deferred):
        binds = statement.compile(dialect=DIALECT).binds  # type: ignore[attr-defined] # not in its stubs
        key = KEYS[binds["after_key"].type.compile(DIALECT)] if "after_key" in binds else None
    return compiled(statement).arguments(VALUES | {"after_key": key})


async def test_ids_are_those_of_the_coordinators_sequence(client: httpx.AsyncClient) -> None:
    alice, bob = person("alice", client), person("bob", client)
    operations = [{"op": "create", "task": {"title": "Buy milk"}}] * 3
    ids = []
    for _ in range(2):
        for someone in (alice, bob):
            ids.append((await someone.create())["id"])
            answer = await someone.post("/bulk", json={"operations": operations})
            ids += [result["task"]["id"] for result in answer.json()["results"]]

    assert ids == sorted(set(ids))
    assert ids[-1] < FIRST_ID_OF_A_WORKER


async def test_a_later_migration_runs_on_distributed_tables(citus: Cluster) -> None:
    config = Config(toml_file=PROJECT / "pyproject.toml")
    config.attributes["database"] = db.connect(citus.url_as("tasks_migration"), pool_size=1)
    before = await _indexes_of_shards(citus)

    await asyncio.to_thread(command.downgrade, config, "0011")
    between = await _indexes_of_shards(citus)
    await asyncio.to_thread(command.upgrade, config, "head")

    assert before == await _indexes_of_shards(citus) != between


async def test_a_migration_may_add_a_function_after_it_changed_a_table(
    citus: Cluster, client: httpx.AsyncClient
) -> None:
    await person("alice", client).create()
    migration = citus.url_as("tasks_migration")
    add = "ALTER TABLE task ADD COLUMN colour TEXT"
    make = "CREATE FUNCTION colour() RETURNS TEXT LANGUAGE sql AS $$SELECT 'red'$$"

    await execute(migration, f"BEGIN; {add}; {make}; UPDATE task SET colour = 'red'; COMMIT")

    colours = await citus.rows("SELECT DISTINCT colour FROM task")
    for statement in ("DROP FUNCTION colour()", "ALTER TABLE task DROP COLUMN colour"):
        await execute(migration, statement)
    assert colours == [("red",)]


async def _indexes_of_shards(citus: Cluster) -> list[Any]:
    counts = "SELECT count(*) FROM pg_index WHERE indisvalid AND indrelid = ''%s''::regclass"
    return await citus.rows(
        f"SELECT result, count(*) FROM run_command_on_shards('task', '{counts}') GROUP BY result"
    )


async def test_while_a_node_is_down_only_its_users_wait(citus: Cluster, client: httpx.AsyncClient) -> None:
    by_node = await people_by_node(citus, client)
    assert len(by_node) == 2
    (port, there), (_, elsewhere) = by_node.items()
    (server,) = (each for each in citus.servers[1:] if urlsplit(each).port == port)

    await execute(server, "ALTER DATABASE tasks ALLOW_CONNECTIONS false")
    await execute(server, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'tasks'")
    try:
        refused = [await each.get() for each in there] + [await each.post(json=TASK) for each in there]
        served = [await each.get() for each in elsewhere] + [await each.post(json=TASK) for each in elsewhere]
        account = {"email": "down@example.com", "password": PASSWORD, "name": "D"}
        signed_up = await client.post("/api/auth/sign-up/email", json=account)
        ready = await client.get("/health/ready")
    finally:
        await execute(server, "ALTER DATABASE tasks ALLOW_CONNECTIONS true")
    again = [await each.get() for each in there]

    assert {(answer.status_code, "Retry-After" in answer.headers) for answer in refused} == {(503, True)}
    assert {answer.status_code for answer in served} == {200, 201}
    assert (signed_up.status_code, ready.status_code) == (200, 200)
    assert {answer.status_code for answer in again} == {200}


async def test_a_node_can_be_removed_and_added(citus: Cluster, client: httpx.AsyncClient) -> None:
    by_node = await people_by_node(citus, client)
    everyone = [each for people in by_node.values() for each in people]

    await citus.run("removing a node")
    nodes = "SELECT DISTINCT nodeport FROM citus_shards"
    assert len(await citus.rows(nodes)) == 1
    kept = [await each.get() for each in everyone]
    await citus.run("adding a node")

    assert len(await citus.rows(nodes)) == 2
    answers = kept + [await each.get() for each in everyone]
    assert {(answer.status_code, len(answer.json())) for answer in answers} == {(200, 1)}


async def people_by_node(citus: Cluster, client: httpx.AsyncClient) -> dict[int, list[Person]]:
    """Return users with a task each, by the port of the node that has their shard."""
    by_node: dict[int, list[Person]] = {}
    for _ in PEOPLE:
        each = person("alice", client)
        await each.create()
        shard = f"get_shard_id_for_distribution_column('task', '{each.user_id}')"
        ((port,),) = await citus.rows(f"SELECT nodeport FROM pg_dist_shard_placement WHERE shardid = {shard}")
        by_node.setdefault(port, []).append(each)
    return by_node
