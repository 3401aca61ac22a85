import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import func, select

from database.base import Database
from database.statements import named
from main import create_app
from queries.owner import LIVE, OWNED, TASKS, Owner
from queries.revisions import lock, revision_of
from tests.conftest import Person, person, running, settings_for

COUNTED = named("counted", select(func.count().label("count")).where(LIVE))
NUMBERED = named("numbered", select(TASKS.c.id, TASKS.c.revision).where(OWNED).order_by(TASKS.c.revision))


def owner_of(app: FastAPI, someone: Person) -> Owner:
    database: Database = app.state.services.database
    return Owner(someone.user_id, database)


async def revision_and_tasks(owner: Owner) -> tuple[int, list[tuple[int, int]]]:
    rows = await owner.all(NUMBERED)
    return await revision_of(owner), [(row["id"], row["revision"]) for row in rows]


async def test_each_change_takes_the_next_revision(app: FastAPI, alice: Person) -> None:
    owner = owner_of(app, alice)
    one, two = await alice.create(), await alice.create()
    assert await revision_and_tasks(owner) == (2, [(one["id"], 1), (two["id"], 2)])

    await alice.patch(f"/{one['id']}/complete")
    await alice.put(f"/{two['id']}", json={"title": "Changed"})
    assert await revision_and_tasks(owner) == (4, [(one["id"], 3), (two["id"], 4)])

    await alice.put(f"/{two['id']}", json={"title": "Changed"})  # changes nothing
    await alice.put("/7000000", json={"title": "Changed"})
    await alice.patch(f"/{one['id']}/complete", headers={"If-Match": '"77"'})
    assert await revision_and_tasks(owner) == (4, [(one["id"], 3), (two["id"], 4)])

    await alice.delete(f"/{one['id']}")
    assert await revision_and_tasks(owner) == (5, [(two["id"], 4), (one["id"], 5)])


DAILY = {"recurring": "daily", "due_date": "2026-01-01"}
CREATE = {"op": "create", "task": {"title": "x"}}


async def churn(someone: Person, number: int) -> None:
    """Change tasks in every way, so that some requests meet."""
    task = await someone.create(
        **({"recurring": "daily", "due_date": "2026-01-01"} if number % 3 == 0 else {})
    )
    await someone.post("/bulk", json={"operations": [CREATE, {"op": "complete", "id": task["id"]}]})
    first = (await someone.get("?sort=created_at&limit=1")).json()
    for each in first:
        await someone.delete(f"/{each['id']}")
        await someone.patch(f"/{each['id']}/complete")
    if number % 4 == 0:
        await someone.delete("?status=completed")
    await someone.patch("?status=pending", json={"completed": True})
    await someone.post(json={"title": "y"}, headers={"Idempotency-Key": str(number // 2)})


@pytest.mark.no_cover
async def test_counts_and_revisions_are_exact_after_concurrent_changes(app: FastAPI, alice: Person) -> None:
    await asyncio.gather(*(churn(alice, number) for number in range(24)))

    owner = owner_of(app, alice)
    row = await owner.one(COUNTED)
    revision, tasks = await revision_and_tasks(owner)
    assert row
    assert await lock(owner) == row["count"] == len((await alice.get()).json())
    assert revision == max(number for _, number in tasks)
    assert len(tasks) > 24


@pytest.mark.no_cover
async def test_a_list_with_the_same_etag_is_the_same(alice: Person) -> None:
    seen: dict[str, bytes] = {}
    writing = asyncio.create_task(_churn_by_and_by(alice))
    while not writing.done():
        for answer in await asyncio.gather(*(alice.get() for _ in range(3))):
            assert seen.setdefault(answer.headers["etag"], answer.content) == answer.content
    await writing

    assert len(seen) > 5


async def _churn_by_and_by(someone: Person) -> None:
    for number in range(8):
        await asyncio.gather(churn(someone, number), churn(someone, number + 100))


@pytest.mark.parametrize(
    "query", ["", "?status=pending", "?sort=title&limit=1", "?count=true", "?search=milk", "?tags=home"]
)
async def test_a_list_is_not_sent_again_until_a_task_changes(alice: Person, query: str) -> None:
    task = await alice.create("Buy milk", tags=["home"])
    await alice.create("Bake bread")
    tag = (await alice.get(query)).headers["etag"]
    known = {"If-None-Match": tag}

    same = await alice.get(query, headers=known)
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert (await alice.get(query, headers={"If-None-Match": f'"1", {tag}'})).status_code == 304
    assert (await alice.get(f"{query or '?'}&category=home", headers=known)).status_code == 200

    await alice.put(f"/{task['id']}", json={"title": "Buy milk"})
    assert (await alice.get(query, headers=known)).status_code == 304
    await alice.put(f"/{task['id']}", json={"title": "Buy oat milk"})
    changed = await alice.get(query, headers=known)
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


@pytest.mark.parametrize("change", ["create", "delete", "complete all", "delete all", "bulk"])
async def test_every_kind_of_change_changes_the_etag(alice: Person, change: str) -> None:
    task = await alice.create()
    before = [(await alice.get(path)).headers["etag"] for path in ("", "/stats?today=2026-01-01")]

    match change:
        case "create":
            await alice.create()
        case "delete":
            await alice.delete(f"/{task['id']}")
        case "complete all":
            await alice.patch("?status=pending", json={"completed": True})
        case "delete all":
            await alice.delete("?status=pending")
        case "bulk":
            await alice.post("/bulk", json={"operations": [CREATE]})

    after = [(await alice.get(path)).headers["etag"] for path in ("", "/stats?today=2026-01-01")]
    assert not set(before) & set(after)


async def test_an_empty_list_has_an_etag_too(alice: Person, bob: Person) -> None:
    tag = (await alice.get()).headers["etag"]

    assert (await alice.get(headers={"If-None-Match": tag})).status_code == 304
    await bob.create()
    assert (await alice.get(headers={"If-None-Match": tag})).status_code == 304
    await alice.create()
    assert (await alice.get(headers={"If-None-Match": tag})).json() != []


async def test_bulk_creates_of_a_new_user_at_once_never_exceed_the_limit(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=5))) as client:
        for number in range(5):  # there is no row that could be locked yet
            alice = person(f"alice{number}", client)
            answers: list[Any] = await asyncio.gather(
                *(alice.post("/bulk", json={"operations": [CREATE] * 3}) for _ in range(4))
            )

            assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
            assert len((await alice.get()).json()) == 3
