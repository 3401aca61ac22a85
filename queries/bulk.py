"""Many tasks at once: operations are applied in memory to locked rows, then written by a few statements."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from sys import maxsize
from typing import Any, Literal, NamedTuple

import orjson
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    bindparam,
    delete,
    false,
    func,
    insert,
    not_,
    select,
    true,
    update,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NULLTYPE

from database.arrays import AnyOf, Member, list_of, records
from database.statements import Deferred, Row, named
from models import BIG_ID, PRIORITY
from queries.filters import Shape, conditions, shape_of, values_of
from queries.owner import COLUMNS, OWNED, TASKS, Owner
from queries.rows import LACKS_SUCCESSOR, STORED, new_task, successor, touched, touched_row
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
        ids = sorted({operation.id for operation in operations if not isinstance(operation, Create)})
        rows = await tx.all(_SELECT_FOR_UPDATE, ids=ids) if ids else []
        may_add = _may_add(operations, rows)
        workbench = _Workbench(rows, await _room(tx) if may_add else 0, owner.quota.tasks_max)
        outcomes: list[Done | Refusal] = []
        for index, operation in enumerate(operations):
            try:
                outcomes.append(workbench.apply(operation))
            except Refusal as refusal:
                if atomic:
                    raise OperationRefused(index, refusal) from refusal
                outcomes.append(refusal)
        created = await _write(tx, workbench)
    if may_add and owner.quota.tasks_max:
        owner.quota.counted(owner.user_id, owner.quota.tasks_max - workbench.room)
    return [
        Done("created", created[outcome.new])
        if isinstance(outcome, Done) and outcome.new is not None
        else outcome
        for outcome in outcomes
    ]


async def delete_tasks(owner: Owner, filters: Filter) -> int:
    """Delete the tasks that match *filters* and return how many there were."""
    statement = Deferred(_delete_all, (shape_of(filters),))
    return len(await owner.all(statement, **values_of(filters)))


async def complete_tasks(owner: Owner, filters: Filter, *, completed: bool) -> int:
    """Complete or reopen the tasks that match *filters* and return how many that changed.

    Raises:
        TooManyTasks: the next tasks of their series would be too many.
    """
    shape, values = shape_of(filters), values_of(filters)
    now = datetime.now(UTC)
    if not completed:
        return len(await owner.all(Deferred(_reopen_all, (shape,)), now=now, **values))
    async with owner.transaction() as tx:
        series = await tx.all(Deferred(_complete_all, (shape, True)), now=now, **values)
        others = await tx.all(Deferred(_complete_all, (shape, False)), now=now, **values)
        if next_tasks := list(filter(None, (successor(task, now) for task in series))):
            if len(next_tasks) > await _room(tx):
                raise TooManyTasks(owner.quota.tasks_max)
            await tx.all(_INSERT_ALL, records=_json(next_tasks))
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
        self._now = datetime.now(UTC)

    def apply(self, operation: Operation) -> Done:
        """Carry out *operation*.

        Raises:
            Refusal: it cannot be carried out; no row has been changed.
        """
        if isinstance(operation, Create):
            self._add(new_task(vars(operation.task), self._now))
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
        after = touched_row(task, changed, self._now)
        if "due_date" in changed:
            after |= {"anchor_day": after["due_date"] and after["due_date"].day, "has_successor": False}
        completes = "completed" in changed and after["completed"]
        if completes and not after["has_successor"] and after["recurring"] and after["due_date"]:
            after["has_successor"] = True
            if next_task := successor(after, self._now):
                self._add(next_task)
        self.rows[task["id"]] = after
        self.changed.add(task["id"])
        return Done("changed", _shown(after))


def _shown(task: Row) -> Row:
    return {column.name: task[column.name] for column in COLUMNS}


def _may_add(operations: Sequence[Operation], rows: Sequence[Row]) -> bool:
    """Whether *operations* may add tasks, including the next ones of series."""
    return any(row["recurring"] for row in rows) or any(
        isinstance(operation, Create) or (isinstance(operation, Update) and operation.changes.recurring)
        for operation in operations
    )


async def _room(owner: Owner) -> int:
    """Return how many more tasks *owner* may have."""
    if not owner.quota.tasks_max:
        return maxsize
    await owner.one(_LOCK_OWNER)  # so that the count includes other bulk inserts
    count = await owner.one(_COUNT)
    assert count is not None  # noqa: S101 - an aggregate has one row
    return owner.quota.tasks_max - int(count["count"])


async def _write(owner: Owner, workbench: _Workbench) -> list[Row]:
    """Write the rows of *workbench* and return the new ones."""
    if workbench.deleted:
        await owner.all(_DELETE_SOME, ids=workbench.deleted)
    if changed := [workbench.rows[task_id] for task_id in workbench.changed if task_id in workbench.rows]:
        await owner.all(_UPDATE_SOME, ids=[row["id"] for row in changed], records=_json(changed))
    if not workbench.new:
        return []
    created = await owner.all(_INSERT_ALL, records=_json(workbench.new))
    return sorted(created, key=lambda row: int(row["id"]))


def _stored(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields as the tables store them: ranks for priorities, times in UTC without an offset."""
    times = {
        name: value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        for name, value in row.items()
        if isinstance(value, datetime)
    }
    return times | {"priority": PRIORITY.rank(row["priority"]) if row["priority"] else None}


def _json(rows: Iterable[Row]) -> str:
    return orjson.dumps([{**row, **_stored(row)} for row in rows]).decode()


_IDS = AnyOf(TASKS.c.id, bindparam("ids", type_=list_of(BigInteger())))
_RECORDS = records("records")
_MEMBERS = {name: Member(_RECORDS.c.value, name, TASKS.c[name].type) for name in STORED}


def _locked(shape: Shape) -> list[ColumnElement[bool]]:
    """Return the conditions of a list of *shape*, which lock its tasks.

    They are locked in the order of their ids, so that two requests cannot deadlock.
    """
    ids = select(TASKS.c.id).where(*conditions(shape)).order_by(TASKS.c.id).with_for_update()
    return [OWNED, TASKS.c.id.in_(ids)]


def _delete_all(shape: Shape) -> Executable:
    statement = delete(TASKS).where(*_locked(shape)).returning(TASKS.c.id)
    return named("delete_tasks", statement)


def _reopen_all(shape: Shape) -> Executable:
    statement = update(TASKS).where(*_locked(shape), TASKS.c.completed)
    return named("reopen_tasks", statement.values(touched(false())).returning(TASKS.c.id))


def _complete_all(shape: Shape, in_series: bool) -> Executable:
    condition = LACKS_SUCCESSOR if in_series else not_(LACKS_SUCCESSOR)
    statement = update(TASKS).where(*_locked(shape), not_(TASKS.c.completed), condition)
    if not in_series:
        return named("complete_tasks", statement.values(touched(true())).returning(TASKS.c.id))
    values = touched(true()) | {"has_successor": true()}
    return named("complete_all_in_series", statement.values(values).returning(*COLUMNS, TASKS.c.anchor_day))


class _OwnerLock(FunctionElement[None]):
    """Takes the owner's advisory lock until the transaction ends, so that a count sees other bulk inserts.

    SQLite needs none: it has one writer.
    """

    type = NULLTYPE
    inherit_cache = True


@compiles(_OwnerLock)
def _owner_lock(element: _OwnerLock, compiler: SQLCompiler, **options: Any) -> str:
    return f"pg_advisory_xact_lock(hashtextextended({compiler.process(element.clauses, **options)}, 1))"


@compiles(_OwnerLock, "sqlite")
def _owner_lock_sqlite(_element: _OwnerLock, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


_LOCK_OWNER = named("lock_owner", select(_OwnerLock(OWNED.right).label("waited")))
_COUNT = named("count_all", select(func.count().label("count")).select_from(TASKS).where(OWNED))
_SELECT_FOR_UPDATE = named(
    "lock_tasks",
    select(*COLUMNS, TASKS.c.anchor_day, TASKS.c.has_successor)
    .where(OWNED, _IDS)
    .order_by(TASKS.c.id)  # the order of `_locked`
    .with_for_update(),
)
_DELETE_SOME = named("delete_some", delete(TASKS).where(OWNED, _IDS).returning(TASKS.c.id))
_UPDATE_SOME = named(
    "update_some",
    update(TASKS)
    # Ids first: SQLite would otherwise scan all records for each task of the owner.
    .where(OWNED, _IDS, TASKS.c.id == Member(_RECORDS.c.value, "id", BIG_ID))
    .values({name: value for name, value in _MEMBERS.items() if name != "created_at"})
    .returning(TASKS.c.id),
)
_INSERT_ALL = named(
    "create_some",
    insert(TASKS)
    .from_select(["user_id", *_MEMBERS], select(OWNED.right, *_MEMBERS.values()).select_from(_RECORDS))
    .returning(*COLUMNS),
)
