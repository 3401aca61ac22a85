"""Every statement about single tasks. Each starts from the owner, takes one round trip and is built once."""

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any, get_args

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Integer,
    String,
    and_,
    bindparam,
    case,
    column,
    delete,
    false,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.sql.base import Executable

from database.arrays import AnyOf, Elements, list_of
from database.base import Database, Executor
from database.statements import Deferred, Row, Statement, named
from errors import Unavailable
from models import BIG_ID, DAY, TAG_MAX, TIMESTAMP, Priority, TaskFields, TaskKey
from queries import lists
from queries.lists import COLUMNS, OWNED, TASKS
from queries.quota import NO_LIMIT, TaskLimit
from queries.recurrence import next_due_date
from refusals import TaskNotFound, TooManyTasks, VersionConflict
from schemas import STATS_TAGS_MAX, Filter, Order, Position

WRITABLE = tuple(TaskFields.model_fields)
STORED = tuple(column.name for column in TASKS.c if column.name not in TaskKey.model_fields)
SERIES_ATTEMPTS = 3  # others may change the task between two statements, but not for ever

NOW = bindparam("now", type_=TIMESTAMP)
_THIS = TASKS.c.id == bindparam("task_id", type_=BIG_ID)
_VERSIONS = bindparam("versions", type_=list_of(Integer()))
_EXPECTED = or_(_VERSIONS.is_(None), AnyOf(TASKS.c.version, _VERSIONS))


@dataclass(frozen=True, slots=True)
class Owner:
    """A verified user, the database that keeps their tasks, and how many. Every statement starts from one."""

    user_id: str
    db: Executor
    limit: TaskLimit = NO_LIMIT

    async def one(self, statement: Statement, **values: Any) -> Row | None:
        rows = await self.all(statement, **values)
        return rows[0] if rows else None

    async def all(self, statement: Statement, **values: Any) -> list[Row]:
        share, user_id = self.db.share, self.user_id
        await share.enter(user_id)
        try:
            return await self.db.all(statement, owner=user_id, **values)
        finally:
            share.leave(user_id)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Owner"]:
        """Lend the same owner for statements that stand or fall together, within a transaction or as one."""
        if not isinstance(self.db, Database):
            yield self
            return
        share, user_id = self.db.share, self.user_id
        await share.enter(user_id)
        try:
            async with self.db.transaction() as executor:
                yield replace(self, db=executor)
        finally:
            share.leave(user_id)


async def create_task(owner: Owner, fields: Mapping[str, Any]) -> Row:
    """Insert a task of *owner* and return it.

    Raises:
        TooManyTasks: there are as many as they may have.
    """
    return await _insert(owner, new_task(fields, datetime.now(UTC)))


async def get_task(owner: Owner, task_id: int) -> Row:
    """Return the task.

    Raises:
        TaskNotFound: the owner has none with this id.
    """
    task = await _find(owner, task_id)
    if task is None:
        raise TaskNotFound
    return task


async def update_task(
    owner: Owner, task_id: int, changes: Mapping[str, Any], versions: Collection[int] | None = None
) -> Row:
    """Set the fields in *changes* and return the task.

    What is set to the value it has is no change: version and times stay, so a retry is harmless.

    Raises:
        TaskNotFound: the owner has none with this id.
        VersionConflict: the task's version is not one of *versions*.
        TooManyTasks: the next task of its series would be one too many.
    """
    if not changes:
        return await _expected_task(owner, task_id, versions)
    return await _change(owner, _UPDATE, task_id, changes, versions)


async def toggle_task(owner: Owner, task_id: int, versions: Collection[int] | None = None) -> Row:
    """Complete the task, or reopen it, and return it.

    Raises:
        TaskNotFound: the owner has none with this id.
        VersionConflict: the task's version is not one of *versions*.
        TooManyTasks: the next task of its series would be one too many.
    """
    return await _change(owner, _TOGGLE, task_id, {"completed": True}, versions)


async def delete_task(owner: Owner, task_id: int, versions: Collection[int] | None = None) -> None:
    """Delete the task.

    Raises:
        TaskNotFound: the owner has none with this id.
        VersionConflict: the task's version is not one of *versions*.
    """
    values = {"task_id": task_id, "versions": _list(versions)}
    try:
        deleted = await owner.one(_DELETE, **values)
    except Unavailable as error:
        task = await _after_loss(owner, task_id, versions, error)
        if task is not None and _is_expected(task, versions):
            await owner.one(_DELETE, **values)
            task = await _find(owner, task_id)
        if task is not None:
            raise
        return  # it is gone, as was asked; the client had read it, so it was there
    if not deleted:
        if versions is not None:
            await _expected_task(owner, task_id, versions)
        raise TaskNotFound


async def list_tasks(
    owner: Owner, filters: Filter, order: Order, limit: int, after: Position | None = None
) -> list[Row]:
    """Return up to *limit* tasks of *owner* that come after the position *after*."""
    return await _page(owner, lists.page, filters, order, limit, after)


async def list_and_count_tasks(
    owner: Owner, filters: Filter, order: Order, limit: int, after: Position | None = None
) -> tuple[list[Row], int]:
    """Return the page as `list_tasks` does, and how many tasks all pages hold together."""
    rows = await _page(owner, lists.counted_page, filters, order, limit, after)
    total = rows[0]["total"]
    # The count stands beside every task, and alone when the page is empty.
    tasks = [{name: row[name] for name in row if name != "total"} for row in rows if row["id"] is not None]
    return tasks, total


async def count_tasks(owner: Owner, today: date | None) -> dict[str, Any]:
    """Return how many tasks there are of each kind, as `schemas.Stats` has it."""
    rows = await owner.all(_COUNT, today=today)
    tags = {row["tag"]: row["count"] for row in rows if row["tag"] is not None}
    kinds = [row | {"priority": row["priority"] or "none"} for row in rows if row["tag"] is None]

    def total(**values: Any) -> int:
        return sum(row["count"] for row in kinds if all(row[name] == value for name, value in values.items()))

    return {
        "total": total(),
        "pending": total(completed=False),
        "completed": total(completed=True),
        "overdue": None if today is None else total(overdue=True),
        "priorities": {name: total(priority=name) for name in get_args(Priority)},
        "tags": tags,
    }


def new_task(fields: Mapping[str, Any], now: datetime, anchor_day: int | None = None) -> Row:
    """Return a new row with *fields*, without its id and its owner."""
    due_date: date | None = fields["due_date"]
    return {
        **{name: fields[name] for name in WRITABLE},
        "completed_at": now if fields["completed"] else None,
        "version": 1,
        "created_at": now,
        "updated_at": now,
        "anchor_day": anchor_day or (due_date and due_date.day),
        "has_successor": False,
    }


def touched_row(task: Row, changes: dict[str, Any], now: datetime) -> Row:
    """Return *task* with *changes*, each of which is one, and with what every change sets (see `touched`)."""
    after = task | changes | {"version": task["version"] + 1, "updated_at": now}
    if "completed" in changes:
        after["completed_at"] = now if after["completed"] else None
    return after


def touched(
    completed: ColumnElement[bool], changed: ColumnElement[bool] | None = None
) -> dict[str, ColumnElement[Any]]:
    """Return what every change of a task sets, as columns of an UPDATE.

    *completed* is the state that it leaves; *changed* tells whether it changes the task at all (by default
    it does).
    """
    task = TASKS.c
    return {
        "completed": completed,
        "completed_at": case((task.completed == completed, task.completed_at), (completed, NOW)),
        "version": task.version + (literal(1) if changed is None else case((changed, 1), else_=0)),
        "updated_at": NOW if changed is None else case((changed, NOW), else_=task.updated_at),
    }


def successor(task: Row, now: datetime) -> Row | None:
    """Return the next task of a series after *task*, if the calendar goes on, as `new_task` does."""
    anchor_day = task["anchor_day"] or task["due_date"].day
    due_date = next_due_date(task["due_date"], task["recurring"], anchor_day)
    if due_date is None:
        return None
    day = anchor_day if task["recurring"] == "monthly" else None
    return new_task(task | {"due_date": due_date, "completed": False}, now, day)


async def _change(
    owner: Owner,
    statement: Executable,
    task_id: int,
    changes: Mapping[str, Any],
    versions: Collection[int] | None,
) -> Row:
    """Run *statement*, which leaves a task alone whose completion has to create the next one.

    After a loss the change may still be under way: the server goes on with what waits for a lock. To repeat
    it is safe with one version, which only one of the two can find.
    """
    lost: Unavailable | None = None
    sent = []
    for _ in range(SERIES_ATTEMPTS):
        values = _changing(changes) | {"task_id": task_id, "versions": _list(versions)}
        sent.append(values["now"])  # to the microsecond, so that we know our own changes by it
        try:
            if row := await owner.one(statement, **values):
                return row
            if versions is None and not changes.get("completed"):
                raise TaskNotFound
            await _expected_task(owner, task_id, versions)
            if row := await _complete_in_series(owner, values):
                return row
        except VersionConflict as conflict:
            if lost is None:
                raise
            if conflict.task["updated_at"] in sent:
                return conflict.task
            raise lost from conflict
        except Unavailable as error:
            lost = error
            task = await _after_loss(owner, task_id, versions, error)
            if task is None:
                raise TaskNotFound from error
            if task["updated_at"] in sent:
                return task
            if not _is_expected(task, versions) or len(versions or ()) > 1:
                raise
    raise lost or Unavailable


async def _find(owner: Owner, task_id: int) -> Row | None:
    return await owner.one(_SELECT_ONE, task_id=task_id)


async def _expected_task(owner: Owner, task_id: int, versions: Collection[int] | None) -> Row:
    task = await get_task(owner, task_id)
    if not _is_expected(task, versions):
        raise VersionConflict(task)
    return task


def _is_expected(task: Row, versions: Collection[int] | None) -> bool:
    return versions is None or task["version"] in versions


async def _after_loss(
    owner: Owner, task_id: int, versions: Collection[int] | None, error: Unavailable
) -> Row | None:
    """Return the task after a connection broke in the middle of its change, which may have been committed.

    The version tells whether it was. Without one, repeating the change could overwrite a later one.

    Raises:
        Unavailable: *error*, if the connection did not break, or there is no version.
    """
    if not error.lost or versions is None:
        raise error
    return await _find(owner, task_id)


async def _complete_in_series(owner: Owner, values: dict[str, Any]) -> Row | None:
    async with owner.transaction() as tx:
        task = await tx.one(_COMPLETE_IN_SERIES, **values)
        if task is None:
            return None
        if next_task := successor(task, values["now"]):
            await _insert(tx, next_task)
    del task["anchor_day"]
    return task


async def _insert(owner: Owner, values: Mapping[str, Any]) -> Row:
    limit = owner.limit
    values = {f"new_{name}": value for name, value in values.items()}
    if limit.take(owner.user_id):
        row = await owner.one(_INSERT, **values)
        assert row is not None  # noqa: S101 - for the type checker
        return row
    row = await owner.one(_INSERT_WITHIN_LIMIT, tasks_max=limit.tasks_max, **values)
    if row is None:
        raise TooManyTasks(limit.tasks_max)
    limit.counted(owner.user_id, row.pop("count"))
    return row


async def _page(
    owner: Owner,
    build: Callable[..., Executable],
    filters: Filter,
    order: Order,
    limit: int,
    after: Position | None,
) -> list[Row]:
    statement = Deferred(build, (lists.shape_of(filters), order, lists.start_of(after)))
    key, task_id = after or (None, None)
    return await owner.all(
        statement, limit=limit, after_key=key, after_id=task_id, **lists.values_of(filters)
    )


def _changing(changes: Mapping[str, Any]) -> dict[str, Any]:
    due_date: date | None = changes.get("due_date")
    return {
        **{f"sets_{name}": name in changes for name in WRITABLE},
        **{f"new_{name}": changes.get(name) for name in WRITABLE},
        "new_anchor_day": due_date and due_date.day,
        "now": datetime.now(UTC),
    }


def _list(versions: Collection[int] | None) -> list[int] | None:
    return None if versions is None else list(versions)


def _new(name: str) -> ColumnElement[Any]:
    return bindparam(f"new_{name}", type_=TASKS.c[name].type)


_NEW_ROW = {"user_id": OWNED.right, **{name: _new(name) for name in STORED}}


def _insert_within_limit() -> Executable:
    count = select(func.count()).select_from(TASKS).where(OWNED).scalar_subquery()
    row = select(*_NEW_ROW.values()).where(count < bindparam("tasks_max", type_=Integer()))
    return insert(TASKS).from_select(list(_NEW_ROW), row).returning(*COLUMNS, count.label("count"))


def _sets(name: str) -> ColumnElement[bool]:
    return bindparam(f"sets_{name}", type_=Boolean())


def _after(name: str) -> ColumnElement[Any]:
    """The value that the update leaves in a column."""
    return case((_sets(name), _new(name)), else_=TASKS.c[name])


def _changes(name: str) -> ColumnElement[bool]:
    return and_(_sets(name), TASKS.c[name].is_distinct_from(_new(name)))


def _update_statement(*, in_series: bool) -> Executable:
    """Return one of two complementary updates.

    *in_series* changes the task only if it completes a recurring one whose next is due; the other changes it
    in every other case.
    """
    has_successor = and_(TASKS.c.has_successor, not_(_changes("due_date")))
    next_is_due = and_(
        _sets("completed"),
        _new("completed"),
        not_(TASKS.c.completed),
        not_(has_successor),
        _after("recurring").is_not(None),
        _after("due_date").is_not(None),
    )
    changed = or_(*(_changes(name) for name in WRITABLE))
    statement = update(TASKS).where(OWNED, _THIS, _EXPECTED, next_is_due if in_series else not_(next_is_due))
    fields = {name: _after(name) for name in WRITABLE}
    return statement.values(
        fields
        | touched(fields["completed"], changed)
        | {
            "anchor_day": case((_changes("due_date"), _new("anchor_day")), else_=TASKS.c.anchor_day),
            "has_successor": true() if in_series else has_successor,
        }
    ).returning(*COLUMNS, *([TASKS.c.anchor_day] if in_series else []))


def _toggle_statement() -> Executable:
    next_is_due = and_(not_(TASKS.c.completed), NEXT_IS_OPEN)
    return (
        update(TASKS)
        .where(OWNED, _THIS, _EXPECTED, not_(next_is_due))
        .values(touched(not_(TASKS.c.completed)))
        .returning(*COLUMNS)
    )


# A task of a series that has no successor yet.
NEXT_IS_OPEN = and_(
    TASKS.c.has_successor == false(), TASKS.c.recurring.is_not(None), TASKS.c.due_date.is_not(None)
)


def _count_statement() -> Executable:
    task = TASKS.c
    today = bindparam("today", type_=DAY)
    overdue = func.coalesce(and_(not_(task.completed), task.due_date < today), false())
    kinds = (
        select(
            null().label("tag"),
            task.completed,
            task.priority,
            overdue.label("overdue"),
            func.count().label("count"),
        )
        .where(OWNED)
        .group_by(task.completed, task.priority, overdue)
    )
    each = Elements(task.tags).table_valued(column("value", String(TAG_MAX)), name="value")
    used = (
        select(each.c.value.label("tag"), func.count().label("count"))
        .select_from(TASKS.join(each, true()))
        .where(OWNED)
        .group_by(each.c.value)
        .order_by(func.count().desc(), each.c.value)
        .limit(STATS_TAGS_MAX)
        .subquery("used")
    )
    tags = select(used.c.tag, null(), null(), null(), used.c.count)
    return union_all(kinds, tags)


_COUNT = named("count_tasks", _count_statement())
_INSERT = named("create_task", insert(TASKS).values(**_NEW_ROW).returning(*COLUMNS))
_INSERT_WITHIN_LIMIT = named("create_task_within_limit", _insert_within_limit())
_SELECT_ONE = named("get_task", select(*COLUMNS).where(OWNED, _THIS))
_UPDATE = named("update_task", _update_statement(in_series=False))
_COMPLETE_IN_SERIES = named("complete_in_series", _update_statement(in_series=True))
_TOGGLE = named("toggle_task", _toggle_statement())
_DELETE = named("delete_task", delete(TASKS).where(OWNED, _THIS, _EXPECTED).returning(TASKS.c.id))
