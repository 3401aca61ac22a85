"""The owner's row: each change of tasks takes the owner's next revision and counts them, in one statement.

On PostgreSQL the statement locks the owner's row before it changes tasks, so that revisions become visible in
their order, counts are exact, and two requests cannot deadlock. On SQLite, which has one writer, triggers of
the schema do the same.
"""

from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    Table,
    Update,
    bindparam,
    case,
    func,
    insert,
    literal_column,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import insert as insert_or_update

from database.statements import PerDatabase, named
from models import TaskOwner
from queries.owner import OWNER, TASKS, Owner

OWNERS: Table = TaskOwner.__table__  # type: ignore[attr-defined] # SQLModel adds it
_OWN = OWNERS.c.user_id == OWNER
_REVISION, _COUNT = OWNERS.c.revision, OWNERS.c.task_count
_TASKS_MAX = bindparam("tasks_max", type_=BigInteger())
REVISION_OF_OWNER = select(_REVISION).where(_OWN).scalar_subquery()
FORGOTTEN_OF_OWNER = select(OWNERS.c.forgotten_revision).where(_OWN).scalar_subquery()
ONE: ColumnElement[int] = literal_column("1", BigInteger())


async def revision_of(owner: Owner) -> int:
    """Return the owner's last revision, 0 before the first change."""
    row = await owner.one(_SELECT_REVISION)
    return int(row["revision"]) if row else 0


async def lock(owner: Owner) -> int:
    """Let no other request change tasks of *owner* until the transaction ends; return how many there are."""
    row = await owner.one(_LOCK)
    return int(row["task_count"]) if row else 0


def changing(
    name: str,
    change: Update,
    *columns: ColumnElement[Any],
    changes: ColumnElement[bool] | None = None,
    adds: Literal[-1, 0, 1] = 0,
) -> PerDatabase:
    """Return *change* of tasks as a statement that returns their *columns*.

    *changes* is whether it changes a task at all (by default it does); *adds* is what each task that it
    changes adds to their count.
    """
    locked = select(_REVISION).where(_OWN).with_for_update(key_share=True).cte("locked")
    following = locked.c.revision + ONE
    revision = following if changes is None else case((changes, following), else_=TASKS.c.revision)
    changed = (
        change.where(locked.c.revision.is_not(None))  # joins it, so that it is locked first
        .values(revision=revision)
        .returning(*columns, TASKS.c.revision.label("new_revision"))
        .cte("changed")
    )
    latest = select(func.max(changed.c.new_revision).label("revision"), func.count().label("count")).subquery(
        "latest"
    )
    added = {_COUNT: _COUNT + literal_column(str(adds), BigInteger()) * latest.c.count} if adds else {}
    counted = (
        update(OWNERS)
        .where(_OWN, latest.c.revision > _REVISION)
        .values({_REVISION: latest.c.revision} | added)
        .cte("counted")
    )
    statement = select(*(changed.c[column.name] for column in columns)).add_cte(counted)
    return PerDatabase(named(name, statement), named(name, change.returning(*columns)))


def adding(
    name: str, rows: Select[Any], *columns: ColumnElement[Any], count: ColumnElement[int]
) -> PerDatabase:
    """Return a statement that inserts *rows*, *count* of them, and returns their *columns*.

    *rows* has the names of the tasks' columns. Without room for all, it inserts and returns none.
    """
    names = [column.name for column in rows.selected_columns]
    upsert = insert_or_update(OWNERS).values({OWNERS.c.user_id: OWNER, _REVISION: ONE, _COUNT: count})
    following = (
        upsert.on_conflict_do_update(
            index_elements=[OWNERS.c.user_id],
            set_={"revision": _REVISION + ONE, "task_count": _COUNT + count},
            where=_COUNT + count <= _TASKS_MAX,
        )
        .returning(_REVISION)
        .cte("following")
    )
    numbered = rows.add_columns(following.c.revision)
    known = select(_COUNT).where(_OWN).scalar_subquery()
    within_limit = rows.where(func.coalesce(known, literal_column("0")) + count <= _TASKS_MAX)
    return PerDatabase(
        named(name, insert(TASKS).from_select([*names, "revision"], numbered).returning(*columns)),
        named(name, insert(TASKS).from_select(names, within_limit).returning(*columns)),
    )


_SELECT_REVISION = named("get_revision", select(_REVISION).where(_OWN))
_LOCK = named("lock_owner", select(_COUNT).where(_OWN).with_for_update(key_share=True))
