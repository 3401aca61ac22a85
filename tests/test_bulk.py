import asyncio
from typing import Any

import pytest

from tests.conftest import Person


async def bulk(person: Person, *operations: dict[str, Any], query: str = "") -> Any:
    return await person.post(f"/bulk{query}", json={"operations": list(operations)})


def create(title: str = "Buy milk", **fields: Any) -> dict[str, Any]:
    return {"op": "create", "task": {"title": title, **fields}}


def update(task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"op": "update", "id": task["id"], "changes": changes}


def operation(op: str, task: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"op": op, "id": task["id"], **more}


async def everything(person: Person) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await person.get("?order=asc&limit=1000")).json()
    return found


FULL: dict[str, Any] = {
    "title": "é \\ \" '; %",
    "description": "two\nlines",
    "completed": False,
    "priority": "low",
    "category": "home",
    "tags": ["ä", 'b"', "c\\", "😀"],
    "due_date": "2026-02-28",
    "due_time": "23:59",
    "recurring": "weekly",
    "reminder": True,
}


async def test_each_bulk_operation_has_its_own_result(alice: Person) -> None:
    one, two, three = [await alice.create(str(number)) for number in range(3)]

    answer = await bulk(
        alice,
        create(**FULL),
        update(one, **FULL),
        operation("complete", two),
        operation("delete", three),
        create("second"),
    )

    results = answer.json()["results"]
    assert answer.status_code == 200
    assert [result["status"] for result in results] == [201, 200, 200, 204, 201]
    created, updated, completed, deleted, second = (result.get("task") for result in results)
    assert created == FULL | {name: created[name] for name in created.keys() - FULL.keys()}
    assert updated == one | FULL | {"version": 2, "updated_at": updated["updated_at"]}
    assert (completed["completed"], completed["completed_at"]) == (True, completed["updated_at"])
    assert deleted is None
    assert (second["title"], second["version"]) == ("second", 1)
    assert second["id"] > created["id"] > three["id"]
    assert await everything(alice) == [updated, completed, created, second]


async def test_operations_build_on_one_another(alice: Person) -> None:
    task = await alice.create(tags=["a"])

    answer = await bulk(
        alice,
        update(task, title="first"),
        update(task, title="second", tags=["b"]) | {"version": 2},
        operation("complete", task),
        operation("complete", task, completed=False),
        update(task, title="second"),
        query="?atomic=true",
    )

    versions = [result["task"]["version"] for result in answer.json()["results"]]
    assert versions == [2, 3, 4, 5, 5]
    (after,) = await everything(alice)
    assert after == answer.json()["results"][-1]["task"]
    assert (after["title"], after["tags"], after["completed_at"]) == ("second", ["b"], None)


FAILURES: dict[str, tuple[dict[str, Any], int, dict[str, str]]] = {
    "not there": ({"op": "delete", "id": 2**53}, 404, {}),
    "changed since": ({"op": "update", "version": 9, "changes": {"title": "x"}}, 412, {"etag": '"1"'}),
    "changed since, to delete": ({"op": "delete", "version": 9}, 412, {"etag": '"1"'}),
}


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_failed_operation_rolls_back_all_and_is_named_by_index(alice: Person, failure: str) -> None:
    task, other = await alice.create("task"), await alice.create("other")
    wrong, status, members = FAILURES[failure]
    wrong = {"id": task["id"], **wrong}

    answer = await bulk(alice, update(other, title="changed"), create(), wrong, operation("delete", other))

    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["index"]) == (status, status, 2)
    assert problem.get("etag") == members.get("etag")
    assert await everything(alice) == [task, other]


@pytest.mark.parametrize("failure", FAILURES)
async def test_with_atomic_false_the_other_operations_are_done(alice: Person, failure: str) -> None:
    task, other = await alice.create("task"), await alice.create("other")
    wrong, status, members = FAILURES[failure]
    wrong = {"id": task["id"], **wrong}

    answer = await bulk(alice, update(other, title="changed"), wrong, create("new"), query="?atomic=false")

    results = answer.json()["results"]
    assert answer.status_code == 207
    assert [result["status"] for result in results] == [200, status, 201]
    assert (results[1]["status"], results[1].get("etag")) == (status, members.get("etag"))
    assert [found["title"] for found in await everything(alice)] == ["task", "changed", "new"]


async def test_another_users_task_looks_absent_in_bulk(alice: Person, bob: Person) -> None:
    task = await alice.create()

    answer = await bulk(
        bob,
        update(task, title="Mine now"),
        operation("complete", task),
        operation("delete", task),
        query="?atomic=false",
    )

    assert [result["status"] for result in answer.json()["results"]] == [404, 404, 404]
    assert await everything(alice) == [task]


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "/operations", "is required"),
        ({"operations": []}, "/operations", "must have at least 1 element"),
        ({"operations": [create()] * 101}, "/operations", "must have at most 100 elements"),
        ({"operations": {}}, "/operations", "must be a list"),
        ({"operations": [{}]}, "/operations/0", "must have an op: create, update, complete or delete"),
        ({"operations": ["x"]}, "/operations/0", "must have an op: create, update, complete or delete"),
        ({"operations": [{"op": "<create>"}]}, "/operations/0", None),
        ({"operations": [{"op": ["create"]}]}, "/operations/0", None),
        ({"operations": [create(), {"op": "create"}]}, "/operations/1/task", "is required"),
        ({"operations": [create(title="")]}, "/operations/0/task/title", "must be 1 to 200 characters"),
        ({"operations": [create(tags=[""])]}, "/operations/0/task/tags/0", "must be 1 to 30 characters"),
        ({"operations": [{"op": "delete"}]}, "/operations/0/id", "is required"),
        ({"operations": [{"op": "delete", "id": 0}]}, "/operations/0/id", "must be at least 1"),
        ({"operations": [{"op": "delete", "id": 2**63}]}, "/operations/0/id", None),
        ({"operations": [{"op": "delete", "id": "1"}]}, "/operations/0/id", "must be a whole number"),
        ({"operations": [{"op": "delete", "id": True}]}, "/operations/0/id", "must be a whole number"),
        ({"operations": [{"op": "complete", "id": 1, "completed": None}]}, "/operations/0/completed", None),
        ({"operations": [{"op": "update", "id": 1}]}, "/operations/0/changes", "is required"),
    ],
)
async def test_an_invalid_bulk_body_is_422_with_a_json_pointer(
    alice: Person, body: object, pointer: str, detail: str | None
) -> None:
    answer = await alice.post("/bulk", json=body)

    assert answer.status_code == 422
    (mistake,) = answer.json()["errors"]
    assert mistake["pointer"] == pointer
    assert detail in (None, mistake["detail"])


async def test_a_bulk_request_may_have_100_operations(alice: Person) -> None:
    made = (await bulk(alice, *(create(f"task {number}") for number in range(100)))).json()["results"]
    tasks = [result["task"] for result in made]

    await bulk(alice, *(update(task, priority="high") for task in tasks))
    assert {task["priority"] for task in await everything(alice)} == {"high"}
    await bulk(alice, *(operation("delete", task) for task in tasks))

    assert [task["title"] for task in tasks] == [f"task {number}" for number in range(100)]
    assert await everything(alice) == []


async def test_concurrent_bulk_updates_lose_nothing(alice: Person) -> None:
    tasks = [await alice.create(str(number)) for number in range(10)]
    toggles = [
        bulk(
            alice,
            *(update(task, description=str(number)) for task in (tasks if number % 2 else reversed(tasks))),
        )
        for number in range(20)
    ]

    answers = await asyncio.gather(*toggles)

    assert {answer.status_code for answer in answers} == {200}
    assert {task["version"] for task in await everything(alice)} == {21}


async def test_clear_completed(alice: Person, bob: Person) -> None:
    for person in (bob, alice):
        await person.create("open")
        done = await person.create("done", completed=True)

    answer = await alice.delete("?status=completed")

    assert (answer.status_code, answer.json()) == (200, {"count": 1, "ids": [done["id"]]})
    assert [task["title"] for task in await everything(alice)] == ["open"]
    assert len(await everything(bob)) == 2


async def test_complete_all_and_reopen_all(alice: Person, bob: Person) -> None:
    await bob.create("his")
    tasks = [await alice.create(str(number)) for number in range(3)]
    done = await alice.create("done", completed=True)

    completed = await alice.patch("?status=pending", json={"completed": True})
    after = await everything(alice)
    reopened = await alice.patch("?search=2", json={"completed": False})

    assert (completed.json(), reopened.json()) == ({"count": 3}, {"count": 1})
    assert [task["version"] for task in after] == [2, 2, 2, 1]
    assert after[:3] == [
        task
        | {"completed": True, "version": 2}
        | dict.fromkeys(("completed_at", "updated_at"), now["updated_at"])
        for task, now in zip(tasks, after, strict=False)
    ]
    assert after[3] == done
    assert [task["completed"] for task in await everything(alice)] == [True, True, False, True]
    assert [task["completed"] for task in await everything(bob)] == [False]


@pytest.mark.parametrize("query", ["", "?", "?status=all", "?search=", "?unknown=1", "?limit=1&sort=title"])
async def test_patch_and_delete_of_many_without_a_filter_are_422(alice: Person, query: str) -> None:
    task = await alice.create()

    answers = [await alice.delete(query), await alice.patch(query, json={"completed": True})]

    assert [answer.status_code for answer in answers] == [422, 422]
    assert await everything(alice) == [task]


@pytest.mark.parametrize("body", [{}, {"completed": None}, {"completed": "true"}, []])
async def test_complete_all_requires_completed(alice: Person, body: object) -> None:
    answer = await alice.patch("?status=pending", json=body)

    assert answer.status_code == 422


async def test_delete_of_many_accepts_any_filter(alice: Person) -> None:
    for tag in ("old", "new"):
        await alice.create(tag, tags=[tag], due_date="2026-01-01" if tag == "old" else None)

    assert (await alice.delete("?tags=old&due_date_to=2026-06-30&search=OLD")).json()["count"] == 1
    assert [task["title"] for task in await everything(alice)] == ["new"]


async def test_concurrent_changes_of_many_tasks_do_not_deadlock(alice: Person) -> None:
    tasks = [await alice.create(tags=["a"]) for _ in range(40)]

    async def change(number: int) -> int:
        match number % 3:
            case 0:
                answer = await alice.patch("?tags=a", json={"completed": bool(number % 2)})
            case 1:
                answer = await bulk(alice, *(update(task, category=str(number)) for task in tasks))
            case _:
                answer = await bulk(alice, *(update(task, title=str(number)) for task in reversed(tasks)))
        return int(answer.status_code)

    assert set(await asyncio.gather(*(change(number) for number in range(60)))) == {200}


CHANGES_OF_MANY = [("DELETE", None), ("PATCH", {"completed": True})]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("status=completed&categories=drop&limit=1", ["categories", "limit"]),
        ("status=completed&Status=pending", ["Status"]),
        ("status=completed&sort=title", ["sort"]),
        ("status=completed&=", [""]),
    ],
)
@pytest.mark.parametrize(("method", "body"), CHANGES_OF_MANY)
async def test_an_unknown_parameter_of_a_change_of_many_is_422(
    alice: Person, method: str, body: object, query: str, named: list[str]
) -> None:
    tasks = [await alice.create(completed=True, category="keep") for _ in range(2)]
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"?{query}", **options)

    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"parameter": name, "detail": "is not a parameter of this operation"} for name in named
    ]
    assert (await alice.get()).json() == tasks[::-1]


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("status=pending&status=completed", ["status"]),
        ("status=pending&status=pending", ["status"]),
        ("q=a&search=b&q=c&search=d", ["q", "search"]),
    ],
)
@pytest.mark.parametrize(("method", "body"), CHANGES_OF_MANY)
async def test_a_repeated_single_value_parameter_of_a_change_of_many_is_422(
    alice: Person, method: str, body: object, query: str, named: list[str]
) -> None:
    task = await alice.create(title="abcd")
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"?{query}", **options)

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"parameter": name, "detail": "must be sent once"} for name in named]
    assert (await alice.get()).json() == [task]


async def test_a_change_of_many_accepts_repeated_category_and_tags(alice: Person) -> None:
    await alice.create(category="a", tags=["x", "y"])
    await alice.create(category="b", tags=["x", "y"])
    await alice.create(category="c", tags=["x", "y"])

    answer = await alice.delete("?category=a&category=b&tags=x&tags=y")

    assert answer.json()["count"] == 2


@pytest.mark.parametrize("query", ["atomic=true&atomic=false", "atomc=false"])
async def test_an_unknown_or_repeated_parameter_of_bulk_is_422(alice: Person, query: str) -> None:
    answer = await alice.post(
        f"/bulk?{query}", json={"operations": [{"op": "create", "task": {"title": "x"}}]}
    )

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == query.partition("=")[0]
    assert (await alice.get()).json() == []


async def test_a_list_ignores_unknown_parameters(alice: Person) -> None:
    task = await alice.create()

    assert (await alice.get("?status=completed&status=pending&categories=x")).json() == [task]
