import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import task_model
from tests.conftest import Person, pages, person
from tests.task_model import ORDERS, Json, Task, Wanted, moment

WRITABLE = {"title", *task_model.UNSET}

SHELF: list[Json] = [
    {
        "title": "apples",
        "description": "100% ripe",
        "priority": "high",
        "category": "home",
        "tags": ["fruit", "red"],
        "due_date": "2026-01-31",
    },
    {
        "title": "Ärger_im\\Büro",
        "priority": "low",
        "category": "Home",
        "tags": ["work"],
        "due_date": "2026-02-01",
    },
    {
        "title": "bills",
        "description": "",
        "completed": True,
        "priority": "medium",
        "category": "home",
        "tags": ["fruit", "work"],
    },
    {"title": "chores", "category": ""},
]
ENDLESS = 100
EVERYTHING = ["apples", "bills", "chores", "Ärger_im\\Büro"]


async def fill(person: Person, tasks: Sequence[Json]) -> list[Json]:
    """Create *tasks* and return them."""
    operations = [{"op": "create", "task": task} for task in tasks]
    answer = await person.post("/bulk", json={"operations": operations})
    assert answer.status_code == 200, answer.text
    return [result["task"] for result in answer.json()["results"]]


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("priority=high", ["apples"]),
        ("priority=high&priority=low", ["apples", "Ärger_im\\Büro"]),
        ("priority=high&priority=high", ["apples"]),
        ("category=home", ["apples", "bills"]),
        ("category=home&category=Home", ["apples", "bills", "Ärger_im\\Büro"]),
        ("category=hom%25", []),
        ("category=", ["chores"]),
        ("tags=fruit", ["apples", "bills"]),
        ("tags=%20fruit%20", ["apples", "bills"]),
        ("tags=fruit&tags=work", ["bills"]),
        ("tags=work&tags=fruit&tags=work", ["bills"]),
        ("tags=Fruit", []),
        ("tags=fru", []),
        ("tags=fruit,red", []),
        ("due_date_from=2026-01-31", ["apples", "Ärger_im\\Büro"]),
        ("due_date_from=2026-02-01", ["Ärger_im\\Büro"]),
        ("due_date_to=2026-01-31", ["apples"]),
        ("due_date_from=2026-01-31&due_date_to=2026-01-31", ["apples"]),
        ("due_date_from=2026-02-01&due_date_to=2026-01-31", []),
        ("due_date_from=0001-01-01&due_date_to=9999-12-31", ["apples", "Ärger_im\\Büro"]),
        ("search=APPLE", ["apples"]),
        ("search=RIPE", ["apples"]),
        ("search=ripe+app", ["apples"]),
        ("search=ripe%C2%A0app", ["apples"]),
        ("search=ripe&q=app", ["apples"]),
        ("search=bills&q=app", []),
        ("q=%C3%A4RGER", ["Ärger_im\\Büro"]),
        ("q=b%C3%9CRO", ["Ärger_im\\Büro"]),
        ("q=i+i+i", ["apples", "bills", "Ärger_im\\Büro"]),
        ("search=s1", []),
        ("search=home", []),
        ("search=%25", ["apples"]),
        ("search=0%25", ["apples"]),
        ("search=1%25", []),
        ("search=_", ["Ärger_im\\Büro"]),
        ("search=appl_s", []),
        ("search=%5C", ["Ärger_im\\Büro"]),
        ("search=m%5CB", ["Ärger_im\\Büro"]),
        ("search=", EVERYTHING),
        ("search=+%09&q=%C2%A0", EVERYTHING),
        ("status=completed&priority=medium&category=home&tags=fruit&search=bill", ["bills"]),
        ("status=pending&priority=medium", []),
    ],
)
async def test_a_filter_returns_the_matching_tasks(alice: Person, query: str, titles: list[str]) -> None:
    await fill(alice, SHELF)

    answer = await alice.get(f"?{query}&sort=title&count=true")

    assert [task["title"] for task in answer.json()] == titles
    assert answer.headers["x-total-count"] == str(len(titles))


async def test_a_filter_never_matches_another_users_tasks(alice: Person, bob: Person) -> None:
    await fill(alice, SHELF)

    for query in (
        "search=apples",
        "priority=high",
        "category=home",
        "tags=fruit",
        "due_date_from=2026-01-31",
    ):
        assert len((await alice.get(f"?{query}")).json()) > 0
        assert (await bob.get(f"?{query}")).json() == []


@pytest.mark.parametrize(
    ("query", "titles"),
    [
        ("sort=due_date", ["early", "late", "none", "nor here"]),
        ("sort=-due_date", ["late", "early", "nor here", "none"]),
        ("sort_by=due_date", ["early", "late", "none", "nor here"]),
        ("sort_by=-due_date", ["late", "early", "nor here", "none"]),
        ("sort_by=due_date&order=desc", ["late", "early", "nor here", "none"]),
        ("sort=due_date&sort_by=title&order=asc", ["early", "late", "none", "nor here"]),
        ("sort=-due_date&order=asc", ["late", "early", "nor here", "none"]),
        ("sort=priority", ["nor here", "late", "early", "none"]),
        ("sort=-priority", ["early", "late", "nor here", "none"]),
    ],
)
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
async def test_null_values_sort_last_in_either_direction(
    alice: Person, query: str, titles: list[str], limit: int
) -> None:
    await fill(
        alice,
        [
            {"title": "none"},
            {"title": "late", "due_date": "2026-02-01", "priority": "medium"},
            {"title": "early", "due_date": "2026-01-31", "priority": "low"},
            {"title": "nor here", "priority": "high"},
        ],
    )

    found = await pages(alice, f"?{query}&limit={limit}")

    assert [task["title"] for page in found for task in page] == titles
    assert [len(page) for page in found[:-1]] == [limit] * (len(found) - 1)


@pytest.mark.parametrize("field", ["title", "priority", "due_date"])
async def test_ties_break_by_id_in_the_direction_of_the_sort(alice: Person, field: str) -> None:
    same: Json = {"priority": "low", "due_date": "2026-01-31"}
    ids = [task["id"] for task in await fill(alice, [same | {"title": title} for title in "aAaA"])]

    upwards = [task["id"] for task in (await alice.get(f"?sort={field}")).json()]
    downwards = [task["id"] for task in (await alice.get(f"?sort=-{field}")).json()]

    assert upwards == ids
    assert downwards == ids[::-1]


async def test_titles_sort_by_their_lower_case(alice: Person) -> None:
    titles = ["Z", "_", "É", "e", "İb", "ia", "ΑΣ", "ας", "ß", "zz", "😀", "\ufb01"]
    await fill(alice, [{"title": title} for title in titles])

    listed = [task["title"] for task in (await alice.get("?sort=title")).json()]

    assert listed == ["_", "e", "ia", "İb", "Z", "zz", "ß", "É", "ας", "ΑΣ", "\ufb01", "😀"]


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        (f"search={'x' * 201}", "search"),
        (f"q={'x' * 201}", "q"),
        ("search=%00", "search"),
        ("q=%00", "q"),
        ("priority=highest", "priority"),
        ("priority=High", "priority"),
        ("priority=", "priority"),
        ("priority=high&priority=highest", "priority"),
        (f"category={'x' * 51}", "category"),
        (f"category=home&category={'x' * 51}", "category"),
        ("category=%00", "category"),
        (f"tags={'x' * 31}", "tags"),
        (f"tags=fruit&tags={'x' * 31}", "tags"),
        ("tags=", "tags"),
        ("tags=+", "tags"),
        ("tags=%00", "tags"),
        ("due_date_from=2026-02-30", "due_date_from"),
        ("due_date_from=2026-2-1", "due_date_from"),
        ("due_date_from=2026-02-01T00:00:00Z", "due_date_from"),
        ("due_date_from=0", "due_date_from"),
        ("due_date_to=0000-01-01", "due_date_to"),
        ("due_date_to=10000-01-01", "due_date_to"),
        ("due_date_to=tomorrow", "due_date_to"),
        ("due_date_to=", "due_date_to"),
        ("due_date_to=%D9%A2026-01-01", "due_date_to"),
        ("sort_by=user_id", "sort_by"),
        ("sort_by=", "sort_by"),
        ("sort=completed_at", "sort"),
        ("sort=Title", "sort"),
    ],
)
async def test_a_filter_that_breaks_its_rule_is_named(alice: Person, query: str, parameter: str) -> None:
    answer = await alice.get(f"?{query}")

    assert answer.status_code == 422
    assert [error["parameter"] for error in answer.json()["errors"]] == [parameter]
    assert answer.json()["detail"].startswith(f"{parameter}: ")


@pytest.mark.parametrize("longest", [f"search={'x' * 200}", f"category={'x' * 50}", f"tags={'x' * 30}"])
async def test_a_filter_may_be_as_long_as_its_rule_says(alice: Person, longest: str) -> None:
    assert (await alice.get(f"?{longest}")).json() == []


@pytest.mark.parametrize("words", [["a"], ["milk", "a"], ["milk", "bottles", "z"], [*"abcdefgh"], ["a"] * 20])
async def test_a_search_finds_tasks_with_every_word(alice: Person, words: list[str]) -> None:
    await alice.create(" ".join([*"abcdefgh", "milk", "z"]), description="Two BOTTLES")
    for word in set(words):
        await alice.create(" ".join(each for each in words if each != word) or "nothing")

    found = await alice.get(f"?search={'+'.join(words)}&count=true")

    assert [task["title"] for task in found.json()] == ["a b c d e f g h milk z"]
    assert found.headers["x-total-count"] == "1"


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("search=a+b+c+d+e+f+g+h+i", "search"),
        ("q=a+b+c+d+e+f+g+h+i", "q"),
        ("search=a+b+c+d+e&q=f+g+h+i", "q"),
    ],
)
async def test_a_search_for_more_than_eight_words_is_422(alice: Person, query: str, parameter: str) -> None:
    for answer in (await alice.get(f"?{query}"), await alice.delete(f"?{query}")):
        assert answer.status_code == 422
        assert answer.json()["errors"] == [{"parameter": parameter, "detail": "must have at most 8 words"}]


async def test_a_page_of_long_tasks_ends_at_a_mebibyte(alice: Person) -> None:
    one = {"op": "create", "task": {"title": "x", "description": "\u0001" * 1000}}  # six bytes each in JSON
    for _ in range(4):
        for part in range(0, 100, 10):
            answer = await alice.post("/bulk", json={"operations": [one] * 10})
            assert answer.is_success, part

    first = await alice.get("?order=asc")
    found = [task for page in await pages(alice, alice.tasks) for task in page]

    assert 900_000 < len(first.content) <= 2**20
    assert len({task["id"] for task in found}) == len(found) == 400
    assert found == sorted(found, key=lambda task: task["id"], reverse=True)


BOUND = [
    "status=pending",
    "search=a",
    "priority=high",
    "priority=high&priority=low",
    "category=home",
    "tags=fruit",
    "due_date_from=2026-01-01",
    "due_date_to=2026-01-01",
    "sort=title",
    "sort=due_date",
    "sort=-due_date",
]


@pytest.mark.parametrize("query", BOUND)
async def test_a_cursor_is_bound_to_its_filters_and_its_order(alice: Person, query: str) -> None:
    fields: Json = {"priority": "high", "category": "home", "tags": ["fruit"], "due_date": "2026-01-01"}
    await fill(alice, [fields | {"title": title} for title in ("a", "aa")])
    cursor = (await alice.get(f"?{query}&limit=1")).links["next"]["url"].partition("cursor=")[2]

    answers = {other: await alice.get(f"?{other}&cursor={cursor}") for other in (*BOUND, "status=all")}

    assert [other for other, answer in answers.items() if answer.status_code == 200] == [query]
    for other, answer in answers.items():
        if other != query:
            assert answer.status_code == 422
            assert [error["parameter"] for error in answer.json()["errors"]] == ["cursor"]


@pytest.mark.parametrize("query", ["sort=due_date", "sort=-due_date", "sort=priority", "sort=-priority"])
async def test_a_page_may_end_at_a_task_with_a_null_sort_value(alice: Person, query: str) -> None:
    ids = {task["id"] for task in await fill(alice, [{"title": "Buy milk"}] * 3)}
    url = (await alice.get(f"?{query}&limit=1")).links["next"]["url"]

    # A task with a value sorts before all pages after this cursor, so the new task must not appear.
    await alice.create(due_date="2026-01-01", priority="high")
    rest = await pages(alice, url)

    assert [len(page) for page in rest] == [1, 1]
    assert {task["id"] for page in rest for task in page} < ids


async def test_a_link_keeps_parameters_that_are_repeated(alice: Person) -> None:
    tasks = [{"title": f"É% {number}", "tags": ["a&b", "c+d"], "priority": "low"} for number in range(3)]
    await fill(alice, [*tasks, {"title": "É% without", "priority": "low"}])

    found = await pages(
        alice, "?tags=a%26b&tags=c%2Bd&priority=high&priority=low&q=%C3%A9%25&limit=1&count=true"
    )

    assert [task["title"] for page in found for task in page] == ["É% 2", "É% 1", "É% 0"]


@pytest.mark.parametrize("sort", [f"{sign}{field}" for sign in ("", "-") for field in task_model.SORTS])
async def test_paging_shows_unchanged_tasks_once_while_others_change(alice: Person, sort: str) -> None:
    created = await fill(
        alice,
        [
            {
                "title": "bBaÉ"[number % 4],
                "priority": (None, "high", "low", None, "medium")[number % 5],
                "due_date": (None, "2026-01-02", "2026-01-01", None)[number % 4],
            }
            for number in range(18)
        ],
    )
    passing = [task["id"] for task in created[::3]]
    staying = {task["id"] for task in created}.difference(passing)
    expected = [task["id"] for task in (await alice.get(f"?sort={sort}")).json() if task["id"] in staying]
    fields: Iterator[Json] = itertools.cycle(
        [
            {"title": "0", "priority": "high", "due_date": "0001-01-01"},
            {"title": "z", "priority": None, "due_date": None},
        ]
    )

    path = f"?sort={sort}&limit=2"
    seen: list[int] = []
    while path:
        assert len(seen) < ENDLESS
        answer = await alice.get(path)
        page = [task["id"] for task in answer.json()]
        seen += page
        if page and page[-1] in passing:  # the next page's cursor points at a deleted task
            passing.remove(page[-1])
            await alice.delete(f"/{page[-1]}")
        if passing:
            await alice.put(f"/{passing.pop()}", json=next(fields))
            await alice.create(**next(fields))
        path = answer.links.get("next", {}).get("url", "")

    assert len(expected) == 12
    assert [task_id for task_id in seen if task_id in staying] == expected


changes = st.one_of(
    task_model.creates,
    task_model.updates,
    task_model.completions,
    task_model.deletions,
    task_model.toggles,
    st.fixed_dictionaries(
        {"op": st.just("complete all"), "wanted": task_model.filtering, "completed": st.booleans()}
    ),
    st.fixed_dictionaries({"op": st.just("delete all"), "wanted": task_model.filtering}),
    st.lists(
        st.one_of(task_model.creates, task_model.updates, task_model.completions, task_model.deletions),
        min_size=1,
        max_size=4,
    ).map(lambda operations: {"op": "bulk", "operations": operations}),
)
questions = st.tuples(
    task_model.wide_or_narrow, st.sampled_from([None, 1, 2, 3, 5]), st.sampled_from([None, "true", "false"])
)


class Shelf:
    """The tasks of *owner*: the model, and the bodies last returned."""

    def __init__(self, owner: Person) -> None:
        self.owner = owner
        self.tasks: dict[int, Task] = {}
        self.seen: dict[int, Json] = {}

    async def do(self, operation: Json, method: str) -> None:
        """Run *operation* on the service and in the model, and compare the results."""
        match operation["op"]:
            case "bulk":
                new = await self._do_together(operation["operations"])
            case "complete all" | "delete all":
                new = await self._do_to_all(operation)
            case _:
                task_id = self._pick(operation)
                answer = await task_model.send_alone(self.owner, operation, task_id, method)
                status, new = self._expect(operation, task_id)
                assert answer.status_code == status, answer.text
        await self._compare(new)

    async def _do_together(self, operations: Sequence[Json]) -> list[Task]:
        sent, statuses, new = [], [], []
        for operation in operations:
            task_id = self._pick(operation)
            sent.append({name: operation[name] for name in operation if name != "which"} | {"id": task_id})
        for operation in sent:
            status, more = self._expect(operation, operation["id"])
            statuses.append(status)
            new += more
        answer = await self.owner.post("/bulk?atomic=false", json={"operations": sent})
        assert [result["status"] for result in answer.json()["results"]] == statuses
        return new

    async def _do_to_all(self, operation: Json) -> list[Task]:
        wanted: Wanted = operation["wanted"]
        named = [self.tasks[task["id"]] for task in self.seen.values() if wanted.takes(task)]
        path = f"?{urlencode(wanted.parameters)}"
        if operation["op"] == "delete all":
            answer = await self.owner.delete(path)
        else:
            answer = await self.owner.patch(path, json={"completed": operation["completed"]})
        once = [name for name, _ in wanted.parameters if name not in ("priority", "category", "tags")]
        if not wanted.narrows or len(set(once)) < len(once):
            assert answer.status_code == 422
            return []
        if operation["op"] == "delete all":
            self.tasks = {task_id: task for task_id, task in self.tasks.items() if task not in named}
            ids = sorted(task["id"] for task in self.seen.values() if wanted.takes(task))
            assert answer.json() == {"count": len(ids), "ids": ids}
            return []
        changed = [task for task in named if task.fields["completed"] != operation["completed"]]
        assert answer.json() == {"count": len(changed)}
        return [new for task in changed if (new := task.change({"completed": operation["completed"]}))]

    def _pick(self, operation: Json) -> int:
        """Return the id of the task that *operation* refers to, or an unknown id."""
        number = operation.get("which", 0)
        return list(self.tasks)[number % len(self.tasks)] if self.tasks and number != 9 else 2**40

    def _expect(self, operation: Json, task_id: int) -> tuple[int, list[Task]]:
        """Run *operation* in the model and return the expected status and the new tasks."""
        if operation["op"] == "create":
            return 201, [task_model.create(operation["task"])]
        if task_id not in self.tasks:
            return 404, []
        if operation["op"] == "delete":
            del self.tasks[task_id]
            return 204, []
        new = self.tasks[task_id].change(self._changes(operation, task_id))
        return 200, [new] if new else []

    def _changes(self, operation: Json, task_id: int) -> Json:
        match operation["op"]:
            case "complete":
                return {"completed": operation["completed"]}
            case "toggle":
                return {"completed": not self.tasks[task_id].fields["completed"]}
        changes: Json = operation["changes"]
        return changes

    async def _compare(self, new: list[Task]) -> None:
        before, self.seen = self.seen, {task["id"]: task for task in (await self.owner.get()).json()}
        for task_id in sorted(self.seen.keys() - before.keys()):
            found = next(task for task in new if task.fields == _fields(self.seen[task_id]))
            new.remove(found)
            self.tasks[task_id] = found
        assert not new
        assert self.seen.keys() == self.tasks.keys()
        for task_id, task in self.tasks.items():
            seen, earlier = self.seen[task_id], before.get(task_id)
            assert _fields(seen) == task.fields
            assert seen["version"] == task.version
            assert (seen["completed_at"] is not None) == task.fields["completed"]
            if earlier is None or earlier["version"] == task.version:
                assert seen == (earlier or seen | {"updated_at": seen["created_at"]})
            else:
                assert seen["created_at"] == earlier["created_at"]
                assert moment(seen["updated_at"]) > moment(earlier["updated_at"])

    async def ask(self, wanted: Wanted, limit: int | None, count: str | None) -> None:
        """Follow the pages of a list and compare them with the model's."""
        expected = wanted.arranged(self.seen.values())
        options = [("limit", str(limit))] * bool(limit) + [("count", count)] * bool(count)
        path = f"?{urlencode([*wanted.parameters, *options])}"
        found: list[Json] = []
        while path:
            assert len(found) <= len(expected)
            answer = await self.owner.get(path)
            path = answer.links.get("next", {}).get("url", "")
            assert answer.headers.get("x-total-count") == (str(len(expected)) if count == "true" else None)
            assert len(answer.json()) == limit or not path
            found += answer.json()
        assert found == expected


def _fields(seen: Json) -> Json:
    return {name: seen[name] for name in WRITABLE}


@pytest.mark.no_cover  # coverage of the same lines many times is slow
@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.lists(task_model.creates, min_size=6, max_size=9),
    st.lists(st.tuples(changes, st.sampled_from(["PUT", "PATCH"])), min_size=4, max_size=8),
    st.lists(questions, min_size=9, max_size=12),
    st.sampled_from(range(len(ORDERS))),
)
async def test_lists_show_what_the_operations_have_made_of_the_tasks(
    client: httpx.AsyncClient, first: list[Json], then: list[tuple[Json, str]], asked: list[Any], turn: int
) -> None:
    shelf = Shelf(person("alice", client))

    await shelf.do({"op": "bulk", "operations": first}, "POST")
    for operation, method in then:
        await shelf.do(operation, method)

    for number, (filters, limit, count) in enumerate(asked):
        order = ORDERS[(turn + 7 * number) % len(ORDERS)]
        await shelf.ask(Wanted((*filters, *order)), limit, count)
    # Complete every series twice: a month shorter than the anchor day is followed by a longer one.
    for _ in range(2):
        everything = {"op": "complete all", "wanted": Wanted((("status", "pending"),)), "completed": True}
        await shelf.do(everything, "PATCH")
