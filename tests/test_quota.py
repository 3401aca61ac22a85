import asyncio
import json
from typing import Any

import pytest

from main import create_app
from tests.conftest import person, running, settings_for


@pytest.mark.parametrize("most", [1, 3, 25])
async def test_a_task_beyond_the_limit_is_409(database_url: str, most: int) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=most))) as client:
        alice, bob = person("alice", client), person("bob", client)
        tasks = [await alice.create(str(number)) for number in range(most)]

        refused = await alice.post(json={"title": "one too many"})
        in_bulk = await alice.post(
            "/bulk", json={"operations": [{"op": "create", "task": {"title": "one too many"}}]}
        )
        of_bob = await bob.post(json={"title": "his first"})
        await alice.delete(f"/{tasks[0]['id']}")
        again = await alice.post(json={"title": "in its place"})

        assert (refused.status_code, in_bulk.status_code) == (409, 409)
        assert refused.json()["detail"] == f"There would be more tasks than the {most} that you may have"
        assert (of_bob.status_code, again.status_code) == (201, 201)
        assert len((await alice.get()).json()) == most


async def test_tasks_created_in_bulk_count_for_single_creates(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=30))) as client:
        alice = person("alice", client)
        await alice.create()

        create = {"op": "create", "task": {"title": "x"}}
        filled = await alice.post("/bulk", json={"operations": [create] * 29})

        assert filled.status_code == 200
        assert (await alice.post(json={"title": "one too many"})).status_code == 409


async def test_concurrent_creates_never_exceed_the_limit(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=10))) as client:
        alice = person("alice", client)

        for _ in range(5):
            await asyncio.gather(*(alice.post(json={"title": "x"}) for _ in range(4)))

        assert len((await alice.get()).json()) == 10


DAILY = {"due_date": "2026-11-21", "recurring": "daily"}


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/{id}/complete", None),
        ("PATCH", "/{id}/complete", {"completed": True}),
        ("PUT", "/{id}", {"completed": True}),
        ("PATCH", "/{id}", {"completed": True, "title": "changed"}),
        ("PATCH", "?status=pending", {"completed": True}),
        ("POST", "/bulk", {"operations": [{"op": "complete", "id": "{id}"}]}),
        ("POST", "/bulk", {"operations": [{"op": "update", "id": "{id}", "changes": {"completed": True}}]}),
    ],
)
async def test_a_successor_counts_towards_the_limit(
    database_url: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=3))) as client:
        alice = person("alice", client)
        task, other = await alice.create(**DAILY), await alice.create()
        url = path.format(id=task["id"])
        options = (
            {} if body is None else {"json": json.loads(json.dumps(body).replace('"{id}"', str(task["id"])))}
        )

        third = await alice.create()
        refused = await alice.send(method, url, **options)
        unchanged = (await alice.get(f"/{task['id']}")).json()
        await alice.delete(f"/{other['id']}")
        done = await alice.send(method, url, **options)

        assert refused.status_code == 409
        assert unchanged == task
        assert done.status_code == 200
        assert {each["due_date"] for each in (await alice.get()).json()} == {"2026-11-21", "2026-11-22", None}
        assert third["id"] in {each["id"] for each in (await alice.get()).json()}


async def test_completing_all_repeatedly_never_exceeds_the_task_limit(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=20))) as client:
        alice = person("alice", client)
        for _ in range(5):
            await alice.create(**DAILY)

        answers = [await alice.patch("?status=pending", json={"completed": True}) for _ in range(5)]

        assert [answer.status_code for answer in answers] == [200, 200, 200, 409, 409]
        assert len((await alice.get()).json()) == 20


async def test_concurrent_bulk_creates_never_exceed_the_limit(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=20))) as client:
        alice = person("alice", client)
        filling = {"operations": [{"op": "create", "task": {"title": "x"}}] * 10}

        answers = await asyncio.gather(*(alice.post("/bulk", json=filling) for _ in range(8)))

        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [409] * 6
        assert len((await alice.get()).json()) == 20


async def test_deletes_in_a_bulk_request_make_room_for_its_creates(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=2))) as client:
        alice = person("alice", client)
        task, _ = await alice.create(), await alice.create()
        create = {"op": "create", "task": {"title": "in its place"}}

        one = await alice.post("/bulk", json={"operations": [{"op": "delete", "id": task["id"]}, create]})
        two = await alice.post("/bulk", json={"operations": [create]})

        assert (one.status_code, two.status_code) == (200, 409)


async def test_a_limit_of_zero_is_no_limit(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=0))) as client:
        alice = person("alice", client)

        answers = [await alice.post(json={"title": "x"}) for _ in range(3)]

    assert {answer.status_code for answer in answers} == {201}
