import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import func, select

from database.statements import named
from main import create_app
from queries.owner import LIVE, OWNED, TASKS, Owner
from queries.revisions import lock, revision_of
from tests.conftest import Person, pages, person, running, settings_for
from web import answers

ROWS = named("rows", select(*TASKS.c).where(OWNED).order_by(TASKS.c.id))
COUNTED = named("counted", select(func.count().label("count")).where(LIVE))


def owner_of(app: FastAPI, someone: Person) -> Owner:
    return Owner(someone.user_id, app.state.services.database)


async def in_trash(someone: Person) -> list[int]:
    return [task["id"] for page in await pages(someone, "/trash") for task in page]


async def deleted(someone: Person, **fields: Any) -> dict[str, Any]:
    task = await someone.create(**fields)
    assert (await someone.delete(f"/{task['id']}")).status_code == 204
    return task


EVERY_FIELD: dict[str, Any] = {
    "title": "Secret plan",
    "description": "Nobody may read this",
    "priority": "high",
    "category": "private",
    "tags": ["secret"],
    "due_date": "2026-12-24",
    "due_time": "18:00",
    "recurring": "daily",
    "reminder": True,
}


async def test_a_deleted_task_is_in_the_trash_and_nowhere_else(alice: Person) -> None:
    task = await alice.create(**EVERY_FIELD)
    await alice.delete(f"/{task['id']}")

    (trashed,) = (await alice.get("/trash")).json()
    lists = [(await alice.get(path)).json() for path in ("", "?search=secret", "?tags=secret")]
    answers = [
        await alice.get(f"/{task['id']}"),
        await alice.put(f"/{task['id']}", json={"title": "x"}),
        await alice.patch(f"/{task['id']}/complete"),
        await alice.delete(f"/{task['id']}"),
    ]

    assert lists == [[], [], []]
    assert (await alice.get("/stats")).json()["total"] == 0
    assert [answer.status_code for answer in answers] == [404] * 4
    assert trashed["deleted_at"] == trashed["updated_at"] > task["updated_at"]
    assert trashed == task | {
        "version": 2,
        "updated_at": trashed["updated_at"],
        "deleted_at": trashed["deleted_at"],
    }


async def test_the_last_deleted_comes_first_and_ties_by_id_descending(alice: Person) -> None:
    one, two, three, four = [await alice.create(category="c") for _ in range(4)]
    await alice.delete(f"/{three['id']}")
    await alice.delete("?category=c")  # all at the same time

    assert await in_trash(alice) == [four["id"], two["id"], one["id"], three["id"]]


async def test_pages_of_the_trash_have_every_task_once(alice: Person) -> None:
    for category in "abcab":
        await alice.create(category=category)
    for category in "ab":
        await alice.delete(f"?category={category}")

    found = await pages(alice, "/trash?limit=1")
    whole = await alice.get("/trash?limit=4")

    assert [len(page) for page in found] == [1, 1, 1, 1]
    assert [task for page in found for task in page] == whole.json()
    assert "link" not in whole.headers


async def test_a_page_of_the_trash_ends_before_it_is_too_large(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        await deleted(alice)
    monkeypatch.setattr(answers, "PAGE_MAX_BYTES", 1000)

    found = await pages(alice, "/trash")

    assert [len(page) for page in found] == [2, 2, 1]


async def test_a_cursor_of_another_list_or_user_is_422(alice: Person, bob: Person) -> None:
    for someone in (alice, bob):
        for _ in range(2):
            await someone.create()
            await deleted(someone)
    of_list = (await alice.get("?limit=1")).links["next"]["url"].partition("?")[2]
    of_bob = (await bob.get("/trash?limit=1")).links["next"]["url"].partition("?")[2]
    own = (await alice.get("/trash?limit=1")).links["next"]["url"].partition("?")[2]

    statuses = [(await alice.get(f"/trash?{query}")).status_code for query in (of_list, of_bob, own)]
    in_list = await alice.get(f"?{own}")

    assert (statuses, in_list.status_code) == ([422, 422, 200], 422)


async def test_the_trash_is_not_kept_by_browsers(alice: Person) -> None:
    await deleted(alice)

    answer = await alice.get("/trash")

    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers
    assert (await alice.send("HEAD", "/trash")).status_code == 200


async def test_restoring_brings_the_same_task_back(app: FastAPI, alice: Person) -> None:
    task = await deleted(alice, **EVERY_FIELD)
    before = (await alice.get("/trash")).json()[0]
    revision = await revision_of(owner_of(app, alice))

    answer = await alice.post(f"/{task['id']}/restore")
    again = await alice.post(f"/{task['id']}/restore")

    assert answer.status_code == 200
    assert answer.headers["etag"] == '"3"'
    restored = answer.json()
    assert restored == task | {"version": 3, "updated_at": restored["updated_at"]}
    assert restored["updated_at"] > before["updated_at"]
    assert (again.status_code, again.content) == (200, answer.content)
    assert (await alice.get()).json() == [restored]
    assert await in_trash(alice) == []
    assert await revision_of(owner_of(app, alice)) == revision + 1


async def test_restoring_many_ignores_other_ids(alice: Person, bob: Person) -> None:
    one, two, three = [await deleted(alice) for _ in range(3)]
    live, of_bob = await alice.create(), await deleted(bob)
    await alice.delete(f"/trash/{three['id']}")
    ids = [two["id"], one["id"], live["id"], of_bob["id"], three["id"], 2**63 - 1, one["id"]]

    answer = await alice.post("/restore", json={"ids": ids})
    again = await alice.post("/restore", json={"ids": ids})

    assert (answer.status_code, answer.json()) == (200, {"count": 2, "ids": [one["id"], two["id"]]})
    assert again.json() == {"count": 0, "ids": []}
    assert len((await alice.get()).json()) == 3
    assert await in_trash(bob) == [of_bob["id"]]


@pytest.mark.parametrize(
    "body", [None, {}, {"ids": []}, {"ids": [0]}, {"ids": [2**63]}, {"ids": ["1"]}, {"ids": [1] * 1001}]
)
async def test_restoring_many_needs_1_to_1000_ids(alice: Person, body: Any) -> None:
    assert (await alice.post("/restore", json=body)).status_code == 422
    assert (await alice.post("/restore", json={"ids": [1] * 1000})).status_code == 200


async def test_another_users_trash_looks_empty(alice: Person, bob: Person) -> None:
    task = await deleted(alice)
    paths = (f"/{task['id']}/restore", f"/trash/{task['id']}")

    answers = [await bob.post(paths[0]), await bob.delete(paths[1])]
    for headers in ({"If-Match": '"2"'}, {"If-None-Match": '"7"'}):
        answers += [await bob.post(paths[0], headers=headers), await bob.delete(paths[1], headers=headers)]
    emptied = await bob.delete("/trash")
    unknown = await bob.post("/70000000000/restore")

    assert {(answer.status_code, answer.json()["detail"]) for answer in answers} == {(404, "Task not found")}
    assert unknown.json()["detail"] == "Task not found"
    assert emptied.json() == {"count": 0}
    assert (await bob.get("/trash")).json() == []
    assert await in_trash(alice) == [task["id"]]


async def test_deleting_for_good_leaves_only_a_tombstone(app: FastAPI, alice: Person) -> None:
    owner = owner_of(app, alice)
    task = await deleted(alice, **EVERY_FIELD)
    (before,) = await owner.all(ROWS)

    first, again = [await alice.delete(f"/trash/{task['id']}") for _ in range(2)]
    restored = await alice.post(f"/{task['id']}/restore")

    (row,) = await owner.all(ROWS)
    assert (first.status_code, first.content, again.status_code, restored.status_code) == (204, b"", 404, 404)
    assert await in_trash(alice) == []
    kept = {name: value for name, value in row.items() if value not in (None, "", [], False)}
    names = ("id", "user_id", "version", "created_at", "updated_at", "revision", "deleted_at")
    assert kept == {name: before[name] for name in names} | {"erased": True}
    assert await revision_of(owner) == row["revision"]


async def test_emptying_the_trash_erases_all_of_it_and_nothing_else(
    app: FastAPI, alice: Person, bob: Person
) -> None:
    live, of_bob = await alice.create(), await deleted(bob)
    for _ in range(3):
        await deleted(alice, **EVERY_FIELD)
    revision = await revision_of(owner_of(app, alice))

    first, again = [await alice.delete("/trash") for _ in range(2)]

    assert (first.status_code, first.json(), again.json()) == (200, {"count": 3}, {"count": 0})
    rows = await owner_of(app, alice).all(ROWS)
    assert [row["title"] for row in rows] == [live["title"], "", "", ""]
    assert await revision_of(owner_of(app, alice)) == revision
    assert await in_trash(bob) == [of_bob["id"]]


async def test_a_live_task_is_not_in_the_trash(alice: Person) -> None:
    task = await alice.create()

    answers = [
        await alice.delete(f"/trash/{task['id']}", headers=headers)
        for headers in ({}, {"If-Match": '"1"'}, {"If-None-Match": '"7"'})
    ]

    assert [answer.status_code for answer in answers] == [404] * 3
    assert (await alice.get()).json() == [task]


CONDITIONS = [
    ({"If-Match": '"2"'}, True),
    ({"If-Match": "*"}, True),
    ({"If-Match": '"1", "2"'}, True),
    ({"If-None-Match": '"1"'}, True),
    ({"If-Match": '"1"'}, False),
    ({"If-Match": 'W/"2"'}, False),
    ({"If-None-Match": '"2"'}, False),
    ({"If-None-Match": "*"}, False),
]


@pytest.mark.parametrize("state", ["in the trash", "alive"])
@pytest.mark.parametrize(("headers", "holds"), CONDITIONS, ids=str)
async def test_restoring_obeys_conditions(
    alice: Person, state: str, headers: dict[str, str], holds: bool
) -> None:
    task = await deleted(alice) if state == "in the trash" else await alice.create()
    if state == "alive":
        await alice.put(f"/{task['id']}", json={"title": "Changed"})

    answer = await alice.post(f"/{task['id']}/restore", headers=headers)

    assert answer.status_code == (200 if holds else 412)
    assert answer.headers["etag"] == ('"3"' if holds and state == "in the trash" else '"2"')
    assert (await alice.get(f"/{task['id']}")).status_code == (200 if holds or state == "alive" else 404)


@pytest.mark.parametrize(("headers", "holds"), CONDITIONS, ids=str)
async def test_deleting_for_good_obeys_conditions(
    alice: Person, headers: dict[str, str], holds: bool
) -> None:
    task = await deleted(alice)

    answer = await alice.delete(f"/trash/{task['id']}", headers=headers)

    assert answer.status_code == (204 if holds else 412)
    assert await in_trash(alice) == ([] if holds else [task["id"]])


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/trash"), ("DELETE", "/trash"), ("POST", "/restore")])
async def test_conditions_on_what_has_no_etag_are_422(
    alice: Person, method: str, path: str, header: str
) -> None:
    task = await deleted(alice)
    body = {"json": {"ids": [task["id"]]}} if method == "POST" else {}

    answer = await alice.send(method, path, headers={header: "*"}, **body)

    assert (answer.status_code, answer.json()["detail"]) == (422, f"{header}: is for single tasks only")
    assert await in_trash(alice) == [task["id"]]


@pytest.mark.parametrize("query", ["?ids=1", "?status=completed", "?x"])
async def test_a_filter_of_the_whole_trash_is_422(alice: Person, query: str) -> None:
    task = await deleted(alice)

    answers = [
        await alice.delete(f"/trash{query}"),
        await alice.post(f"/restore{query}", json={"ids": [task["id"]]}),
    ]

    assert [answer.status_code for answer in answers] == [422, 422]
    assert await in_trash(alice) == [task["id"]]


@pytest.mark.parametrize("task_id", ["0", "-1", "x", "1_0", str(2**63)])
async def test_invalid_ids_are_422(alice: Person, task_id: str) -> None:
    answers = [await alice.post(f"/{task_id}/restore"), await alice.delete(f"/trash/{task_id}")]

    assert [answer.status_code for answer in answers] == [422, 422]


async def test_restoring_beyond_the_limit_is_409_and_restores_nothing(database_url: str) -> None:
    app = create_app(settings_for(database_url, max_tasks_per_user=3))
    async with running(app) as client:
        alice = person("alice", client)
        tasks = [await deleted(alice) for _ in range(3)]
        ids = [task["id"] for task in tasks]
        await alice.create()

        refused = await alice.post("/restore", json={"ids": ids})
        before = await in_trash(alice)
        two = await alice.post("/restore", json={"ids": ids[:2]})
        one = await alice.post(f"/{ids[2]}/restore")
        alive = await alice.post(f"/{ids[0]}/restore")
        none = await alice.post("/restore", json={"ids": ids[:2]})

        assert refused.json()["detail"] == "There would be more tasks than the 3 that you may have"
        statuses = [answer.status_code for answer in (refused, two, one, alive, none)]
        assert statuses == [409, 200, 409, 200, 200]
        assert (before, await in_trash(alice)) == (ids[::-1], [ids[2]])
        assert len((await alice.get()).json()) == await lock(owner_of(app, alice)) == 3


async def test_what_a_lower_limit_no_longer_allows_stays(database_url: str) -> None:
    async with running(create_app(settings_for(database_url))) as client:
        alice = person("alice", client)
        tasks = [await alice.create() for _ in range(3)]
    async with running(create_app(settings_for(database_url, max_tasks_per_user=1))) as client:
        alice = Person(alice.user_id, client, alice.token)

        one = await alice.post(f"/{tasks[0]['id']}/restore")
        many = await alice.post("/restore", json={"ids": [tasks[0]["id"]]})

    assert (one.status_code, many.json()) == (200, {"count": 0, "ids": []})


async def test_with_delete_status_200_deleting_for_good_is_200_too(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, delete_status="200"))) as client:
        alice = person("alice", client)
        task = await alice.create()
        await alice.delete(f"/{task['id']}")

        answer = await alice.delete(f"/trash/{task['id']}")

    assert (answer.status_code, answer.json()) == (200, {"ok": True})


async def test_a_kept_answer_is_replayed_while_its_task_is_in_the_trash_and_after(alice: Person) -> None:
    key = {"Idempotency-Key": "once"}
    first = await alice.post(json={"title": "x"}, headers=key)
    await alice.delete(f"/{first.json()['id']}")

    of_trashed = await alice.post(json={"title": "x"}, headers=key)
    await alice.delete("/trash")
    of_erased = await alice.post(json={"title": "x"}, headers=key)

    for answer in (of_trashed, of_erased):
        assert (answer.status_code, answer.content) == (201, first.content)
        assert answer.headers["idempotent-replayed"] == "true"
    assert (await alice.get()).json() == []


async def test_the_trash_is_served_under_v1_too(alice: Person) -> None:
    task = await deleted(alice)
    base = f"/api/v1/{alice.user_id}/tasks"

    assert [each["id"] for each in (await alice.get(f"{base}/trash")).json()] == [task["id"]]
    assert (await alice.post(f"{base}/{task['id']}/restore")).status_code == 200


async def churn(someone: Person, ids: list[int], number: int) -> list[httpx.Response]:
    """Send requests of every kind that meet at the same tasks."""
    task_id = ids[number % len(ids)]
    some, others = ids[number % 3 :], ids[:: -1 - number % 2]
    requests = [
        someone.delete(f"/{task_id}"),
        someone.post(f"/{task_id}/restore"),
        someone.post("/restore", json={"ids": others}),
        someone.delete(f"/trash/{task_id}"),
        someone.post(json={"title": "x", "category": "new"}),
        someone.delete("?category=new"),
        someone.post("/bulk?atomic=false", json={"operations": [{"op": "delete", "id": i} for i in some]}),
        someone.patch(f"/{task_id}/complete"),
    ]
    if number % 6 == 5:
        requests.append(someone.delete("/trash"))
    return await asyncio.gather(*requests)


async def test_counts_and_revisions_are_exact_after_concurrent_deletes_restores_and_erasures(
    app: FastAPI, alice: Person
) -> None:
    for numbers in (range(4), range(4, 8), range(8, 12)):
        ids = [(await alice.create())["id"] for _ in range(12)]
        answers = await asyncio.gather(*(churn(alice, ids, number) for number in numbers))
        statuses = {answer.status_code for several in answers for answer in several}
        assert statuses <= {200, 201, 204, 207, 404}

    owner = owner_of(app, alice)
    counted, rows = await owner.one(COUNTED), await owner.all(ROWS)
    assert counted
    assert await lock(owner) == counted["count"] == len((await alice.get()).json())
    assert await revision_of(owner) == max(row["revision"] for row in rows)
    assert {(row["deleted_at"] is None, row["erased"]) for row in rows} >= {(False, True)}
    assert not [row for row in rows if row["erased"] and (row["title"] or row["deleted_at"] is None)]


async def test_concurrent_restores_never_exceed_the_limit(database_url: str) -> None:
    app = create_app(settings_for(database_url, max_tasks_per_user=6))
    async with running(app) as client:
        alice = person("alice", client)
        ids = [(await deleted(alice))["id"] for _ in range(12)]

        await asyncio.gather(
            *(alice.post(f"/{task_id}/restore") for task_id in ids),
            *(alice.post("/restore", json={"ids": ids[start : start + 3]}) for start in range(0, 12, 3)),
            *(alice.post(json={"title": "x"}) for _ in range(4)),
        )

        assert len((await alice.get()).json()) == await lock(owner_of(app, alice)) == 6


async def test_without_a_trash_deleting_is_for_good_at_once(database_url: str) -> None:
    app = create_app(settings_for(database_url, trash_days=0))
    async with running(app) as client:
        alice = person("alice", client)
        ids = [(await alice.create(**EVERY_FIELD))["id"] for _ in range(4)]

        one = await alice.delete(f"/{ids[0]}", headers={"If-Match": '"1"'})
        bulk = await alice.post("/bulk", json={"operations": [{"op": "delete", "id": ids[1]}]})
        some = await alice.delete("?tags=secret&category=private")
        restored = await alice.post("/restore", json={"ids": ids})

        assert (one.status_code, bulk.status_code) == (204, 200)
        assert some.json() == {"count": 2, "ids": ids[2:]}
        assert restored.json() == {"count": 0, "ids": []}
        assert await in_trash(alice) == []
        rows = await owner_of(app, alice).all(ROWS)
        assert [(row["title"], row["erased"], row["version"]) for row in rows] == [("", True, 2)] * 4
        assert [row["revision"] for row in rows][:3] == [5, 6, 7]
        assert await lock(owner_of(app, alice)) == 0
