"""A model of tasks in plain Python: random operations, their effects, and the tasks that a list returns."""

import calendar
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import httpx
from hypothesis import strategies as st

from tests.conftest import Person

Json = dict[str, Any]

PRIORITIES = ("urgent", "high", "medium", "low", "none")
UNSET: Json = {
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

WORDS = [
    "a", "A", "B", "b", "École", "éCOLE", "İzmir", "izmir", "ΣΊΣΥΦΟΣ", "σίσυφος", "Straße", "STRASSE", "ẞ",
    "100%", "%", "_", "a_b", "axb", "\\", "a\\b", "\\%", "'", '"', "O'Neil", "--", "😀", "👩\u200d👧", "€",
    "\N{GREEK SMALL LETTER SIGMA}", "\ufb00", "\U00010400", "\x7f", "\x01",
]  # fmt: skip
CATEGORIES = ["", "home", "Home", "ho%", "É"]
TAGS = ["home", "HOME", "hom", "a,b", 'a"b', "{a}", "a\\b", "É", "\x01", "null"]
DAYS = [
    "0001-01-01", "2023-01-29", "2023-12-31", "2024-01-31", "2024-02-29", "2024-12-31",
    "9999-11-30", "9999-12-30", "9999-12-31",
]  # fmt: skip

texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).flatmap(
    lambda words: st.sampled_from([" ", "", "\u00a0", "\n"]).map(lambda between: between.join(words))
)
titles = st.builds("{}{}{}".format, st.sampled_from(["", " ", "\u3000"]), texts, st.sampled_from(["", "\t"]))
fields = {
    "title": titles,
    "description": st.none() | st.just("") | texts,
    "completed": st.sampled_from([False, False, True]),
    "priority": st.sampled_from([None, *PRIORITIES]),
    "category": st.sampled_from([None, *CATEGORIES]),
    "tags": st.lists(st.sampled_from([*TAGS, " home "]), max_size=5),
    "due_date": st.sampled_from([None, *DAYS]),
    "due_time": st.sampled_from([None, None, None, "00:00", "23:59"]),
    "recurring": st.sampled_from([None, "daily", "weekly", "monthly", "monthly"]),
    "reminder": st.booleans(),
}
which = st.integers(0, 9)
sparse = st.fixed_dictionaries({"title": titles}, optional={name: fields[name] for name in UNSET})
creates = st.fixed_dictionaries({"op": st.just("create"), "task": st.fixed_dictionaries(fields) | sparse})
updates = st.fixed_dictionaries(
    {"op": st.just("update"), "which": which, "changes": st.fixed_dictionaries({}, optional=fields)}
)
completions = st.fixed_dictionaries(
    {"op": st.just("complete"), "which": which, "completed": st.booleans() | st.just(True)}
)
deletions = st.fixed_dictionaries({"op": st.just("delete"), "which": which})
toggles = st.fixed_dictionaries({"op": st.just("toggle"), "which": which})


async def send_alone(person: Person, operation: Json, task_id: int, method: str = "PUT") -> httpx.Response:
    """Send *operation* on the task *task_id* as a single request."""
    path, version = f"/{task_id}", operation.get("version")
    headers = {} if version is None else {"If-Match": f'"{version}"'}
    match operation["op"]:
        case "create":
            return await person.post(json=operation["task"])
        case "update":
            return await person.send(method, path, json=operation["changes"], headers=headers)
        case "complete":
            body = {"completed": operation["completed"]}
            return await person.patch(f"{path}/complete", json=body, headers=headers)
        case "toggle":
            return await person.patch(f"{path}/complete", headers=headers)
    return await person.delete(path, headers=headers)


@dataclass(eq=False)
class Task:
    """One task, with the server's hidden state of its series."""

    fields: Json
    anchor_day: int = 0
    has_successor: bool = False
    version: int = 1

    def change(self, changes: Json) -> "Task | None":
        """Apply *changes* and return the successor in the series, if they create one."""
        after = self.fields | {name: _stored(name, value) for name, value in changes.items()}
        if after == self.fields:
            return None
        before, self.fields = self.fields, after
        self.version += 1
        if after["due_date"] != before["due_date"]:
            self.has_successor, self.anchor_day = False, 0
        completes = after["completed"] and not before["completed"]
        if self.has_successor or not completes or not after["recurring"] or not after["due_date"]:
            return None
        self.has_successor = True
        return self._next()

    def _next(self) -> "Task | None":
        due = date.fromisoformat(self.fields["due_date"])
        meant = self.anchor_day or due.day
        try:
            match self.fields["recurring"]:
                case "daily":
                    due, meant = due + timedelta(days=1), 0
                case "weekly":
                    due, meant = due + timedelta(weeks=1), 0
                case "monthly":
                    month = due.replace(day=1) + timedelta(days=31)
                    due = month.replace(day=min(meant, calendar.monthrange(month.year, month.month)[1]))
        except OverflowError:
            return None
        return Task(self.fields | {"completed": False, "due_date": due.isoformat()}, meant)


def create(sent: Json) -> Task:
    task = Task({"title": "", **UNSET})
    task.change(sent)
    return Task(task.fields)


def _stored(name: str, value: Any) -> Any:
    if name == "title":
        return value.strip()
    return list(dict.fromkeys(tag.strip() for tag in value)) if name == "tags" else value


@dataclass(frozen=True)
class Wanted:
    """The filter and the order of a list, as query parameters."""

    parameters: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        return [value for given, value in self.parameters if given == name]

    def last(self, *names: str) -> str | None:
        found = [value for name in names for value in self.all(name)[-1:]]
        return found[0] if found else None

    @property
    def narrows(self) -> bool:
        """Whether there is an effective filter; blank search words are none."""
        states = self.last("completed") or self.last("status") not in (None, "all")
        words = [*self.all("search")[-1:], *self.all("q")[-1:]]
        others = ("priority", "category", "tags", "due_date_from", "due_date_to")
        return bool(states or "".join(words).strip() or any(self.all(name) for name in others))

    def takes(self, task: Json) -> bool:
        states = {"pending": [False], "incomplete": [False], "completed": [True]}
        text = [simple_lower(task["title"]), simple_lower(task["description"] or "")]
        words = [word for name in ("search", "q") for word in (self.last(name) or "").split()]
        due_date, first, last = task["due_date"], self.last("due_date_from"), self.last("due_date_to")
        return (
            task["completed"] in states.get(self.last("status") or "all", [False, True])
            and self.last("completed") in (None, str(task["completed"]).lower())
            and all(any(simple_lower(word) in part for part in text) for word in words)
            and (not self.all("priority") or (task["priority"] or "none") in self.all("priority"))
            and (not self.all("category") or task["category"] in self.all("category"))
            and all(tag in task["tags"] for tag in self.all("tags"))
            and (not first or (due_date is not None and due_date >= first))
            and (not last or (due_date is not None and due_date <= last))
        )

    def arranged(self, tasks: Iterable[Json]) -> list[Json]:
        """Return the matching *tasks* in the wanted order."""
        sort = self.last("sort", "sort_by")
        if sort is None:
            field, descending = "created_at", self.last("order") != "asc"
        else:
            field, descending = sort.removeprefix("-"), sort[0] == "-" or self.last("order") == "desc"
        known: list[Json] = []
        unknown: list[Json] = []
        for task in sorted(filter(self.takes, tasks), key=lambda task: int(task["id"])):
            (unknown if _sort_key(task, field) is None else known).append(task)
        if descending:
            known.reverse()
            unknown.reverse()
        return sorted(known, key=lambda task: _sort_key(task, field), reverse=descending) + unknown


def _sort_key(task: Json, field: str) -> Any:
    match field:
        case "title":
            return simple_lower(task["title"])
        case "priority":
            return PRIORITIES.index(task["priority"]) if task["priority"] else None
        case "created" | "created_at":
            return moment(task["created_at"])
        case "updated_at":
            return moment(task["updated_at"])
    return task[field]


def moment(written: str) -> datetime:
    return datetime.fromisoformat(written)  # as text, times without microseconds would sort wrongly


def simple_lower(text: str) -> str:
    """Return *text* in simple lower case: one character for one, independent of context."""
    return "".join(sign.lower()[0] for sign in text)


def _given(name: str, values: Iterable[str], most: int = 1) -> st.SearchStrategy[list[tuple[str, str]]]:
    return st.lists(st.tuples(st.just(name), st.sampled_from(list(values))), min_size=1, max_size=most)


def _pieces(word: str) -> Iterator[str]:
    yield from {word, word.lower(), word.upper(), word[1:], word[:1]}


SEARCHES = ["", " ", *sorted({piece for word in WORDS for piece in _pieces(word)}), "a b", "é %", "σίς a"]
SORTS = ["created_at", "created", "updated_at", "title", "priority", "due_date"]
filters = [
    _given("status", ["all", "pending", "incomplete", "completed"]),
    _given("completed", ["true", "false"]),
    _given("search", SEARCHES, 2),
    _given("search", ["a", "s", "%", "\\", "É"]),
    _given("q", SEARCHES),
    _given("priority", PRIORITIES, 3),
    _given("category", CATEGORIES, 3),
    _given("tags", TAGS, 2),
    _given("due_date_from", DAYS),
    _given("due_date_to", DAYS),
]
# A small set, so that each value is tested often; drawn values would be too rare.
ORDERS: list[tuple[tuple[str, str], ...]] = [
    (),
    (("order", "asc"),),
    (("order", "desc"),),
    (("sort", "title"), ("sort_by", "-due_date")),
    (("sort_by", "due_date"), ("order", "asc")),
    (("sort", "-priority"), ("order", "asc")),
    *((("sort", sort),) for sort in SORTS),
    *((("sort_by", f"-{sort}"),) for sort in SORTS),
    *((("order", "desc"), ("sort", sort)) for sort in SORTS),
]


def _some(least: int, most: int) -> st.SearchStrategy[tuple[tuple[str, str], ...]]:
    """A few filters: all of them together would rarely match a task."""
    chosen = st.lists(st.sampled_from(range(len(filters))), min_size=least, max_size=most, unique=True)
    return chosen.flatmap(lambda numbers: st.tuples(*(filters[number] for number in numbers))).map(
        lambda drawn: tuple(itertools.chain(*drawn))
    )


filtering = st.builds(Wanted, _some(0, 2))
wide_or_narrow = _some(0, 1) | _some(1, 3)
