"""A list of tasks as SQL: its conditions, its order and its pages.

A list has one of three shapes. The conditions of a filtered one take every filter, absent ones as null: so
all lists together have 144 statements, however many combinations clients send.
"""

from collections.abc import Iterator
from typing import Any, Literal

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
    or_,
    select,
    true,
    tuple_,
    type_coerce,
    union_all,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from database.arrays import AnyOf, HasAll, list_of
from database.statements import named
from models import BIG_ID, DAY, PRIORITY, DayText, Task
from schemas import Filter, Order, Position, TaskOut

TASKS: Table = Task.__table__  # type: ignore[attr-defined] # SQLModel adds it
COLUMNS = tuple(TASKS.c[name] for name in TaskOut.model_fields)
OWNED = TASKS.c.user_id == bindparam("owner", type_=TASKS.c.user_id.type)

# A page starts at the beginning, or after a task whose sort key has a value, or is null.
Start = Literal["first", "after value", "after null"]
Shape = Literal["all", "pending", "filtered"]
PENDING = Filter(states=frozenset((False,)))

_NULLABLE = {column.name for column in COLUMNS if column.nullable}
_LIMIT = bindparam("limit", type_=Integer)


class FoldCase(FunctionElement[str]):
    """A text in lower case, beyond ASCII too.

    On PostgreSQL the function is the migrations': `lower` of a database whose LC_CTYPE is C folds ASCII only.
    """

    type = Text()
    inherit_cache = True


@compiles(FoldCase)
def _fold_case(element: FoldCase, compiler: SQLCompiler, **options: Any) -> str:
    return f"task_fold_case({compiler.process(element.clauses, **options)})"


@compiles(FoldCase, "sqlite")
def _fold_case_sqlite(element: FoldCase, compiler: SQLCompiler, **options: Any) -> str:
    return f"lower({compiler.process(element.clauses, **options)})"


class HasWords(FunctionElement[bool]):
    """Whether a task has all words: `HasWords(title, description, words, longest, second, others)`.

    PostgreSQL may look the two longest up in the trigram index and compares the others with the rows that it
    finds. Folding is what a row costs, so it is done once for all the others. Absent words are null.

    SQLite calls a function of ours with all *words*, once for each row.
    """

    type = Boolean()
    inherit_cache = True


@compiles(HasWords)
def _has_words(element: HasWords, compiler: SQLCompiler, **options: Any) -> str:
    parts = [compiler.process(part, **options) for part in element.clauses if part.key != "words"]
    title, description, *indexed, others = parts
    # As the index of the migrations has it; a word holds no space, so none is found across both.
    text = f"task_fold_case({title} || ' ' || coalesce({description}, ''))"
    found = [f"({word} IS NULL OR {text} LIKE task_fold_case({word}))" for word in indexed]
    folded = f"ARRAY(SELECT task_fold_case(pattern) FROM unnest({others}) AS pattern)"  # noqa: S608 - SQL already
    return " AND ".join([*found, f"({others} IS NULL OR {text} LIKE ALL ({folded}))"])


@compiles(HasWords, "sqlite")
def _has_words_sqlite(element: HasWords, compiler: SQLCompiler, **options: Any) -> str:
    title, description, words, *_ = (compiler.process(part, **options) for part in element.clauses)
    # Unlike OR, CASE never calls it in vain.
    return f"CASE WHEN {words} IS NULL THEN 1 ELSE has_words({title}, {description}, {words}) END"


class PlannedFor(FunctionElement[bool]):
    """True. Makes PostgreSQL plan a statement for its values, one of which is *value* and never null.

    After five executions it would keep a generic plan, which knows neither which filters are absent nor how
    selective the words are (180 ms, not 0.1, among 10,000 tasks). With the value known this condition folds
    to true; without, it prices the plan out and, being never null, still runs nothing.
    """

    type = Boolean()
    inherit_cache = True


@compiles(PlannedFor)
def _planned_for(element: PlannedFor, compiler: SQLCompiler, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    expensive = f"SELECT count(*) FROM generate_series(1, 1000000000) WHERE {value} IS NULL"  # noqa: S608 - SQL already
    return f"({value} IS NOT NULL OR ({expensive}) = 0)"


@compiles(PlannedFor, "sqlite")
def _planned_for_sqlite(_element: PlannedFor, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


def shape_of(filters: Filter) -> Shape:
    if filters == Filter():
        return "all"
    return "pending" if filters == PENDING else "filtered"


def values_of(filters: Filter) -> dict[str, Any]:
    """Return the values of *filters* as `conditions` names them."""
    patterns = [f"%{word.translate(_ESCAPES)}%" for word in sorted(filters.words, key=len, reverse=True)]
    longest, second = [*patterns, None, None][:2]
    return {
        "states": list(filters.states),
        "words": list(filters.words) or None,
        "longest_word": longest,
        "second_word": second,
        "other_words": patterns[2:] or None,
        "priorities": [PRIORITY.rank(word) for word in filters.priorities] or None,
        "categories": list(filters.categories) or None,
        "tags": list(filters.tags),
        "due_date_from": filters.due_date_from,
        "due_date_to": filters.due_date_to,
    }


_ESCAPES = str.maketrans({sign: f"\\{sign}" for sign in "\\%_"})


def conditions(shape: Shape) -> list[ColumnElement[bool]]:
    """Return what is true of the tasks in a list of *shape*, the owner first."""
    match shape:
        case "all":
            return [OWNED]
        case "pending":  # a literal, as the partial index has it
            return [OWNED, not_(TASKS.c.completed)]
    return [OWNED, *_filters()]


def _filters() -> Iterator[ColumnElement[bool]]:
    task = TASKS.c
    states = bindparam("states", type_=list_of(Boolean()))
    priorities = bindparam("priorities", type_=list_of(SmallInteger()))
    categories = bindparam("categories", type_=list_of(Text()))
    since, until = (bindparam(name, type_=DAY) for name in ("due_date_from", "due_date_to"))
    # A task without a priority is found by `none`.
    rank = func.coalesce(task.priority, literal_column(str(PRIORITY.rank("none"))))
    yield PlannedFor(states)
    yield AnyOf(task.completed, states)
    yield or_(priorities.is_(None), AnyOf(rank, priorities))
    yield or_(categories.is_(None), AnyOf(task.category, categories))
    yield HasAll(task.tags, bindparam("tags", type_=list_of(Text())))
    # As text: the planner folds no cast to a date away, and would not use the index for either bound.
    yield or_(type_coerce(since, DayText()).is_(None), task.due_date >= since)
    yield or_(type_coerce(until, DayText()).is_(None), task.due_date <= until)
    words, others = (bindparam(name, type_=list_of(Text())) for name in ("words", "other_words"))
    longest, second = (bindparam(name, type_=Text()) for name in ("longest_word", "second_word"))
    yield HasWords(task.title, task.description, words, longest, second, others)


def start_of(after: Position | None) -> Start:
    if after is None:
        return "first"
    return "after null" if after.key is None else "after value"


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
    return collate(FoldCase(value), "C") if field == "title" else value
