"""The trash: deleted tasks, which can be restored until they are deleted for good.

Of a task that was deleted for good a tombstone stays, from which the owner's devices learn that it is gone.
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Integer, Select, Update, bindparam, false, select, tuple_, update

from database.statements import PerDatabase, Row, named
from errors import Unavailable
from models import BIG_ID
from queries.owner import COLUMNS, OWNED, TASKS, Owner
from queries.revisions import changing, lock
from queries.rows import ERASED, EXPECTED, IN_TRASH, RESTORED, THESE, THIS, is_expected
from refusals import TaskNotFound, TooManyTasks, VersionConflict
from schemas import Order, Position

LAST_DELETED_FIRST = Order("deleted_at", descending=True)


async def list_trash(owner: Owner, limit: int, after: Position | None = None) -> list[Any]:
    """Return up to *limit* tasks in the trash, the last deleted first, as objects that have `deleted_at`."""
    if after is None:
        return await owner.all(_SELECT_FIRST, limit=limit)
    return await owner.all(_SELECT_NEXT, limit=limit, after_key=after.key, after_id=after.task_id)


async def task_in_trash(owner: Owner, task_id: int) -> Row:
    """Return the task with its `deleted_at`.

    Raises:
        TaskNotFound: there is none with this id in the trash.
    """
    task = await deleted_or_live_task(owner, task_id)
    if task["deleted_at"] is None:
        raise TaskNotFound
    return task


async def deleted_or_live_task(owner: Owner, task_id: int) -> Row:
    """Return the task with its `deleted_at`, which is None unless it is in the trash.

    Raises:
        TaskNotFound: the owner has none with this id, or it was deleted for good.
    """
    task = await owner.one(_SELECT_ONE, task_id=task_id)
    if task is None:
        raise TaskNotFound
    return task


async def restore_task(owner: Owner, task_id: int, versions: Collection[int] | None = None) -> Row:
    """Bring the task back from the trash and return it; one that is not in the trash stays as it is.

    Raises:
        TaskNotFound: the owner has none with this id, or it was deleted for good.
        VersionConflict: the task's version is not one of *versions*.
        TooManyTasks: it would be one too many.
    """
    now = datetime.now(UTC)  # to the microsecond, so it identifies our own change
    values = {"task_id": task_id, "versions": None if versions is None else list(versions), "now": now}
    try:
        async with owner.transaction() as tx:
            if restored := await _restore(tx, _RESTORE_ONE, **values):
                return restored[0]
            task = await deleted_or_live_task(tx, task_id)
    except Unavailable as error:
        if not error.lost:
            raise
        task = await deleted_or_live_task(owner, task_id)
        if task["updated_at"] != now:
            raise
        versions = None
    if not is_expected(task, versions):
        raise VersionConflict(task)
    del task["deleted_at"]
    return task


async def restore_tasks(owner: Owner, ids: Sequence[int]) -> list[int]:
    """Bring those of *ids* that are in the trash back and return their ids, ascending.

    Raises:
        TooManyTasks: they would be too many; none was restored.
    """
    async with owner.transaction() as tx:
        restored = await _restore(tx, _RESTORE_SOME, ids=ids, now=datetime.now(UTC))
    return sorted(row["id"] for row in restored)


async def erase_task(owner: Owner, task_id: int, versions: Collection[int] | None = None) -> None:
    """Delete the task in the trash for good.

    Raises:
        TaskNotFound: there is none with this id in the trash.
        VersionConflict: the task's version is not one of *versions*.
    """
    owner.note_deletion()
    expected = None if versions is None else list(versions)
    try:
        if not await owner.one(_ERASE_ONE, task_id=task_id, versions=expected):
            task = await task_in_trash(owner, task_id)
            if not is_expected(task, versions):
                raise VersionConflict(task)
            raise TaskNotFound  # moved to the trash after our statement
    except Unavailable as error:
        if not error.lost or versions is None or await owner.one(_SELECT_ONE, task_id=task_id):
            raise
        # It is gone, and it existed, because the client knew its version.


async def empty_trash(owner: Owner) -> int:
    """Delete all tasks in the trash for good and return how many there were."""
    owner.note_deletion()
    return len(await owner.all(_ERASE_ALL))


async def _restore(tx: Owner, statement: PerDatabase, **values: Any) -> list[Row]:
    room = tx.tasks_max - await lock(tx)
    restored = await tx.all(statement, **values)
    if restored and len(restored) > room:
        raise TooManyTasks(tx.tasks_max)  # rolls back
    return restored


def _page(*, continued: bool) -> Select[Any]:
    position = tuple_(TASKS.c.deleted_at, TASKS.c.id)
    after = tuple_(bindparam("after_key", type_=TASKS.c.deleted_at.type), bindparam("after_id", type_=BIG_ID))
    statement = select(*COLUMNS, TASKS.c.deleted_at).where(OWNED, IN_TRASH)
    if continued:
        statement = statement.where(position < after)
    newest_first = TASKS.c.deleted_at.desc(), TASKS.c.id.desc()
    statement = statement.order_by(*newest_first).limit(bindparam("limit", type_=Integer))
    return named("list_trash", statement, objects=True)


def _change(*conditions: ColumnElement[bool]) -> Update:
    return update(TASKS).where(OWNED, IN_TRASH, *conditions)


_SELECT_FIRST, _SELECT_NEXT = _page(continued=False), _page(continued=True)
_SELECT_ONE = named(
    "get_deleted_or_live_task",
    select(*COLUMNS, TASKS.c.deleted_at).where(OWNED, THIS, TASKS.c.erased == false()),
)
_RESTORE_ONE = changing("restore_task", _change(THIS, EXPECTED).values(RESTORED), *COLUMNS, adds=1)
_RESTORE_SOME = changing("restore_tasks", _change(THESE).values(RESTORED), TASKS.c.id, adds=1)
# Erasing takes no revision: devices removed the task when it was deleted. Emptying still locks the owner's
# row, or it could deadlock with a concurrent restore.
_ERASE_ONE = named("erase_task", _change(THIS, EXPECTED).values(ERASED).returning(TASKS.c.id))
_ERASE_ALL = changing("empty_trash", _change().values(ERASED), TASKS.c.id, changes=false())
