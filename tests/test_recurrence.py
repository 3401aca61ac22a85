import asyncio
from datetime import date
from typing import Any

import pytest

from queries.recurrence import next_due_date
from tests.conftest import Person


@pytest.mark.parametrize(
    ("recurring", "due_date", "day", "following"),
    [
        ("daily", "2026-02-28", 28, "2026-03-01"),
        ("daily", "2028-02-28", 28, "2028-02-29"),
        ("daily", "2026-12-31", 31, "2027-01-01"),
        ("weekly", "2026-12-28", 28, "2027-01-04"),
        ("monthly", "2026-01-31", 31, "2026-02-28"),
        ("monthly", "2028-01-31", 31, "2028-02-29"),
        ("monthly", "2026-02-28", 31, "2026-03-31"),
        ("monthly", "2026-02-28", 28, "2026-03-28"),
        ("monthly", "2026-03-31", 31, "2026-04-30"),
        ("monthly", "2026-12-15", 15, "2027-01-15"),
        ("daily", "9999-12-31", 31, None),
        ("weekly", "9999-12-25", 25, None),
        ("monthly", "9999-12-01", 1, None),
    ],
)
def test_the_next_due_date_of_a_series(
    recurring: str, due_date: str, day: int, following: str | None
) -> None:
    found = next_due_date(date.fromisoformat(due_date), recurring, day)

    assert found == (following and date.fromisoformat(following))


async def series(person: Person, due_date: str = "2026-01-31", recurring: str = "monthly") -> dict[str, Any]:
    return await person.create(
        "Pay the rent",
        description="By transfer",
        priority="high",
        category="home",
        tags=["money"],
        due_date=due_date,
        due_time="09:30",
        recurring=recurring,
        reminder=True,
    )


async def tasks(person: Person) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await person.get("?order=asc")).json()
    return found


COMPLETIONS: dict[str, tuple[str, str, Any]] = {
    "toggled": ("PATCH", "/{}/complete", None),
    "set": ("PATCH", "/{}/complete", {"completed": True}),
    "put": ("PUT", "/{}", {"completed": True}),
    "patched": ("PATCH", "/{}", {"completed": True}),
    "in bulk": ("POST", "/bulk", "operations"),
    "all": ("PATCH", "?status=pending", {"completed": True}),
}


async def complete(person: Person, task_id: int, way: str) -> int:
    method, path, body = COMPLETIONS[way]
    if body == "operations":
        body = {"operations": [{"op": "complete", "id": task_id}]}
    options = {} if body is None else {"json": body}
    return (await person.send(method, path.format(task_id), **options)).status_code


@pytest.mark.parametrize("way", COMPLETIONS)
async def test_completing_a_recurring_task_creates_the_next(alice: Person, way: str) -> None:
    task = await series(alice)

    assert await complete(alice, task["id"], way) == 200

    done, following = await tasks(alice)
    assert (done["completed"], done["version"], done["due_date"]) == (True, 2, "2026-01-31")
    assert following["id"] > done["id"]
    assert following == task | {
        "id": following["id"],
        "due_date": "2026-02-28",
        "created_at": done["completed_at"],
        "updated_at": done["completed_at"],
    }


@pytest.mark.parametrize("way", COMPLETIONS)
async def test_a_short_month_keeps_the_anchor_day(alice: Person, way: str) -> None:
    await series(alice)

    for _ in range(3):
        *_, last = await tasks(alice)
        await complete(alice, last["id"], way)

    assert [task["due_date"] for task in await tasks(alice)] == [
        "2026-01-31",
        "2026-02-28",
        "2026-03-31",
        "2026-04-30",
    ]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_resending_the_same_due_date_keeps_the_anchor_day(alice: Person, method: str) -> None:
    await series(alice)
    await complete(alice, (await tasks(alice))[-1]["id"], "toggled")
    february = (await tasks(alice))[-1]

    await alice.send(method, f"/{february['id']}", json=february)
    await complete(alice, february["id"], "toggled")

    assert (await tasks(alice))[-1]["due_date"] == "2026-03-31"


async def test_a_new_due_date_sets_the_anchor_day(alice: Person) -> None:
    await series(alice)
    await complete(alice, (await tasks(alice))[-1]["id"], "toggled")
    february = (await tasks(alice))[-1]

    await alice.patch(f"/{february['id']}", json={"due_date": "2026-02-27"})
    await complete(alice, february["id"], "toggled")

    assert (await tasks(alice))[-1]["due_date"] == "2026-03-27"


@pytest.mark.parametrize("way", [way for way in COMPLETIONS if way != "toggled"])
async def test_completing_twice_makes_one_successor(alice: Person, way: str) -> None:
    task = await series(alice, recurring="daily")

    for _ in range(2):
        await complete(alice, task["id"], way if way != "all" else "set")

    assert [task["due_date"] for task in await tasks(alice)] == ["2026-01-31", "2026-02-01"]


@pytest.mark.parametrize("way", COMPLETIONS)
async def test_reopening_and_completing_again_makes_no_second_successor(alice: Person, way: str) -> None:
    task = await series(alice, recurring="daily")
    await complete(alice, task["id"], way)

    reopened = await alice.put(f"/{task['id']}", json={"completed": False})
    await complete(alice, task["id"], way)

    assert (reopened.json()["completed"], reopened.json()["completed_at"]) == (False, None)
    assert len([task for task in await tasks(alice) if task["due_date"] <= "2026-02-01"]) == 2


async def test_a_reopened_task_with_a_new_due_date_has_a_successor_again(alice: Person) -> None:
    task = await series(alice, recurring="daily")
    await complete(alice, task["id"], "set")

    await alice.put(f"/{task['id']}", json={"completed": False, "due_date": "2026-03-01"})
    await complete(alice, task["id"], "set")

    assert [task["due_date"] for task in await tasks(alice)] == ["2026-03-01", "2026-02-01", "2026-03-02"]


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"recurring": "daily"}, {"completed": True}),
        ({"due_date": "2026-01-31"}, {"completed": True}),
        ({"due_date": "2026-01-31", "recurring": "daily"}, {"completed": True, "recurring": None}),
        ({"due_date": "2026-01-31", "recurring": "daily"}, {"completed": True, "due_date": None}),
        ({"due_date": "2026-01-31", "recurring": "daily"}, {"title": "Changed"}),
        ({"due_date": "9999-12-31", "recurring": "daily"}, {"completed": True}),
    ],
)
async def test_a_change_that_completes_no_series_makes_no_successor(
    alice: Person, fields: dict[str, str], change: dict[str, object]
) -> None:
    task = await alice.create(**fields)

    answer = await alice.patch(f"/{task['id']}", json=change)

    assert answer.status_code == 200
    assert await tasks(alice) == [answer.json()]


async def test_the_successor_has_the_fields_set_on_completion(alice: Person) -> None:
    task = await alice.create(due_date="2026-01-31")

    await alice.put(f"/{task['id']}", json={"completed": True, "recurring": "weekly", "title": "Weekly"})

    done, following = await tasks(alice)
    assert (done["completed"], following["completed"]) == (True, False)
    assert (following["title"], following["recurring"], following["due_date"]) == (
        "Weekly",
        "weekly",
        "2026-02-07",
    )


async def test_completing_at_the_same_moment_makes_one_successor(alice: Person) -> None:
    task = await series(alice, recurring="daily")
    ways = ["set", "put", "patched", "in bulk", "all"] * 4

    statuses = await asyncio.gather(*(complete(alice, task["id"], way) for way in ways))

    assert set(statuses) == {200}
    # "all" also completes existing successors, and each of them gets its own successor.
    due_dates = [task["due_date"] for task in await tasks(alice)]
    assert len(due_dates) == len(set(due_dates))
    assert len([task for task in await tasks(alice) if not task["completed"]]) == 1


async def test_toggling_at_the_same_moment_makes_one_successor(alice: Person) -> None:
    task = await series(alice, recurring="daily")

    statuses = await asyncio.gather(*(complete(alice, task["id"], "toggled") for _ in range(21)))

    assert set(statuses) == {200}
    done, following = await tasks(alice)
    assert (done["completed"], done["version"], following["completed"]) == (True, 22, False)


async def test_a_task_that_is_created_completed_has_no_successor(alice: Person) -> None:
    task = await alice.create(due_date="2026-01-31", recurring="daily", completed=True)

    assert await tasks(alice) == [task]
