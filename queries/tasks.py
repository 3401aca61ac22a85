"""Every statement about single tasks. Each starts from the owner, takes one round trip and is built once."""

from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    and_,
    bindparam,
    case,
    not_,
    or_,
    select,
    true,
    update,
)

from database.statements import PerDatabase, Row, Statement, named
from errors import Unavailable
from queries.owner import COLUMNS, LIVE, OWNER, TASKS, Owner
from queries.revisions import ONE, adding, changing
from queries.rows import (
    DELETED,
    DELETED_FOR_GOOD,
    EXPECTED,
    LACKS_SUCCESSOR,
    STORED,
    THIS,
    WRITABLE,
    is_expected,
    new_task,
    successor,
    touched,
)
from refusals import TaskNotFound, TooManyTasks, VersionConflict

SERIES_ATTEMPTS = 3  # concurrent requests may change the task between two statements


async def create_task(owner: Owner, fields: Mapping[str, Any]) -> Row:
    """Insert a task of *owner* and return it.

    Raises:
        TooManyTasks: the owner has as many as they may have.
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

    Setting a field to its present value is no change: version and times stay, so a retry is harmless.

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
    """Move the task to the trash, or delete it for good where there is none.

    Raises:
        TaskNotFound: the owner has none with this id.
        VersionConflict: the task's version is not one of *versions*.
    """
    values = {"task_id": task_id, "versions": _list(versions), "now": datetime.now(UTC)}
    statement = _DELETE if owner.has_trash else _DELETE_FOR_GOOD
    owner.note_deletion()
    try:
        deleted = await owner.one(statement, **values)
    except Unavailable as error:
        task = await _after_loss(owner, task_id, versions, error)
        if task is not None and is_expected(task, versions):
            await owner.one(statement, **values)
            task = await _find(owner, task_id)
        if task is not None:
            raise
        return  # it is gone, and it existed, because the client knew its version
    if not deleted:
        if versions is not None:
            await _expected_task(owner, task_id, versions)
        raise TaskNotFound


async def _change(
    owner: Owner,
    statement: Statement,
    task_id: int,
    changes: Mapping[str, Any],
    versions: Collection[int] | None,
) -> Row:
    """Run *statement*, which skips a task whose completion has to create the next one.

    After the connection breaks, the server may still carry out a statement that waits for a lock. Repeating
    it is safe with a single version, because only one of the two statements can match that.
    """
    lost: Unavailable | None = None
    sent = []
    for _ in range(SERIES_ATTEMPTS):
        values = _changing(changes) | {"task_id": task_id, "versions": _list(versions)}
        sent.append(values["now"])  # to the microsecond, so it identifies our own changes
        try:
            if row := await owner.one(statement, **values):
                return row
            if versions is None and not changes.get("completed"):
                raise TaskNotFound
            await _expected_task(owner, task_id, versions)
            if _may_be_due_again(changes) and (row := await _complete_in_series(owner, values)):
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
            if not is_expected(task, versions) or len(versions or ()) > 1:
                raise
    raise lost or Unavailable


def _may_be_due_again(changes: Mapping[str, Any]) -> bool:
    """Whether *changes* complete a task that may stay in a series.

    With other values the condition of `_COMPLETE_IN_SERIES` is constantly false, which Citus cannot run.
    """
    return bool(changes.get("completed")) and None not in (
        changes.get("recurring", ...),
        changes.get("due_date", ...),
    )


async def _find(owner: Owner, task_id: int) -> Row | None:
    return await owner.one(_SELECT_ONE, task_id=task_id)


async def _expected_task(owner: Owner, task_id: int, versions: Collection[int] | None) -> Row:
    task = await get_task(owner, task_id)
    if not is_expected(task, versions):
        raise VersionConflict(task)
    return task


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
    new = {_NEW_NAMES[name]: value for name, value in values.items()}
    row = await owner.one(_INSERT, tasks_max=owner.tasks_max, **new)
    if row is None:
        raise TooManyTasks(owner.tasks_max)
    return row


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


_NEW_NAMES = {name: f"new_{name}" for name in STORED}


def _new(name: str) -> ColumnElement[Any]:
    return bindparam(f"new_{name}", type_=TASKS.c[name].type)


def _sets(name: str) -> ColumnElement[bool]:
    return bindparam(f"sets_{name}", type_=Boolean())


def _after(name: str) -> ColumnElement[Any]:
    """The value that the update leaves in a column."""
    return case((_sets(name), _new(name)), else_=TASKS.c[name])


def _changes(name: str) -> ColumnElement[bool]:
    return and_(_sets(name), TASKS.c[name].is_distinct_from(_new(name)))


def _insert_statement() -> PerDatabase:
    row = select(OWNER.label("user_id"), *(_new(name).label(name) for name in STORED))
    return adding("create_task", row, *COLUMNS, count=ONE)


def _update_statement(name: str, *, in_series: bool) -> PerDatabase:
    """Return one of two complementary updates.

    *in_series* matches only if it completes a recurring task whose successor is due; the other matches in
    every other case.
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
    fields = {name: _after(name) for name in WRITABLE}
    statement = (
        update(TASKS)
        .where(LIVE, THIS, EXPECTED, next_is_due if in_series else not_(next_is_due))
        .values(
            fields
            | touched(fields["completed"], changed)
            | {
                "anchor_day": case((_changes("due_date"), _new("anchor_day")), else_=TASKS.c.anchor_day),
                "has_successor": true() if in_series else has_successor,
            }
        )
    )
    more = [TASKS.c.anchor_day] if in_series else []
    return changing(name, statement, *COLUMNS, *more, changes=changed)


def _toggle_statement() -> PerDatabase:
    next_is_due = and_(not_(TASKS.c.completed), LACKS_SUCCESSOR)
    statement = update(TASKS).where(LIVE, THIS, EXPECTED, not_(next_is_due))
    return changing("toggle_task", statement.values(touched(not_(TASKS.c.completed))), *COLUMNS)


_INSERT = _insert_statement()
_SELECT_ONE = named("get_task", select(*COLUMNS).where(LIVE, THIS))
_UPDATE = _update_statement("update_task", in_series=False)
_COMPLETE_IN_SERIES = _update_statement("complete_in_series", in_series=True)
_TOGGLE = _toggle_statement()
_DELETE, _DELETE_FOR_GOOD = (
    changing("delete_task", update(TASKS).where(LIVE, THIS, EXPECTED).values(deleted), TASKS.c.id, adds=-1)
    for deleted in (DELETED, DELETED_FOR_GOOD)
)
