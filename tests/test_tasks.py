import asyncio
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from auth import tokens
from main import create_app
from schemas import Filter, Order
from tests.conftest import SECRET, Person, pages, person, running, settings_for
from web.cursors import CursorSealer, TaskList

FIELDS = [
    "id",
    "user_id",
    "title",
    "description",
    "completed",
    "priority",
    "category",
    "tags",
    "due_date",
    "due_time",
    "recurring",
    "reminder",
    "completed_at",
    "version",
    "created_at",
    "updated_at",
]
PRIORITIES = "must be 'urgent', 'high', 'medium', 'low' or 'none'"


async def test_create_returns_the_task(alice: Person) -> None:
    before = datetime.now(UTC)

    answer = await alice.post(json={"title": "  Buy milk ", "description": " Two bottles "})

    task = answer.json()
    assert answer.status_code == 201
    assert list(task) == FIELDS
    assert task["title"] == "Buy milk"
    assert task["description"] == " Two bottles "
    assert (task["user_id"], task["completed"], task["completed_at"]) == (alice.user_id, False, None)
    assert task["created_at"] == task["updated_at"]
    assert task["created_at"].endswith("Z")
    assert before <= datetime.fromisoformat(task["created_at"]) <= datetime.now(UTC)
    assert answer.headers["location"] == f"{alice.tasks}/{task['id']}"
    assert answer.headers["etag"] == f'"{task["version"]}"'
    assert (await alice.get(answer.headers["location"])).json() == task


async def test_create_takes_a_completed_task(alice: Person) -> None:
    task = await alice.create(completed=True)

    assert task["completed"] is True
    assert task["completed_at"] == task["created_at"]


async def test_create_ignores_members_that_are_not_writable(alice: Person) -> None:
    task = await alice.create(user_id="bob", id=7, version=99, created_at="1999-01-01T00:00:00Z", owner="x")

    assert task["user_id"] == alice.user_id
    assert task["version"] == 1
    assert not task["created_at"].startswith("1999")


@pytest.mark.parametrize(
    ("body", "pointer", "detail"),
    [
        ({}, "/title", "is required"),
        ({"title": None}, "/title", "must not be null"),
        ({"title": ""}, "/title", "must be 1 to 200 characters"),
        ({"title": " \t\n "}, "/title", "must be 1 to 200 characters"),
        ({"title": "x" * 201}, "/title", "must be 1 to 200 characters"),
        ({"title": 7}, "/title", "must be text"),
        ({"title": ["x"]}, "/title", "must be text"),
        ({"title": "x", "description": "x" * 1001}, "/description", "must be at most 1000 characters"),
        ({"title": "x", "description": 7}, "/description", "must be text"),
        ({"title": "x", "completed": None}, "/completed", "must not be null"),
        ({"title": "x", "completed": "yes"}, "/completed", "must be true or false"),
        ({"title": "x", "completed": 1}, "/completed", "must be true or false"),
        ({"title": "a\0b"}, "/title", "must not contain U+0000 or unpaired surrogates"),
        ({"title": "\ud800"}, "/title", "must be text"),
        (
            {"title": "x", "description": "\udfff"},
            "/description",
            "must not contain U+0000 or unpaired surrogates",
        ),
        ({"title": "x", "priority": "Urgent"}, "/priority", PRIORITIES),
        ({"title": "x", "priority": 1}, "/priority", PRIORITIES),
        ({"title": "x", "category": "x" * 51}, "/category", "must be at most 50 characters"),
        ({"title": "x", "tags": "home"}, "/tags", "must be a list"),
        ({"title": "x", "tags": None}, "/tags", "must not be null"),
        ({"title": "x", "tags": [1]}, "/tags/0", "must be text"),
        ({"title": "x", "tags": ["a", " "]}, "/tags/1", "must be 1 to 30 characters"),
        ({"title": "x", "tags": ["x" * 31]}, "/tags/0", "must be 1 to 30 characters"),
        ({"title": "x", "tags": ["a\0"]}, "/tags/0", "must not contain U+0000 or unpaired surrogates"),
        ({"title": "x", "tags": list("abcdef")}, "/tags", "must have at most 5 elements"),
        ({"title": "x", "due_date": "2026-02-30"}, "/due_date", "must be a day like 2026-02-28"),
        ({"title": "x", "due_date": "28.02.2026"}, "/due_date", "must be a day like 2026-02-28"),
        ({"title": "x", "due_date": "2026-02-28T00:00:00Z"}, "/due_date", "must be a day like 2026-02-28"),
        ({"title": "x", "due_date": "٢٠٢٦-٠٢-٢٨"}, "/due_date", "must be a day like 2026-02-28"),
        ({"title": "x", "due_date": "0000-01-01"}, "/due_date", "must be a day like 2026-02-28"),
        ({"title": "x", "due_date": 1772236800}, "/due_date", "must be a day like 2026-02-28"),
        (
            {"title": "x", "due_date": "2026-02-28", "due_time": "9:30"},
            "/due_time",
            "must be a time like 09:30",
        ),
        (
            {"title": "x", "due_date": "2026-02-28", "due_time": "24:00"},
            "/due_time",
            "must be a time like 09:30",
        ),
        (
            {"title": "x", "due_date": "2026-02-28", "due_time": "09:30\n"},
            "/due_time",
            "must be a time like 09:30",
        ),
        ({"title": "x", "due_date": "2026-02-28", "due_time": 930}, "/due_time", "must be text"),
        ({"title": "x", "recurring": "yearly"}, "/recurring", "must be 'daily', 'weekly' or 'monthly'"),
        ({"title": "x", "reminder": None}, "/reminder", "must not be null"),
        ({"title": "x", "reminder": 1}, "/reminder", "must be true or false"),
        ([], "", "must be a JSON object"),
        ("text", "", "must be a JSON object"),
        (None, "", "must not be null"),
    ],
)
async def test_a_field_that_breaks_its_rule_is_named(
    alice: Person, body: object, pointer: str, detail: str
) -> None:
    answer = await alice.post(json=body)

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"pointer": pointer, "detail": detail}]
    assert answer.json()["detail"] == f"{pointer[1:] or 'body'}: {detail}"
    assert (await alice.get()).json() == []


DETAILS: dict[str, Any] = {
    "priority": "high",
    "category": "",
    "tags": ["a", "é", "x" * 30],
    "due_date": "0001-01-01",
    "due_time": "00:00",
    "recurring": "daily",
    "reminder": True,
}
UNSET: dict[str, Any] = {
    "description": None,
    "completed": False,
    "priority": None,
    "category": None,
    "tags": [],
    "due_date": None,
    "due_time": None,
    "recurring": None,
    "reminder": False,
}


async def test_omitted_fields_are_unset(alice: Person) -> None:
    task = await alice.create()

    assert {name: task[name] for name in UNSET} == UNSET


async def test_every_field_is_kept(alice: Person) -> None:
    task = await alice.create(**DETAILS)

    assert {name: task[name] for name in DETAILS} == DETAILS
    assert (await alice.get(f"/{task['id']}")).json() == task
    assert (await alice.get()).json() == [task]


async def test_tags_are_stripped_and_kept_once_in_their_order(alice: Person) -> None:
    task = await alice.create(tags=["b", " a ", "b", "B", "a"])

    assert task["tags"] == ["b", "a", "B"]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize("field", DETAILS)
async def test_a_field_is_set_alone_and_cleared_alone(alice: Person, method: str, field: str) -> None:
    task = await alice.create(**DETAILS)
    empty = {"tags": [], "reminder": False}.get(field)

    changed = (await alice.send(method, f"/{task['id']}", json={field: empty})).json()
    back = (await alice.send(method, f"/{task['id']}", json={field: task[field]})).json()

    assert changed == task | {field: empty, "version": 2, "updated_at": changed["updated_at"]}
    assert back == task | {"version": 3, "updated_at": back["updated_at"]}


async def test_due_time_is_allowed_without_due_date(alice: Person) -> None:
    task = await alice.create(due_time="09:30")
    other = await alice.create(due_date="2026-02-28", due_time="09:30")

    without_day = (await alice.patch(f"/{other['id']}", json={"due_date": None})).json()

    assert (task["due_date"], task["due_time"]) == (None, "09:30")
    assert (without_day["due_date"], without_day["due_time"]) == (None, "09:30")


async def test_priorities_sort_by_rank_and_are_given_back_as_they_were_sent(alice: Person) -> None:
    for priority in ("low", "none", "urgent", None, "medium", "high"):
        await alice.create(priority=priority)

    listed = [task["priority"] for task in (await alice.get("?sort=priority")).json()]
    none = [task["priority"] for task in (await alice.get("?priority=none&order=asc")).json()]
    counted = (await alice.get("/stats")).json()["priorities"]

    assert listed == ["urgent", "high", "medium", "low", "none", None]
    assert none == ["none", None]
    assert counted == {"urgent": 1, "high": 1, "medium": 1, "low": 1, "none": 2}


@pytest.mark.parametrize(
    ("media_type", "status"),
    [
        ("application/merge-patch+json", 200),
        ("application/merge-patch+json; charset=utf-8", 200),
        ("application/json", 200),
        ("APPLICATION/JSON", 200),
        ("application/json-patch+json", 415),
        ("text/plain", 415),
        ("", 415),
    ],
)
async def test_a_patch_is_a_merge_patch(alice: Person, media_type: str, status: int) -> None:
    task = await alice.create()

    answer = await alice.patch(
        f"/{task['id']}", content=b'{"title": "Patched"}', headers={"Content-Type": media_type}
    )

    assert answer.status_code == status
    if status == 415:
        assert answer.headers["accept-patch"] == "application/merge-patch+json, application/json"
    assert (await alice.get(f"/{task['id']}")).json()["title"] == ("Patched" if status == 200 else "Buy milk")


async def test_a_patch_changes_only_what_was_sent(alice: Person) -> None:
    task = await alice.create(**DETAILS)

    answer = await alice.patch(f"/{task['id']}", json={"description": "Two", "priority": None, "unknown": 1})

    changed = answer.json()
    assert changed == task | {
        "description": "Two",
        "priority": None,
        "version": 2,
        "updated_at": changed["updated_at"],
    }
    assert answer.headers["etag"] == '"2"'


async def test_stats_count_by_kind(alice: Person, bob: Person) -> None:
    await bob.create(priority="high", tags=["home"])
    await alice.create(priority="high", tags=["home", "a"], due_date="2026-02-27")
    await alice.create(priority="high", tags=["home"], due_date="2026-02-28")
    await alice.create(priority="low", due_date="2026-02-27", completed=True)
    await alice.create()

    answer = await alice.get("/stats?today=2026-02-28")

    assert answer.json() == {
        "total": 4,
        "pending": 3,
        "completed": 1,
        "overdue": 1,
        "priorities": {"urgent": 0, "high": 2, "medium": 0, "low": 1, "none": 1},
        "tags": {"home": 2, "a": 1},
    }
    assert list(answer.json()["tags"]) == ["home", "a"]


async def test_stats_without_tasks_are_zero(alice: Person) -> None:
    nothing = (await alice.get("/stats")).json()

    assert (nothing["total"], nothing["overdue"], nothing["tags"]) == (0, None, {})
    assert (await alice.get("/stats?today=tomorrow")).status_code == 422


@pytest.mark.parametrize("title", ["x" * 200, "é" * 200, "😀" * 200, "%_\\'\"--;"])
async def test_a_title_may_hold_any_200_characters(alice: Person, title: str) -> None:
    task = await alice.create(title)

    assert (await alice.get(f"/{task['id']}")).json()["title"] == title


async def test_put_changes_only_what_was_sent(alice: Person) -> None:
    task = await alice.create(description="Two bottles")

    answer = await alice.put(f"/{task['id']}", json={"title": "Buy oat milk"})

    changed = answer.json()
    assert answer.status_code == 200
    assert changed["updated_at"] > task["updated_at"]
    assert answer.headers["etag"] == f'"{changed["version"]}"' != f'"{task["version"]}"'
    assert changed == task | {
        "title": "Buy oat milk",
        "version": changed["version"],
        "updated_at": changed["updated_at"],
    }


async def test_put_clears_with_null(alice: Person) -> None:
    task = await alice.create(description="Two bottles")

    answer = await alice.put(f"/{task['id']}", json={"description": None})

    assert answer.json()["description"] is None


@pytest.mark.parametrize("body", [{}, {"unknown": 1}])
async def test_put_without_known_fields_changes_nothing(alice: Person, body: dict[str, int]) -> None:
    task = await alice.create()

    answer = await alice.put(f"/{task['id']}", json=body)

    assert (answer.status_code, answer.json()) == (200, task)


async def test_put_of_the_current_values_changes_nothing(alice: Person) -> None:
    task = await alice.create(description="Two bottles", completed=True)

    answer = await alice.put(
        f"/{task['id']}", json={"title": "Buy milk", "description": "Two bottles", "completed": True}
    )

    assert answer.json() == task


@pytest.mark.parametrize("body", [{"title": None}, {"completed": None}, {"title": ""}, {"completed": "no"}])
async def test_put_holds_to_the_rules_of_create(alice: Person, body: dict[str, object]) -> None:
    task = await alice.create()

    answer = await alice.put(f"/{task['id']}", json=body)

    assert answer.status_code == 422
    assert (await alice.get(f"/{task['id']}")).json() == task


async def test_put_completes_and_reopens(alice: Person) -> None:
    task = await alice.create()

    completed = (await alice.put(f"/{task['id']}", json={"completed": True})).json()
    reopened = (await alice.put(f"/{task['id']}", json={"completed": False})).json()

    assert completed["completed_at"] == completed["updated_at"]
    assert (reopened["completed"], reopened["completed_at"]) == (False, None)


async def test_complete_without_a_body_toggles(alice: Person) -> None:
    task = await alice.create()

    first = (await alice.patch(f"/{task['id']}/complete")).json()
    second = (await alice.patch(f"/{task['id']}/complete")).json()

    assert (first["completed"], first["completed_at"]) == (True, first["updated_at"])
    assert (second["completed"], second["completed_at"]) == (False, None)
    assert task["version"] < first["version"] < second["version"]


@pytest.mark.parametrize("content", [b"", b"{}", b"null"])
async def test_complete_with_an_empty_body_toggles(alice: Person, content: bytes) -> None:
    task = await alice.create()

    answer = await alice.patch(
        f"/{task['id']}/complete", content=content, headers={"Content-Type": "application/json"}
    )

    assert answer.json()["completed"] is True


async def test_complete_with_a_body_sets_and_may_be_repeated(alice: Person) -> None:
    task = await alice.create()

    first = await alice.patch(f"/{task['id']}/complete", json={"completed": True})
    second = await alice.patch(f"/{task['id']}/complete", json={"completed": True})

    assert first.json()["completed"] is True
    assert second.json() == first.json()


@pytest.mark.parametrize("value", [None, "true", 1, []])
async def test_complete_with_a_non_boolean_state_is_422(alice: Person, value: object) -> None:
    task = await alice.create()

    answer = await alice.patch(f"/{task['id']}/complete", json={"completed": value})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/completed"


async def test_forty_concurrent_toggles_end_where_they_began(alice: Person) -> None:
    task = await alice.create()

    answers = await asyncio.gather(*(alice.patch(f"/{task['id']}/complete") for _ in range(40)))

    assert {answer.status_code for answer in answers} == {200}
    after = (await alice.get(f"/{task['id']}")).json()
    assert (after["completed"], after["version"]) == (False, task["version"] + 40)


async def test_delete_is_204_and_removes_the_task(alice: Person) -> None:
    task = await alice.create()

    answer = await alice.delete(f"/{task['id']}")

    assert (answer.status_code, answer.content) == (204, b"")
    assert "content-type" not in answer.headers
    assert (await alice.get(f"/{task['id']}")).status_code == 404
    assert (await alice.delete(f"/{task['id']}")).status_code == 404


async def test_an_id_is_never_used_again(alice: Person) -> None:
    task = await alice.create()
    await alice.delete(f"/{task['id']}")

    assert (await alice.create())["id"] > task["id"]


OPERATIONS_ON_ONE = [
    ("GET", "/{}", None),
    ("PUT", "/{}", {"title": "Mine now"}),
    ("PATCH", "/{}", {"title": "Mine now"}),
    ("PATCH", "/{}/complete", None),
    ("PATCH", "/{}/complete", {"completed": True}),
    ("DELETE", "/{}", None),
]


@pytest.mark.parametrize(("method", "path", "body"), OPERATIONS_ON_ONE)
async def test_another_users_task_looks_absent(
    alice: Person, bob: Person, method: str, path: str, body: object
) -> None:
    task = await alice.create()
    options = {"json": body} if body else {}

    of_alice = await bob.send(method, path.format(task["id"]), **options)
    of_nobody = await bob.send(method, path.format(2**53), **options)

    assert of_alice.status_code == of_nobody.status_code == 404
    assert of_alice.json()["detail"] == of_nobody.json()["detail"] == "Task not found"
    assert (await alice.get(f"/{task['id']}")).json() == task


@pytest.mark.parametrize(("method", "path", "body"), OPERATIONS_ON_ONE)
@pytest.mark.parametrize(
    "task_id", ["0", "-1", "2147483648000000000000", str(2**63), "9" * 5000, "1.5", "abc", "%00", "1e3", "٣x"]
)
async def test_an_invalid_task_id_is_422(
    alice: Person, method: str, path: str, body: object, task_id: str
) -> None:
    answer = await alice.send(method, path.format(task_id), **({"json": body} if body else {}))

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == "task_id"


async def test_a_task_id_beyond_32_bits_is_404(alice: Person) -> None:
    assert (await alice.get(f"/{2**31}")).status_code == 404
    assert (await alice.get(f"/{2**63 - 1}")).status_code == 404


async def test_list_is_a_bare_array_newest_first(alice: Person, bob: Person) -> None:
    tasks = [await alice.create(str(number)) for number in range(3)]
    await bob.create("not alice's")

    answer = await alice.get()

    assert answer.json() == tasks[::-1]
    assert "link" not in answer.headers
    assert "x-total-count" not in answer.headers


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("", ["done", "open"]),
        ("status=all", ["done", "open"]),
        ("status=pending", ["open"]),
        ("status=incomplete", ["open"]),
        ("status=completed", ["done"]),
        ("completed=true", ["done"]),
        ("completed=True", ["done"]),
        ("completed=false", ["open"]),
        ("status=all&completed=true", ["done"]),
        ("status=pending&completed=true", []),
        ("unknown=1", ["done", "open"]),
    ],
)
async def test_list_filters_by_state(alice: Person, query: str, titles: list[str]) -> None:
    await alice.create("open")
    await alice.create("done", completed=True)

    answer = await alice.get(f"?{query}")

    assert [task["title"] for task in answer.json()] == titles


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("sort=title", ["apple", "Banana", "cherry", "École"]),
        ("sort=-title", ["École", "cherry", "Banana", "apple"]),
        ("sort=title&order=desc", ["École", "cherry", "Banana", "apple"]),
        ("sort=title&order=asc", ["apple", "Banana", "cherry", "École"]),
        ("sort=created_at", ["cherry", "apple", "École", "Banana"]),
        ("sort=created", ["cherry", "apple", "École", "Banana"]),
        ("sort=-created", ["Banana", "École", "apple", "cherry"]),
        ("order=asc", ["cherry", "apple", "École", "Banana"]),
        ("order=desc", ["Banana", "École", "apple", "cherry"]),
        ("sort=updated_at", ["apple", "École", "Banana", "cherry"]),
        ("sort=-updated_at", ["cherry", "Banana", "École", "apple"]),
    ],
)
async def test_list_sorts(alice: Person, query: str, titles: list[str]) -> None:
    first, *_ = [await alice.create(title) for title in ("cherry", "apple", "École", "Banana")]
    await alice.put(f"/{first['id']}", json={"description": "touched"})

    answer = await alice.get(f"?{query}")

    assert [task["title"] for task in answer.json()] == titles


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("status=done", "status"),
        ("status=", "status"),
        ("completed=yes", "completed"),
        ("completed=1", "completed"),
        ("sort=user_id", "sort"),
        ("sort=--title", "sort"),
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=-1", "limit"),
        ("limit=ten", "limit"),
        (f"limit={2**63}", "limit"),
        ("count=maybe", "count"),
        ("cursor=", "cursor"),
        ("cursor=AAAA", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=%C3%A9", "cursor"),
        ("status=%00", "status"),
    ],
)
async def test_list_refuses_unknown_values(alice: Person, query: str, parameter: str) -> None:
    answer = await alice.get(f"?{query}")

    assert answer.status_code == 422
    assert [error["parameter"] for error in answer.json()["errors"]] == [parameter]


async def walk(person: Person, path: str) -> list[list[str]]:
    """Return the titles of each page from *path* on."""
    return [[task["title"] for task in page] for page in await pages(person, path)]


@pytest.mark.parametrize(
    "query", ["", "sort=title", "sort=-title", "sort=updated_at", "order=asc", "status=pending&x=%26%20y"]
)
async def test_pages_hold_every_task_once(alice: Person, query: str) -> None:
    for number in range(7):
        await alice.create(f"task {number % 3}")

    walked = await walk(alice, f"{alice.tasks}?{query}&limit=3")
    everything = [task["title"] for task in (await alice.get(f"?{query}")).json()]

    assert [len(page) for page in walked] == [3, 3, 1]
    assert [title for page in walked for title in page] == everything


async def test_a_full_last_page_has_no_next_link(alice: Person) -> None:
    for number in range(4):
        await alice.create(str(number))

    assert await walk(alice, f"{alice.tasks}?limit=2") == [["3", "2"], ["1", "0"]]


async def test_the_next_link_keeps_every_other_parameter(alice: Person) -> None:
    for number in range(2):
        await alice.create(str(number))

    url = (await alice.get("/?limit=1&x=a%26b&status=pending&x=c")).links["next"]["url"]

    assert url.startswith(f"{alice.tasks}?limit=1&x=a%26b&status=pending&x=c&cursor=")


async def test_paging_skips_and_repeats_nothing_while_tasks_change(alice: Person) -> None:
    tasks = [await alice.create(str(number)) for number in range(6)]
    first = await alice.get("?limit=2")

    await alice.create("newer")
    await alice.delete(f"/{tasks[4]['id']}")
    await alice.delete(f"/{tasks[3]['id']}")
    rest = await walk(alice, first.links["next"]["url"])

    assert rest == [["2", "1"], ["0"]]


async def test_a_cursor_is_good_for_its_own_list_only(alice: Person, bob: Person) -> None:
    for someone in (alice, bob):
        for number in range(2):
            await someone.create(str(number))
    cursor = (await alice.get("?limit=1")).links["next"]["url"].partition("cursor=")[2]
    forged = ("A" if cursor[0] != "A" else "B") + cursor[1:]

    assert (await alice.get(f"?cursor={cursor}")).status_code == 200
    assert (await alice.get(f"?cursor={cursor}&limit=5&count=true")).status_code == 200
    for query in (f"cursor={forged}", f"cursor={cursor}&sort=title", f"cursor={cursor}&status=pending"):
        assert (await alice.get(f"?{query}")).status_code == 422
    assert (await bob.get(f"?cursor={cursor}")).status_code == 422


async def test_x_total_count_is_of_all_pages(alice: Person) -> None:
    for number in range(3):
        await alice.create(str(number), completed=number == 0)

    first = await alice.get("?limit=1&count=true")
    last = await alice.get(first.links["next"]["url"])
    filtered = await alice.get("?count=true&status=completed&sort=title")

    assert first.headers["x-total-count"] == last.headers["x-total-count"] == "3"
    assert [len(first.json()), len(last.json())] == [1, 1]
    assert list(first.json()[0]) == FIELDS
    assert filtered.headers["x-total-count"] == "1"
    assert [task["title"] for task in filtered.json()] == ["0"]


async def test_x_total_count_without_tasks_is_zero(alice: Person) -> None:
    answer = await alice.get("?count=true")

    assert (answer.json(), answer.headers["x-total-count"]) == ([], "0")


async def test_a_list_has_1000_tasks_per_page_by_default(alice: Person) -> None:
    for _ in range(10):
        await alice.post("/bulk", json={"operations": [{"op": "create", "task": {"title": "x"}}] * 100})
    await alice.create()

    answer = await alice.get()

    assert len(answer.json()) == 1000
    assert len((await alice.get(answer.links["next"]["url"])).json()) == 1


async def test_tasks_of_one_instant_are_ordered_by_id(alice: Person) -> None:
    tasks = await asyncio.gather(*(alice.create(str(number)) for number in range(20)))

    listed = [task["id"] for task in (await alice.get("?sort=title&limit=1000")).json()]

    assert sorted(listed) == sorted(task["id"] for task in tasks)
    assert [task["created_at"] for task in (await alice.get()).json()] == sorted(
        (task["created_at"] for task in tasks), reverse=True
    )


async def test_the_versioned_path_is_the_same_service(alice: Person) -> None:
    created = await alice.post(f"/api/v1/{alice.user_id}/tasks", json={"title": "Buy milk"})

    assert created.status_code == 201
    assert created.headers["location"] == f"/api/v1/{alice.user_id}/tasks/{created.json()['id']}"
    assert (await alice.get()).json() == [created.json()]


async def test_a_trailing_slash_is_accepted(alice: Person) -> None:
    created = await alice.post("/", json={"title": "Buy milk"})

    assert created.status_code == 201
    assert created.headers["location"] == f"{alice.tasks}/{created.json()['id']}"
    assert (await alice.get(f"/{created.json()['id']}/")).status_code == 200


@pytest.mark.parametrize("path", ["", "/stats", "/1/complete", "/", "/stats/"])
async def test_a_path_with_a_trailing_line_feed_is_404(alice: Person, path: str) -> None:
    answer = await alice.get(f"{path}%0A")

    assert answer.status_code == 404
    assert answer.json()["detail"] == "There is nothing at this address"


@pytest.mark.parametrize(
    "user_id", ["0f8fad5b-d9cb-469f-a165-70867728950e", "42", "a b", "ü@example.com", "v1"]
)
async def test_a_user_id_is_opaque(alice: Person, user_id: str) -> None:
    anyone = Person(quote(user_id, safe=""), alice.client, tokens.issue(user_id, SECRET, 60))

    created = await anyone.post(json={"title": "x"})

    assert created.json()["user_id"] == user_id
    assert (await anyone.get(created.headers["location"])).json() == created.json()


async def test_times_are_utc_to_the_microsecond(alice: Person) -> None:
    task = await alice.create()

    moment = datetime.fromisoformat(task["created_at"])

    assert moment.utcoffset() == timedelta(0)


async def test_a_counted_page_is_in_the_order_of_the_list(alice: Person) -> None:
    for title in ("cherry", "apple", "Banana"):
        await alice.create(title)

    for query in ("sort=title", "sort=-title", "order=asc", ""):
        assert (await alice.get(f"?count=true&{query}")).json() == (await alice.get(f"?{query}")).json()


async def test_a_cursor_is_good_for_its_own_direction_only(alice: Person) -> None:
    for number in range(2):
        await alice.create(str(number))
    cursor = (await alice.get("?limit=1&order=asc")).links["next"]["url"].partition("cursor=")[2]

    assert (await alice.get(f"?cursor={cursor}&order=asc")).status_code == 200
    assert (await alice.get(f"?cursor={cursor}&order=desc")).status_code == 422


async def test_urls_in_location_and_link_are_escaped(alice: Person) -> None:
    user_id = f"a é<李>{secrets.token_hex(4)}"
    someone = Person(quote(user_id), alice.client, tokens.issue(user_id, SECRET, 60))
    created = await someone.post(json={"title": "1"})
    await someone.create("2")

    listed = await someone.get('?limit=1&x="<>')

    assert created.headers["location"] == f"/api/{quote(user_id)}/tasks/{created.json()['id']}"
    assert listed.headers["link"].startswith(f"</api/{quote(user_id)}/tasks?limit=1&x=%22%3C%3E&cursor=")


@pytest.mark.parametrize("query", ["limit=1_0", "limit=+1", "limit=1.0", "limit=%201", "limit=٣"])
async def test_an_integer_in_a_url_must_be_plain_digits(alice: Person, query: str) -> None:
    assert (await alice.get(f"?{query}")).status_code == 422
    assert (await alice.get(f"/{query.partition('=')[2]}")).status_code == 422


@pytest.mark.parametrize(
    "position", [[{"x": 1}, 2], [1, 2, 3], [1, 2], [None, 2], ["x", 2**63], ["x", "y"], []]
)
async def test_a_sealed_cursor_with_a_wrong_position_is_422(alice: Person, position: list[object]) -> None:
    sealer = CursorSealer([SECRET])
    by_title, by_time = (
        TaskList(alice.user_id, Filter(), Order(field, descending=False)).binding
        for field in ("title", "created_at")
    )

    right = await alice.get(f"?sort=title&cursor={sealer.write(['x', 2], by_title)}")
    wrong = await alice.get(f"?sort=title&cursor={sealer.write(position, by_title)}")
    untimely = await alice.get(f"?order=asc&cursor={sealer.write(['x', 2], by_time)}")

    assert (right.status_code, wrong.status_code) == (200, 422)
    assert untimely.status_code == 422


@pytest.mark.parametrize(
    ("setting", "status", "content"), [({}, 204, b""), ({"delete_status": "200"}, 200, b'{"ok":true}')]
)
async def test_delete_status_sets_the_status_of_a_delete(
    database_url: str, setting: dict[str, str], status: int, content: bytes
) -> None:
    async with running(create_app(settings_for(database_url, **setting))) as client:
        alice = person("alice", client)
        task = await alice.create()

        answer = await alice.delete(f"/{task['id']}")
        again = await alice.delete(f"/{task['id']}")

    assert (answer.status_code, answer.content, again.status_code) == (status, content, 404)
