"""A list of tasks as SQL: its conditions, its order and its pages.

Which conditions there are is the list's shape; a statement is built once per shape and takes the values.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Integer,
    Select,
    SmallInteger,
    Table,
    Text,
    bindparam,
    collate,
    func,
    literal_column,
    not_,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from arrays import any_of, has_all, list_of
from db import named
from models import BIG_ID, DAY, PRIORITY, Task
from schemas import Filter, Order, TaskOut

TASKS: Table = Task.__table__  # type: ignore[attr-defined] # SQLModel adds it
COLUMNS = tuple(TASKS.c[name] for name in TaskOut.model_fields)
OWNED = TASKS.c.user_id == bindparam("owner", type_=TASKS.c.user_id.type)

# Where a page begins: with the first task, or after one that has a value to sort by or has none.
Start = Literal["first", "after value", "after null"]

_NULLABLE = {column.name for column in COLUMNS if column.nullable}
_LIMIT = bindparam("limit", type_=Integer)
# As the index of the migrations has it; a word holds no space, so none is found across both.
_TEXT = func.lower(
    TASKS.c.title.op("||")(literal_column("' '")).op("||")(
        func.coalesce(TASKS.c.description, literal_column("''"))
    )
)
_WORDS = bindparam("words", type_=list_of(Text()))


class has_words(FunctionElement[bool]):  # noqa: N801 - used like a function, as SQLAlchemy's are
    """Whether a text holds all words: `has_words(text, words, pattern, …)`, as a list and one by one.

    PostgreSQL looks each pattern up in the trigrams' index. It has to plan anew for each value: after five
    searches it would keep one plan for all words, by the trigrams that a short or frequent word has not,
    180 ms instead of 0.1 ms among 10,000 tasks. So there is one more condition, which is nothing with the
    value and looks like the dearest of plans without.

    SQLite asks a function of ours, once for all words.
    """

    type = Boolean()
    inherit_cache = True


@compiles(has_words)
def _has_words(element: has_words, compiler: SQLCompiler, **options: Any) -> str:
    text, _, *patterns = element.clauses
    likes = [compiler.process(text.like(func.lower(each), escape="\\"), **options) for each in patterns]
    first = compiler.process(patterns[0], **options)
    planned = f"({first} IS NOT NULL OR (SELECT count(*) FROM generate_series(1, 1000000000)) = 0)"  # noqa: S608 - SQL already
    return " AND ".join([*likes, planned])


@compiles(has_words, "sqlite")
def _has_words_sqlite(element: has_words, compiler: SQLCompiler, **options: Any) -> str:
    text, words, *_ = (compiler.process(part, **options) for part in element.clauses)
    return f"has_words({text}, {words})"


class Shape(NamedTuple):
    """A filter without its values."""

    states: frozenset[bool]
    words: int
    priorities: bool
    categories: bool
    tags: bool
    due_date_from: bool
    due_date_to: bool


def shape_of(wanted: Filter) -> Shape:
    # Up to the next power of two, so that there are few statements; the last word is repeated.
    words = 1 << (len(wanted.words) - 1).bit_length() if wanted.words else 0
    return Shape(wanted.states, words, *(value not in ((), None) for value in wanted[2:]))


def values_of(wanted: Filter) -> dict[str, Any]:
    """Return the values of *wanted* as `conditions` names them."""
    words = [f"%{word.translate(_ESCAPES)}%" for word in wanted.words]
    patterns = words + words[-1:] * (shape_of(wanted).words - len(words))
    return {
        **{f"word_{number}": pattern for number, pattern in enumerate(patterns)},
        "words": list(wanted.words),
        "priorities": [PRIORITY.rank(word) for word in wanted.priorities],
        "categories": list(wanted.categories),
        "tags": list(wanted.tags),
        "due_date_from": wanted.due_date_from,
        "due_date_to": wanted.due_date_to,
    }


_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\%_"})


def conditions(shape: Shape) -> list[ColumnElement[bool]]:
    """Return what is true of the tasks in a list of *shape*, the owner first."""
    patterns = [bindparam(f"word_{number}", type_=Text()) for number in range(shape.words)]
    words = [has_words(_TEXT, _WORDS, *patterns)] if patterns else []
    return [OWNED, *_states(shape), *words, *(condition for there, condition in _optional(shape) if there)]


def _states(shape: Shape) -> Iterable[ColumnElement[bool]]:
    for unwanted in {False, True} - shape.states:
        yield not_(TASKS.c.completed) if unwanted else TASKS.c.completed


def _optional(shape: Shape) -> Iterable[tuple[bool, ColumnElement[bool]]]:
    task = TASKS.c
    ranks = bindparam("priorities", type_=list_of(SmallInteger()))
    # A task without a priority is found by `none`.
    rank = func.coalesce(task.priority, literal_column(str(PRIORITY.rank("none"))))
    yield shape.priorities, any_of(rank, ranks)
    yield shape.categories, any_of(task.category, bindparam("categories", type_=list_of(Text())))
    yield shape.tags, has_all(task.tags, bindparam("tags", type_=list_of(Text())))
    yield shape.due_date_from, task.due_date >= bindparam("due_date_from", type_=DAY)
    yield shape.due_date_to, task.due_date <= bindparam("due_date_to", type_=DAY)


def start_of(after: tuple[Any, int] | None) -> Start:
    if after is None:
        return "first"
    return "after null" if after[0] is None else "after value"


@lru_cache(maxsize=512)
def page(shape: Shape, order: Order, start: Start) -> Select[Any]:
    """Return the statement for a page. It takes `owner`, `limit`, `after_key`, `after_id` and the values."""
    return named("list_tasks", _page(shape, order, start))


def _page(shape: Shape, order: Order, start: Start) -> Select[Any]:
    if order.field not in _NULLABLE:
        return _part(shape, order, start != "first")
    if start == "after null":
        return _part(shape, order, continued=True, known=False)
    # Two ranges of one index, one after the other; `OR … IS NULL` would read the index from its beginning.
    known = _part(shape, order, start == "after value", known=True).cte("known")
    is_short = select(func.count()).select_from(known).scalar_subquery() < _LIMIT
    unknown = _part(shape, order, continued=False, known=False).where(is_short).subquery("unknown")
    both = union_all(select(known), select(unknown)).subquery("both")
    return select(*both.c).order_by(*_ordering(order, both.c)).limit(_LIMIT)


@lru_cache(maxsize=512)
def counted_page(shape: Shape, order: Order, start: Start) -> Select[Any]:
    """Return the statement for a page with the `total` beside every task, or alone when there is none."""
    tasks = page(shape, order, start).subquery("page")
    total = (
        select(func.count().label("total")).select_from(TASKS).where(*conditions(shape)).subquery("counted")
    )
    return named(
        "list_and_count_tasks",
        select(total.c.total, *tasks.c)
        .select_from(total.outerjoin(tasks, true()))
        .order_by(*_ordering(order, tasks.c)),
    )


def _part(shape: Shape, order: Order, continued: bool, known: bool | None = None) -> Select[Any]:
    """Return the tasks whose sort key is *known*, or is not, or all; *continued* after a position."""
    key, task_id = _sort_key(order.field, TASKS.c[order.field]), TASKS.c.id
    statement = select(*COLUMNS).where(*conditions(shape))
    after_id = bindparam("after_id", type_=BIG_ID)
    if known is False:
        statement = statement.where(TASKS.c[order.field].is_(None))
        if continued:
            statement = statement.where(task_id < after_id if order.descending else task_id > after_id)
    elif continued:
        after_key = bindparam("after_key", type_=TASKS.c[order.field].type)
        here, after = tuple_(key, task_id), tuple_(_sort_key(order.field, after_key), after_id)
        statement = statement.where(here < after if order.descending else here > after)
    elif known:
        statement = statement.where(TASKS.c[order.field].is_not(None))
    directed = (part.desc() if order.descending else part.asc() for part in (key, task_id))
    return statement.order_by(*directed).limit(_LIMIT)


def _ordering(order: Order, columns: Any) -> list[ColumnElement[Any]]:
    parts = (_sort_key(order.field, columns[order.field]), columns["id"])
    directed = [part.desc() if order.descending else part.asc() for part in parts]
    return [columns[order.field].is_(None), *directed]


def _sort_key(field: str, value: Any) -> ColumnElement[Any]:
    """Titles are sorted without regard to case and, the same everywhere, by code point."""
    return collate(func.lower(value), "C") if field == "title" else value
