"""How many tasks of each kind an owner has, in one statement."""

from datetime import date
from typing import Any, get_args

from sqlalchemy import String, and_, bindparam, column, false, func, not_, null, select, true, union_all
from sqlalchemy.sql.base import Executable

from database.arrays import Elements
from database.statements import named
from models import DAY, TAG_MAX, Priority
from queries.owner import LIVE, TASKS, Owner
from queries.revisions import REVISION_OF_OWNER
from schemas import STATS_TAGS_MAX


async def count_tasks(owner: Owner, today: date | None) -> tuple[dict[str, Any], int]:
    """Return how many tasks there are of each kind, as `schemas.Stats`, and the owner's revision."""
    *rows, last = await owner.all(_COUNT, today=today)
    tags = {row["tag"]: row["count"] for row in rows if row["tag"] is not None}
    kinds = [row | {"priority": row["priority"] or "none"} for row in rows if row["tag"] is None]

    def total(**values: Any) -> int:
        return sum(row["count"] for row in kinds if all(row[name] == value for name, value in values.items()))

    counts = {
        "total": total(),
        "pending": total(completed=False),
        "completed": total(completed=True),
        "overdue": None if today is None else total(overdue=True),
        "priorities": {name: total(priority=name) for name in get_args(Priority)},
        "tags": tags,
    }
    return counts, int(last["count"] or 0)


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
        .where(LIVE)
        .group_by(task.completed, task.priority, overdue)
    )
    each = Elements(task.tags).table_valued(column("value", String(TAG_MAX)), name="value")
    used = (
        select(each.c.value.label("tag"), func.count().label("count"))
        .select_from(TASKS.join(each, true()))
        .where(LIVE)
        .group_by(each.c.value)
        .order_by(func.count().desc(), each.c.value)
        .limit(STATS_TAGS_MAX)
        .subquery("used")
    )
    tags = select(used.c.tag, null(), null(), null(), used.c.count)
    revision = select(null(), null(), null(), null(), REVISION_OF_OWNER)
    return union_all(kinds, tags, revision)


_COUNT = named("count_tasks", _count_statement())
