import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

import db
from main import create_app
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server
from tests.postgres_proxy import running_proxy


@pytest.fixture(scope="module")
async def observed(database_url: str) -> AsyncIterator[tuple[Person, list[str]]]:
    """Somebody whose app is watched, and the list of statements that really reach the database."""
    async with contextlib.AsyncExitStack() as stack:
        sent: list[str] = []
        if database_url.startswith("postgresql"):
            proxy = await stack.enter_async_context(running_proxy(database_url))
            database_url, sent = proxy.url, proxy.statements
        app = create_app(settings_for(database_url, database_pool_size=1))
        anna = person("anna", await stack.enter_async_context(running(app)))
        if isinstance(app.state.database, db.SQLite):
            for connection in (app.state.database.writer, *app.state.database.readers):
                await connection.set_trace_callback(sent.append)
        yield anna, sent


@pytest.fixture
def anna(observed: tuple[Person, list[str]]) -> Person:
    return observed[0]


@pytest.fixture
def sent(observed: tuple[Person, list[str]]) -> list[str]:
    return observed[1]


OPERATIONS: list[tuple[str, str, Any, str]] = [
    ("GET", "", None, "SELECT"),
    ("GET", "?status=pending&sort=title", None, "SELECT"),
    ("GET", "?count=true&limit=1", None, "SELECT"),
    ("POST", "", {"title": "Buy milk"}, "INSERT"),
    ("GET", "/{}", None, "SELECT"),
    ("PUT", "/{}", {"title": "Buy oat milk", "completed": True}, "UPDATE"),
    ("PUT", "/{}", {}, "SELECT"),
    ("PATCH", "/{}/complete", None, "UPDATE"),
    ("PATCH", "/{}/complete", {"completed": True}, "UPDATE"),
    ("DELETE", "/{}", None, "DELETE"),
]


@pytest.mark.parametrize(("method", "path", "body", "verb"), OPERATIONS)
async def test_each_operation_is_one_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    (await anna.get(f"/{task['id']}")).raise_for_status()
    sent.clear()

    answer = await anna.send(method, path.format(task["id"]), **({"json": body} if body is not None else {}))

    assert answer.is_success
    assert [statement.split()[0] for statement in sent] == [verb]
    assert "user_id" in sent[0]


@pytest.mark.parametrize(("method", "path", "body", "verb"), OPERATIONS)
async def test_a_wrong_caller_reaches_no_statement(
    anna: Person, sent: list[str], method: str, path: str, body: Any, verb: str
) -> None:
    task = await anna.create()
    url = f"{anna.tasks}{path.format(task['id'])}"
    mallory = person("mallory", anna.client)
    sent.clear()

    answer = await mallory.send(method, url, **({"json": body} if body is not None else {}))

    assert answer.status_code == 403
    assert sent == []


async def test_each_operation_is_one_round_trip_to_a_database_ten_milliseconds_away(
    postgres: Server,
) -> None:
    name = await postgres.create_database()
    async with (
        running_proxy(postgres.url_of(name), delay_s=0.01) as proxy,
        running(create_app(settings_for(proxy.url, database_pool_size=1))) as client,
    ):
        anna = person("anna", client)
        counted: list[int] = []
        for _ in range(2):  # the first time, the connection learns the statement
            counted.clear()
            for method, path, body, _verb in OPERATIONS:
                task = await anna.create()
                proxy.clear()
                options = {"json": body} if body is not None else {}
                assert (await anna.send(method, path.format(task["id"]), **options)).is_success
                counted.append(proxy.round_trips)
    await postgres.drop_database(name)

    assert counted == [1] * len(OPERATIONS)
