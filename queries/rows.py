"""The values of a new row and what a change sets, in SQL for single tasks and in memory for bulk."""

from collections.abc import Collection, Mapping
from datetime import date, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    and_,
    bindparam,
    case,
    false,
    literal,
    literal_column,
    null,
    or_,
    true,
)

from database.arrays import AnyOf, list_of
from database.statements import Row
from models import BIG_ID, TIMESTAMP, NoTexts, TaskFields, TaskHistory, TaskKey
from queries.owner import TASKS
from queries.recurrence import next_due_date

WRITABLE = tuple(TaskFields.model_fields)
# What a new row has values for.
STORED = tuple(
    column.name for column in TASKS.c if column.name not in {*TaskKey.model_fields, *TaskHistory.model_fields}
)

NOW = bindparam("now", type_=TIMESTAMP)
THIS = TASKS.c.id == bindparam("task_id", type_=BIG_ID)
THESE = AnyOf(TASKS.c.id, bindparam("ids", type_=list_of(BigInteger())))
_VERSIONS = bindparam("versions", type_=list_of(Integer()))
EXPECTED = or_(_VERSIONS.is_(None), AnyOf(TASKS.c.version, _VERSIONS))
# True of a recurring task that has no successor yet.
LACKS_SUCCESSOR = and_(
    TASKS.c.has_successor == false(), TASKS.c.recurring.is_not(None), TASKS.c.due_date.is_not(None)
)

IN_TRASH = and_(TASKS.c.deleted_at.is_not(None), TASKS.c.erased == false())
_TOUCHED = {"version": TASKS.c.version + 1, "updated_at": NOW}
# What moves a task to the trash, what brings it back, and what leaves nothing of it but a tombstone.
DELETED: dict[str, Any] = {"deleted_at": NOW, **_TOUCHED}
RESTORED: dict[str, Any] = {"deleted_at": null(), **_TOUCHED}
ERASED: dict[str, Any] = {  # without values, whose names could be those of a filter
    "erased": true(),
    "completed": false(),
    "has_successor": false(),
    "title": literal_column("''"),
    "tags": NoTexts(),
    "reminder": false(),
    **dict.fromkeys(("description", "priority", "category", "due_date", "due_time", "recurring"), null()),
    **dict.fromkeys(("completed_at", "anchor_day"), null()),
}
DELETED_FOR_GOOD = DELETED | ERASED


def is_expected(task: Row, versions: Collection[int] | None) -> bool:
    return versions is None or task["version"] in versions


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
    """Return *task* with *changes*, all to other values, and with what every change sets (see `touched`)."""
    after = task | changes | {"version": task["version"] + 1, "updated_at": now}
    if "completed" in changes:
        after["completed_at"] = now if after["completed"] else None
    return after


def touched(
    completed: ColumnElement[bool], changed: ColumnElement[bool] | None = None
) -> dict[str, ColumnElement[Any]]:
    """Return the columns that every UPDATE of a task sets.

    *completed* is the state after it; *changed* is whether it changes the task at all (by default it does).
    """
    task = TASKS.c
    return {
        "completed": completed,
        "completed_at": case((task.completed == completed, task.completed_at), (completed, NOW)),
        "version": task.version + (literal(1) if changed is None else case((changed, 1), else_=0)),
        "updated_at": NOW if changed is None else case((changed, NOW), else_=task.updated_at),
    }


def successor(task: Row, now: datetime) -> Row | None:
    """Return the row of the next task in the series of *task*, or None at the end of the calendar."""
    anchor_day = task["anchor_day"] or task["due_date"].day
    due_date = next_due_date(task["due_date"], task["recurring"], anchor_day)
    if due_date is None:
        return None
    day = anchor_day if task["recurring"] == "monthly" else None
    return new_task(task | {"due_date": due_date, "completed": False}, now, day)
