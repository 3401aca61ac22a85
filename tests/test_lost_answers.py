"""The response to a client whose write was committed, but whose result was lost on the way back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx
import pytest

from main import create_app
from queries import idempotency, trash
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server
from tests.postgres_proxy import Proxy, running_proxy


@dataclass(frozen=True)
class Line:
    """A user, and the proxy between the service and its database."""

    alice: Person
    proxy: Proxy
    server: Server

    async def nothing(self) -> None:
        """No other change happens between the loss and the retry."""

    async def another_change(self) -> None:
        await self.server.execute(
            "UPDATE task SET title = 'theirs', version = version + 1, updated_at = now()"
        )

    async def removal(self) -> None:
        await self.server.execute("DELETE FROM task")


@pytest.fixture
async def line(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Line]:
    monkeypatch.setattr(idempotency, "SWEEP_S", 3600)  # otherwise the proxy might cut the sweep's statement
    async with running_proxy(postgres_url) as proxy:
        settings = settings_for(proxy.url, database_pool_size=1)
        async with running(create_app(settings)) as client:
            yield Line(person("alice", client), proxy, Server(postgres_url))


WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"
CHANGES: dict[str, tuple[str, str, Any]] = {
    "put": ("PUT", "/{}", {"title": "mine"}),
    "patch": ("PATCH", "/{}", {"title": "mine"}),
    "set": ("PATCH", "/{}/complete", {"completed": True}),
    "toggle": ("PATCH", "/{}/complete", None),
    "delete": ("DELETE", "/{}", None),
}


async def _prepare(line: Line, change: str) -> None:
    """Send *change* for another task first: once prepared, a statement has a single response."""
    await _send(line, change, (await line.alice.create())["id"], '"1"')


async def _send(line: Line, change: str, task_id: int, if_match: str | None) -> httpx.Response:
    method, path, body = CHANGES[change]
    options: dict[str, Any] = {"headers": {"If-Match": if_match}} if if_match else {}
    if body:
        options["json"] = body
    return await line.alice.send(method, path.format(task_id), **options)


@pytest.mark.parametrize("change", CHANGES)
async def test_a_versioned_write_succeeds_though_its_result_was_lost(line: Line, change: str) -> None:
    await _prepare(line, change)
    task = await line.alice.create()

    line.proxy.lose_next_answer(line.nothing)
    answer = await _send(line, change, task["id"], '"1"')

    now = await line.alice.get(f"/{task['id']}")
    if change == "delete":
        assert (answer.status_code, now.status_code) == (204, 404)
    else:
        assert (answer.status_code, answer.json()) == (200, now.json())
        assert now.json()["version"] == 2


@pytest.mark.parametrize("change", CHANGES)
async def test_an_unversioned_write_whose_result_was_lost_is_503(line: Line, change: str) -> None:
    await _prepare(line, change)
    task = await line.alice.create()

    line.proxy.lose_next_answer(line.nothing)
    answer = await _send(line, change, task["id"], None)

    now = await line.alice.get(f"/{task['id']}")
    assert answer.status_code == 503
    assert (now.status_code == 404) if change == "delete" else (now.json()["version"] == 2)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "delete"])
async def test_a_lost_result_of_a_write_that_was_overwritten_since_is_503(line: Line, change: str) -> None:
    await _prepare(line, change)
    task = await line.alice.create()

    line.proxy.lose_next_answer(line.another_change)
    answer = await _send(line, change, task["id"], '"1"')

    assert answer.status_code == 503
    assert (await line.alice.get(f"/{task['id']}")).json()["title"] == "theirs"


async def test_a_lost_result_of_a_write_to_a_task_deleted_since_is_404(line: Line) -> None:
    await _prepare(line, "put")
    task = await line.alice.create()

    line.proxy.lose_next_answer(line.removal)

    assert (await _send(line, "put", task["id"], '"1"')).status_code == 404


@asynccontextmanager
async def _locked(line: Line, task_id: int, *, waiting: int) -> AsyncIterator[None]:
    """Lock a task; when the block ends, wait until *waiting* statements are blocked, then release it."""
    other = await asyncpg.connect(line.server.url)
    try:
        async with other.transaction(), asyncio.timeout(5):
            await other.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", task_id)
            yield
            while await other.fetchval(WAITING) < waiting:
                await other.execute("SELECT pg_sleep(0.01)")
    finally:
        await other.close()


@pytest.mark.parametrize("change", CHANGES)
async def test_a_write_that_outlives_its_connection_is_applied_once_and_confirmed(
    line: Line, change: str
) -> None:
    await _prepare(line, change)
    task = await line.alice.create()

    async with _locked(line, task["id"], waiting=2):
        line.proxy.cut_after_next_statement()
        sending = asyncio.create_task(_send(line, change, task["id"], '"1"'))
    answer = await sending

    now = await line.alice.get(f"/{task['id']}")
    if change == "delete":
        assert (answer.status_code, now.status_code) == (204, 404)
    else:
        assert (answer.status_code, answer.json()) == (200, now.json())
        assert now.json()["version"] == 2


async def test_a_toggle_with_several_etags_is_not_retried_after_a_lost_connection(line: Line) -> None:
    await _prepare(line, "toggle")
    task = await line.alice.create()

    async with _locked(line, task["id"], waiting=1):
        line.proxy.cut_after_next_statement()
        answer = await _send(line, "toggle", task["id"], '"1", "2"')

    assert answer.status_code == 503
    now: dict[str, Any] = {}
    async with asyncio.timeout(5):
        while now.get("version") != 2:  # the server completes the first attempt
            now = (await line.alice.get(f"/{task['id']}")).json()
    assert now["completed"] is True


async def test_completing_a_series_whose_result_was_lost_makes_one_successor(line: Line) -> None:
    await _prepare(line, "set")
    task = await line.alice.create(recurring="daily", due_date="2026-06-01")

    line.proxy.lose_next_answer(line.nothing)
    answer = await _send(line, "set", task["id"], '"1"')

    assert answer.status_code == 200
    listed = (await line.alice.get("?due_date_from=2026-06-01")).json()
    assert [each["due_date"] for each in listed] == ["2026-06-02", "2026-06-01"]


@pytest.mark.parametrize(("if_match", "status"), [('"2"', 204), (None, 503)])
async def test_erasing_a_task_whose_result_was_lost(line: Line, if_match: str | None, status: int) -> None:
    one, two = await line.alice.create(), await line.alice.create()
    for task in (one, two):
        await line.alice.delete(f"/{task['id']}")
    headers = {"If-Match": if_match} if if_match else {}
    await line.alice.delete(f"/trash/{one['id']}", headers=headers)

    line.proxy.lose_next_answer(line.nothing)
    answer = await line.alice.delete(f"/trash/{two['id']}", headers=headers)

    assert (answer.status_code, (await line.alice.get("/trash")).json()) == (status, [])


@pytest.mark.parametrize("if_match", ['"2"', None])
async def test_restoring_a_task_succeeds_though_the_result_of_its_commit_was_lost(
    line: Line, monkeypatch: pytest.MonkeyPatch, if_match: str | None
) -> None:
    task = await line.alice.create()
    await line.alice.delete(f"/{task['id']}")
    restore = trash._restore

    async def restore_and_lose(*arguments: Any, **values: Any) -> Any:
        rows = await restore(*arguments, **values)
        line.proxy.lose_next_answer(line.nothing)  # of COMMIT
        return rows

    monkeypatch.setattr(trash, "_restore", restore_and_lose)
    headers = {"If-Match": if_match} if if_match else {}
    answer = await line.alice.post(f"/{task['id']}/restore", headers=headers)

    assert (answer.status_code, answer.json()["version"]) == (200, 3)
    assert (await line.alice.get()).json() == [answer.json()]


async def test_restoring_a_task_is_503_if_its_transaction_was_undone(line: Line) -> None:
    task = await line.alice.create()
    await line.alice.delete(f"/{task['id']}")

    line.proxy.lose_next_answer(line.nothing)  # of BEGIN
    answer = await line.alice.post(f"/{task['id']}/restore", headers={"If-Match": '"2"'})

    assert answer.status_code == 503
    assert [each["version"] for each in (await line.alice.get("/trash")).json()] == [2]
