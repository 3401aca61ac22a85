import itertools
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, get_args
from unittest import mock

import pytest

import db
from database.statements import Deferred, compile_statement
from main import create_app
from queries import filters, lists
from schemas import Order
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server
from tests.postgres_proxy import running_proxy

pytestmark = pytest.mark.usefixtures("without_background_statements")


@asynccontextmanager
async def observing(database_url: str, **settings: Any) -> AsyncIterator[tuple[Person, list[str]]]:
    """Yield a user of an app whose statements are recorded as they reach the database."""
    async with AsyncExitStack() as stack:
        sent: list[str] = []
        if database_url.startswith("postgresql"):
            proxy = await stack.enter_async_context(running_proxy(database_url))
            database_url, sent = proxy.url, proxy.statements
        app = create_app(settings_for(database_url, database_pool_size=1, **settings))
        database = app.state.services.database
        if isinstance(database, db.SQLite):
            stack.enter_context(
                mock.patch.object(database, "_connect_on_its_thread", _traced(database, sent))
            )
        anna = person("anna", await stack.enter_async_context(running(app)))
        sent.clear()
        yield anna, sent


def _traced(database: db.SQLite, sent: list[str]) -> Callable[[float], sqlite3.Connection]:
    connect = database._connect_on_its_thread

    def connect_traced(statement_s: float) -> sqlite3.Connection:
        connection = connect(statement_s)
        connection.set_trace_callback(sent.append)
        return connection

    return connect_traced


@pytest.fixture(scope="module")
async def observed(database_url: str) -> AsyncIterator[tuple[Person, list[str]]]:
    async with observing(database_url) as found:
        yield found


@pytest.fixture
def anna(observed: tuple[Person, list[str]]) -> Person:
    return observed[0]


@pytest.fixture
def sent(observed: tuple[Person, list[str]]) -> list[str]:
    return observed[1]


OPERATIONS: list[tuple[str, str, Any, str]] = [
    ("GET", "", None, "SELECT"),
    ("GET", "?status=pending&sort=title", None, "SELECT"),
    ("GET", "?sort=-created_at&completed=true", None, "SELECT"),
    ("GET", "?sort=updated_at&search=milk+oat+buy", None, "SELECT"),
    ("GET", "?sort=-priority&priority=high&priority=low", None, "SELECT"),
    ("GET", "?sort=due_date&due_date_from=2026-01-01&due_date_to=2026-12-31", None, "SELECT"),
    ("GET", "?sort=-due_date&category=home&category=work", None, "SELECT"),
    ("GET", "?tags=home&tags=urgent", None, "SELECT"),
    ("GET", "?count=true&limit=1", None, "SELECT"),
    ("GET", "?count=true&sort=due_date&status=pending&q=milk&priority=high&tags=home", None, "SELECT"),
    ("GET", "/stats?today=2026-06-01", None, "SELECT"),
    ("POST", "", {"title": "Buy milk"}, "INSERT"),
    ("GET", "/{}", None, "SELECT"),
    ("PUT", "/{}", {"title": "Buy oat milk", "completed": True}, "UPDATE"),
    ("PUT", "/{}", {}, "SELECT"),
    ("PATCH", "/{}", {"tags": ["home"], "due_date": "2026-06-01", "due_time": "09:30"}, "UPDATE"),
    ("PATCH", "/{}", {}, "SELECT"),
    ("PATCH", "/{}/complete", None, "UPDATE"),
    ("PATCH", "/{}/complete", {"completed": True}, "UPDATE"),
    ("DELETE", "/{}", None, "UPDATE"),
    ("PATCH", "?search=milk", {"completed": False}, "UPDATE"),
    ("DELETE", "?search=milk", None, "UPDATE"),
]
CONDITIONAL: list[tuple[str, str, Any, str]] = [
    ("PUT", "/{}", {"title": "Buy oat milk"}, "UPDATE"),
    ("PATCH", "/{}", {"completed": True}, "UPDATE"),
    ("PATCH", "/{}/complete", None, "UPDATE"),
    ("DELETE", "/{}", None, "UPDATE"),
]


def _with_body(body: Any) -> dict[str, Any]:
    return {"json": body} if body is not None else {}


def _verbs(sent: list[str]) -> list[str]:
    """Return the verb of each statement; if it begins with a CTE, the verb of what it does.

    SQLite notes a statement, with its values, again for each statement of its triggers.
    """
    verbs = {"WITH locked": "UPDATE", "WITH following": "INSERT", "WITH known": "SELECT"}
    pairs = zip(["", *sent], sent, strict=False)
    words = [after.split()[:2] for before, after in pairs if after != before or "$1" in after]
    return [verbs.get(" ".join(two), two[0]) for two in words]


@pytest.mark.parametrize(("method", "path", "body", "verb"), OPERATIONS)
async def test_each_operation_is_one_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    (await anna.get(f"/{task['id']}")).raise_for_status()
    sent.clear()

    answer = await anna.send(method, path.format(task["id"]), **_with_body(body))

    assert answer.is_success
    assert _verbs(sent) == [verb]
    assert "user_id" in sent[0]


@pytest.mark.parametrize(("method", "path", "body", "verb"), OPERATIONS)
async def test_a_403_runs_no_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    url = f"{anna.tasks}{path.format(task['id'])}"
    mallory = person("mallory", anna.client)
    sent.clear()

    answer = await mallory.send(method, url, **_with_body(body))

    assert answer.status_code == 403
    assert sent == []


async def test_each_operation_is_one_round_trip_to_a_database_ten_milliseconds_away(
    postgres: Server,
) -> None:
    async with (
        postgres.migrated_database() as url,
        running_proxy(url, delay_s=0.01) as proxy,
        running(create_app(settings_for(proxy.url, database_pool_size=1))) as client,
    ):
        anna = person("anna", client)
        counted: list[int] = []
        for _ in range(2):  # the first time, the connection prepares the statement
            counted.clear()
            for method, path, body, _verb in OPERATIONS:
                task = await anna.create()
                proxy.clear()
                assert (await anna.send(method, path.format(task["id"]), **_with_body(body))).is_success
                counted.append(proxy.round_trips)

    assert counted == [1] * len(OPERATIONS)


@pytest.mark.parametrize(("method", "path", "body", "verb"), CONDITIONAL)
async def test_if_match_that_holds_costs_no_extra_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    sent.clear()

    answer = await anna.send(
        method, path.format(task["id"]), headers={"If-Match": f'"{task["version"]}"'}, **_with_body(body)
    )

    assert answer.is_success
    assert _verbs(sent) == [verb]


@pytest.mark.parametrize(("method", "path", "body", "verb"), CONDITIONAL)
async def test_if_match_that_fails_costs_a_second_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    sent.clear()

    answer = await anna.send(
        method, path.format(task["id"]), headers={"If-Match": '"77"'}, **_with_body(body)
    )

    assert answer.status_code == 412
    assert _verbs(sent) == [verb, "SELECT"]


async def test_a_304_is_one_statement(anna: Person, sent: list[str]) -> None:
    task = await anna.create()
    sent.clear()

    answer = await anna.get(f"/{task['id']}", headers={"If-None-Match": f'"{task["version"]}"'})

    assert answer.status_code == 304
    assert _verbs(sent) == ["SELECT"]


@pytest.mark.parametrize("limit", [3, 1000])
async def test_a_task_limit_costs_no_extra_statement(database_url: str, limit: int) -> None:
    async with observing(database_url, max_tasks_per_user=limit) as (anna, sent):
        answers = [await anna.post(json={"title": "Buy milk"}) for _ in range(4)]

    assert [answer.status_code for answer in answers] == [201] * 3 + [409 if limit == 3 else 201]
    assert _verbs(sent) == ["INSERT"] * 4


async def test_a_post_with_an_idempotency_key_is_two_more_statements(anna: Person, sent: list[str]) -> None:
    for number, verbs in ((0, ["SELECT", "INSERT", "INSERT"]), (1, ["SELECT"])):
        sent.clear()

        answer = await anna.post(json={"title": "Buy milk"}, headers={"Idempotency-Key": "once"})

        assert answer.status_code == 201
        assert ("Idempotent-Replayed" in answer.headers) is (number == 1)
        assert _verbs(sent) == ["BEGIN", *verbs, "COMMIT"]


@pytest.mark.parametrize("body", [None, {"completed": True}])
async def test_completing_in_a_series_is_six_statements_once(
    anna: Person, sent: list[str], body: Any
) -> None:
    task = await anna.create(recurring="weekly", due_date="2026-06-01")
    sent.clear()

    assert (await anna.patch(f"/{task['id']}/complete", **_with_body(body))).is_success
    assert _verbs(sent) == ["UPDATE", "SELECT", "BEGIN", "UPDATE", "INSERT", "COMMIT"]

    sent.clear()
    assert (await anna.patch(f"/{task['id']}/complete", **_with_body(body))).is_success
    assert _verbs(sent) == ["UPDATE"]


@pytest.mark.parametrize("count", [1, 60])
async def test_completing_many_is_as_many_statements_as_completing_two(database_url: str, count: int) -> None:
    async with observing(database_url) as (anna, sent):
        for _ in range(count):
            await anna.create()
            await anna.create(recurring="weekly", due_date="2026-06-01")
        sent.clear()

        answer = await anna.patch("?status=pending", json={"completed": True})

    assert answer.json() == {"count": 2 * count}
    assert _verbs(sent) == ["BEGIN", "SELECT", "UPDATE", "UPDATE", "INSERT", "COMMIT"]


@pytest.mark.parametrize("count", [1, 50])
async def test_a_hundred_operations_are_as_many_statements_as_two(
    anna: Person, sent: list[str], count: int
) -> None:
    tasks = [await anna.create() for _ in range(count)]
    operations = [
        operation
        for task in tasks
        for operation in (
            {"op": "update", "id": task["id"], "changes": {"title": "Buy oat milk"}},
            {"op": "create", "task": {"title": "Bake bread"}},
        )
    ]
    sent.clear()

    answer = await anna.post("/bulk", json={"operations": operations})

    assert [result["status"] for result in answer.json()["results"]] == [200, 201] * count
    assert _verbs(sent) == ["BEGIN", "SELECT", "SELECT", "UPDATE", "INSERT", "COMMIT"]


async def test_operations_of_every_kind_within_a_limit_are_five_statements(database_url: str) -> None:
    async with observing(database_url, max_tasks_per_user=1000) as (anna, sent):
        answer = await _every_kind(anna, sent)

    assert [result["status"] for result in answer] == [200, 201, 200, 204] * 25
    assert _verbs(sent) == ["BEGIN", "SELECT", "SELECT", "UPDATE", "UPDATE", "INSERT", "COMMIT"]


async def _every_kind(someone: Person, sent: list[str]) -> list[dict[str, Any]]:
    tasks = [await someone.create() for _ in range(75)]
    operations: list[dict[str, Any]] = []
    for one, two, three in zip(*[iter(tasks)] * 3, strict=True):
        operations += (
            {"op": "update", "id": one["id"], "changes": {"tags": ["home"], "priority": "high"}},
            {"op": "create", "task": {"title": "Bake bread", "tags": ["home"]}},
            {"op": "complete", "id": two["id"]},
            {"op": "delete", "id": three["id"]},
        )
    sent.clear()
    answer = await someone.post("/bulk", json={"operations": operations})
    results: list[dict[str, Any]] = answer.json()["results"]
    return results


async def test_a_new_connection_sends_no_introspection_statements(postgres_url: str) -> None:
    async with observing(postgres_url) as (anna, sent):
        await _every_kind(anna, [])
        for method, path, body, _verb in OPERATIONS:
            task = await anna.create()
            assert (await anna.send(method, path.format(task["id"]), **_with_body(body))).is_success
        await anna.post(json={"title": "Buy milk"}, headers={"Idempotency-Key": "once"})

    assert len(sent) > 100
    assert [statement for statement in sent if "pg_type" in statement or "set_config" in statement] == []


async def test_a_transaction_is_a_round_trip_for_each_statement(postgres: Server) -> None:
    async with (
        postgres.migrated_database() as url,
        running_proxy(url, delay_s=0.01) as proxy,
        running(create_app(settings_for(proxy.url, database_pool_size=1))) as client,
    ):
        anna = person("anna", client)
        for number in range(2):  # the first time, the connection prepares the statements
            task = await anna.create(recurring="daily", due_date="2026-06-01")
            proxy.clear()
            await anna.post(json={"title": "Buy milk"}, headers={"Idempotency-Key": str(number)})
            await anna.patch(f"/{task['id']}/complete")
            await anna.patch("?status=pending", json={"completed": True})
            await anna.post("/bulk", json={"operations": [{"op": "create", "task": {"title": "Rest"}}]})

    assert proxy.round_trips == len(proxy.statements) == 5 + 6 + 6 + 4


def test_all_lists_together_have_144_statements() -> None:
    fields = ("created_at", "updated_at", "title", "priority", "due_date")
    orders = [Order(field, descending) for field in fields for descending in (False, True)]
    dialect = db.connect("postgresql://user@host/name", pool_size=1).dialect

    cases = itertools.product(get_args(filters.Shape), orders, get_args(lists.Start), (False, True))
    texts = {compile_statement(Deferred(lists.page_of_tasks, tuple(case)), dialect).sql for case in cases}

    assert len(texts) == 144
