"""Lists of tasks: their orders and pages. With every filter and order there are 144 statements."""

from functools import partial
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Integer,
    Select,
    bindparam,
    collate,
    func,
    literal_column,
    select,
    tuple_,
    union_all,
)

from database.statements import ABSENT, Deferred, PerDatabase, headed
from models import BIG_ID
from queries.filters import FoldCase, Shape, conditions, shape_of, values_of
from queries.owner import COLUMNS, TASKS, Owner
from queries.revisions import REVISION_OF_OWNER
from schemas import Filter, Order, Position

# A page starts at the beginning, or after a task whose sort key has a value, or is null.
Start = Literal["first", "after value", "after null"]

_NULLABLE = {column.name for column in COLUMNS if column.nullable}
_LIMIT = bindparam("limit", type_=Integer)


class Page(NamedTuple):
    """Tasks, the owner's revision in which they are so, and how many all pages hold together, if counted.

    A task is an object with the attributes of `schemas.TaskOut`.
    """

    tasks: list[Any]
    revision: int
    total: int | None = None


async def list_tasks(
    owner: Owner,
    filters: Filter,
    order: Order,
    limit: int,
    after: Position | None = None,
    *,
    counts: bool = False,
) -> Page:
    """Return up to *limit* tasks of *owner* that come after the position *after*."""
    statement = Deferred(page_of_tasks, (shape_of(filters), order, start_of(after), counts))
    key, task_id = after or (None, None)
    rows = await owner.all(statement, limit=limit, after_key=key, after_id=task_id, **values_of(filters))
    first = rows[0]
    revision = first.list_revision
    total = first.total if counts else None
    if first.id is None:
        return Page([], revision, total)
    for row in rows:
        row.list_revision = ABSENT
        if counts:
            row.total = ABSENT
    return Page(rows, revision, total)


def start_of(after: Position | None) -> Start:
    if after is None:
        return "first"
    return "after null" if after.key is None else "after value"


def page_of_tasks(shape: Shape, order: Order, start: Start, counts: bool) -> PerDatabase:
    """Return the statement for a page. It takes `owner`, `limit`, `after_key`, `after_id` and the values.

    Every row has `list_revision` and, if it *counts*, `total`. An empty page is one row without a task.
    """
    head = [func.coalesce(REVISION_OF_OWNER, literal_column("0")).label("list_revision")]
    if counts:
        total = select(func.count()).select_from(TASKS).where(*conditions(shape))
        head.append(total.scalar_subquery().label("total"))
    name = "list_and_count_tasks" if counts else "list_tasks"
    return headed(name, _page(shape, order, start), head, partial(_ordering, order))


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


def _part(shape: Shape, order: Order, continued: bool, known: bool | None = None) -> Select[Any]:
    """Return tasks with a sort key (*known*), without one, or all (None), from the start or *continued*."""
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
    return statement.order_by(*_directed(order, TASKS.c)).limit(_LIMIT)


def _ordering(order: Order, columns: Any) -> list[ColumnElement[Any]]:
    nulls_last = [columns[order.field].is_(None)] if order.field in _NULLABLE else []
    return [*nulls_last, *_directed(order, columns)]


def _directed(order: Order, columns: Any) -> list[ColumnElement[Any]]:
    parts = (_sort_key(order.field, columns[order.field]), columns["id"])
    return [part.desc() if order.descending else part.asc() for part in parts]


def _sort_key(field: str, value: Any) -> ColumnElement[Any]:
    """Titles are sorted by code point, the same on both databases, and without regard to case."""
    return collate(FoldCase(value), "C") if field == "title" else value
