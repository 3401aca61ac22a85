"""Many tasks at once: operations are applied in memory to locked rows, then written by a few statements."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import (
    BigInteger,
    bindparam,
    false,
    not_,
    select,
    true,
    update,
)

from database.arrays import records
from database.statements import Deferred, PerDatabase, Row, named
from models import PRIORITY
from queries.filters import Shape, conditions, shape_of, values_of
from queries.owner import COLUMNS, LIVE, OWNER, TASKS, Owner
from queries.revisions import adding, changing, lock
from queries.rows import (
    DELETED,
    DELETED_FOR_GOOD,
    LACKS_SUCCESSOR,
    STORED,
    THESE,
    new_task,
    successor,
    touched,
    touched_row,
)
from refusals import OperationRefused, Refusal, TaskNotFound, TooManyTasks, VersionConflict
from schemas import Complete, Create, Delete, Filter, Operation, Update


class Done(NamedTuple):
    """An operation that was carried out, and the task that it left."""

    kind: Literal["created", "changed", "deleted"]
    task: Row | None = None
    new: int | None = None  # index in the new rows, until they are written


async def run(owner: Owner, operations: Sequence[Operation], *, atomic: bool) -> list[Done | Refusal]:
    """Carry out *operations* in their order and return the outcome of each.

    Raises:
        OperationRefused: *atomic*, and one of them was refused.
    """
    async with owner.transaction() as tx:
        room = owner.tasks_max - await lock(tx)
        ids = sorted({operation.id for operation in operations if not isinstance(operation, Create)})
        rows = await tx.all(_SELECT_SOME, ids=ids) if ids else []
        workbench = _Workbench(rows, room, owner.tasks_max)
        outcomes: list[Done | Refusal] = []
        for index, operation in enumerate(operations):
            try:
                outcomes.append(workbench.apply(operation))
            except Refusal as refusal:
                if atomic:
                    raise OperationRefused(index, refusal) from refusal
                outcomes.append(refusal)
        created = await _write(tx, workbench)
    return [
        Done("created", created[outcome.new])
        if isinstance(outcome, Done) and outcome.new is not None
        else outcome
        for outcome in outcomes
    ]


async def delete_tasks(owner: Owner, filters: Filter) -> list[int]:
    """Delete the tasks that match *filters*, as `tasks.delete_task` does; return their ids, ascending."""
    owner.note_deletion()
    statement = Deferred(_delete_all, (shape_of(filters), owner.has_trash), writes=True)
    rows = await owner.all(statement, now=datetime.now(UTC), **values_of(filters))
    return sorted(row["id"] for row in rows)


async def complete_tasks(owner: Owner, filters: Filter, *, completed: bool) -> int:
    """Complete or reopen the tasks that match *filters* and return how many that changed.

    Raises:
        TooManyTasks: the next tasks of their series would be too many.
    """
    shape, values = shape_of(filters), values_of(filters)
    now = datetime.now(UTC)
    if not completed:
        return len(await owner.all(Deferred(_reopen_all, (shape,), writes=True), now=now, **values))
    async with owner.transaction() as tx:
        room = owner.tasks_max - await lock(tx)
        series = await tx.all(Deferred(_complete_all, (shape, True)), now=now, **values)
        others = await tx.all(Deferred(_complete_all, (shape, False)), now=now, **values)
        if next_tasks := list(filter(None, (successor(task, now) for task in series))):
            if len(next_tasks) > room:
                raise TooManyTasks(owner.tasks_max)
            await _insert_all(tx, next_tasks)
    return len(series) + len(others)


class _Workbench:
    """Applies operations to rows in memory, by the same rules as the statements of `tasks.py`."""

    def __init__(self, rows: Sequence[Row], room: int, tasks_max: int) -> None:
        self.rows = {row["id"]: row for row in rows}
        self.changed: set[int] = set()
        self.deleted: list[int] = []
        self.new: list[Row] = []
        self.room = room  # how many more tasks the owner may have
        self._tasks_max = tasks_max
        self.now = datetime.now(UTC)

    def apply(self, operation: Operation) -> Done:
        """Carry out *operation*.

        Raises:
            Refusal: it cannot be carried out; no row has been changed.
        """
        if isinstance(operation, Create):
            self._add(new_task(vars(operation.task), self.now))
            return Done("created", new=len(self.new) - 1)
        task = self.rows.get(operation.id)
        if task is None:
            raise TaskNotFound
        if operation.version not in (None, task["version"]):
            raise VersionConflict(task)
        match operation:
            case Delete():
                del self.rows[operation.id]
                self.room += 1
                self.deleted.append(operation.id)
                return Done("deleted")
            case Complete():
                return self._update(task, {"completed": operation.completed})
            case Update():
                return self._update(task, operation.changes.changes())

    def _add(self, row: Row) -> None:
        if self.room <= 0:
            raise TooManyTasks(self._tasks_max)
        self.room -= 1
        self.new.append(row)

    def _update(self, task: Row, changes: dict[str, Any]) -> Done:
        changed = {name: value for name, value in changes.items() if value != task[name]}
        if not changed:
            return Done("changed", _shown(task))
        after = touched_row(task, changed, self.now)
        if "due_date" in changed:
            after |= {"anchor_day": after["due_date"] and after["due_date"].day, "has_successor": False}
        completes = "completed" in changed and after["completed"]
        if completes and not after["has_successor"] and after["recurring"] and after["due_date"]:
            after["has_successor"] = True
            if next_task := successor(after, self.now):
                self._add(next_task)
        self.rows[task["id"]] = after
        self.changed.add(task["id"])
        return Done("changed", _shown(after))


def _shown(task: Row) -> Row:
    return {column.name: task[column.name] for column in COLUMNS}


async def _write(owner: Owner, workbench: _Workbench) -> list[Row]:
    """Write the rows of *workbench* and return the new ones."""
    if workbench.deleted:
        owner.note_deletion()
        statement = _DELETE_SOME if owner.has_trash else _DELETE_SOME_FOR_GOOD
        await owner.all(statement, ids=workbench.deleted, now=workbench.now)
    if changed := [workbench.rows[task_id] for task_id in workbench.changed if task_id in workbench.rows]:
        await owner.all(_UPDATE_SOME, ids=[row["id"] for row in changed], records=_json(changed))
    if not workbench.new:
        return []
    created = await _insert_all(owner, workbench.new)
    return sorted(created, key=lambda row: int(row["id"]))


async def _insert_all(owner: Owner, rows: Sequence[Row]) -> list[Row]:
    values = {"records": _json(rows), "new_count": len(rows), "tasks_max": owner.tasks_max}
    created = await owner.all(_INSERT_ALL, **values)
    if not created:  # the owner's first tasks, of several requests at once
        raise TooManyTasks(owner.tasks_max)
    return created


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as the tables store them: ranks for priorities, times in UTC without an offset."""
    times = {
        name: value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        for name, value in row.items()
        if isinstance(value, datetime)
    }
    return times | {"priority": PRIORITY.rank(row["priority"]) if row["priority"] else None}


def _json(rows: Iterable[Row]) -> str:
    return msgspec.json.encode([{**row, **_stored(row)} for row in rows]).decode()


_RECORDS, _MEMBERS = records("records", {name: TASKS.c[name].type for name in ("id", *STORED)})


def _delete_all(shape: Shape, has_trash: bool) -> PerDatabase:
    statement = update(TASKS).where(*conditions(shape)).values(DELETED if has_trash else DELETED_FOR_GOOD)
    return changing("delete_tasks", statement, TASKS.c.id, adds=-1)


def _reopen_all(shape: Shape) -> PerDatabase:
    statement = update(TASKS).where(*conditions(shape), TASKS.c.completed)
    return changing("reopen_tasks", statement.values(touched(false())), TASKS.c.id)


def _complete_all(shape: Shape, in_series: bool) -> PerDatabase:
    condition = LACKS_SUCCESSOR if in_series else not_(LACKS_SUCCESSOR)
    statement = update(TASKS).where(*conditions(shape), not_(TASKS.c.completed), condition)
    if not in_series:
        return changing("complete_tasks", statement.values(touched(true())), TASKS.c.id)
    values = touched(true()) | {"has_successor": true()}
    return changing("complete_all_in_series", statement.values(values), *COLUMNS, TASKS.c.anchor_day)


_SELECT_SOME = named(
    "get_tasks", select(*COLUMNS, TASKS.c.anchor_day, TASKS.c.has_successor).where(LIVE, THESE)
)
_DELETE_SOME, _DELETE_SOME_FOR_GOOD = (
    changing("delete_some", update(TASKS).where(LIVE, THESE).values(deleted), TASKS.c.id, adds=-1)
    for deleted in (DELETED, DELETED_FOR_GOOD)
)
_UPDATE_SOME = changing(
    "update_some",
    update(TASKS)
    # Ids first: SQLite would otherwise scan all records for each task of the owner.
    .where(LIVE, THESE, TASKS.c.id == _MEMBERS["id"])
    .values({name: _MEMBERS[name] for name in STORED if name != "created_at"}),
    TASKS.c.id,
)
_INSERT_ALL = adding(
    "create_some",
    select(OWNER.label("user_id"), *(_MEMBERS[name].label(name) for name in STORED)).select_from(_RECORDS),
    *COLUMNS,
    count=bindparam("new_count", type_=BigInteger()),
)
