"""What has changed since a position: tasks in their latest state, and tombstones of those deleted since.

Tasks are read in the order of their owner's revisions. A task that changes while a client reads comes again.
"""

from sys import maxsize
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Integer, bindparam, func, literal_column, or_, select, tuple_

from database.arrays import AnyOf, list_of
from database.base import Database
from database.statements import ABSENT, PerDatabase, headed, named
from models import BIG_ID
from queries.owner import COLUMNS, OWNED, TASKS, Owner
from queries.revisions import FORGOTTEN_OF_OWNER, OWNERS, REVISION_OF_OWNER
from refusals import ChangesForgotten
from schemas import ID_MAX, SyncPosition

START = SyncPosition(0, 0, maxsize)  # tombstones are of no use to a client that has nothing yet


class Changes(NamedTuple):
    """Changes in the shape of `schemas.TaskChanged` and `schemas.TaskDeleted`, and the position after each.

    *next* is the position after the last, or of the newest revision if there is no more.
    """

    changes: list[dict[str, Any]]
    positions: list[SyncPosition]
    next: SyncPosition
    has_more: bool


async def list_changes(owner: Owner, since: SyncPosition, limit: int) -> Changes:
    """Return up to *limit* tasks of *owner* that have changed since a position, each once.

    Raises:
        ChangesForgotten: a task was deleted since, and its tombstone dropped.
    """
    rows = await owner.all(
        _SELECT_CHANGES,
        after_revision=since.revision,
        after_id=since.task_id,
        known_from=since.first,
        limit=limit + 1,  # one more shows whether there are more
    )
    head = rows[0]
    newest, forgotten = head.owner_revision, head.forgotten_revision
    first = min(since.first, newest)
    if since != START and _is_forgotten(since, newest, forgotten):
        raise ChangesForgotten
    tasks = rows if head.id is not None else []
    has_more = len(tasks) > limit
    del tasks[limit:]
    positions = [SyncPosition(row.revision, row.id, first) for row in tasks]
    after = positions[-1] if has_more else SyncPosition(newest, ID_MAX, 0)
    if positions:
        positions[-1] = after  # if nothing follows, the token outlives the tombstone at which it stands
    return Changes(list(map(_change, tasks)), positions, after, has_more)


def _change(row: Any) -> dict[str, Any]:
    if row.deleted_at is not None:
        return {"type": "deleted", "id": row.id, "deleted_at": row.deleted_at}
    row.deleted_at = row.revision = row.owner_revision = row.forgotten_revision = ABSENT
    return {"type": "changed", "task": row}


def _is_forgotten(since: SyncPosition, newest: int, forgotten: int) -> bool:
    """Return whether a tombstone that the client still needs has been dropped.

    Revision 0, of rows from before migration 0010, has no tombstones.
    """
    known = max(since.revision, since.first)
    if known > newest:  # the database has been restored from a backup
        return True
    is_within_revision = since.revision >= since.first and since.task_id < ID_MAX
    return forgotten > known or (0 < forgotten == known and is_within_revision)


async def revisions_of(database: Database, user_ids: list[str]) -> dict[str, int]:
    """Return the last revision of each of these users, if there is one."""
    rows = await database.all(_SELECT_REVISIONS, owners=user_ids)
    return {row["user_id"]: row["revision"] for row in rows}


def _changes_statement() -> PerDatabase:
    head = [
        func.coalesce(REVISION_OF_OWNER, literal_column("0")).label("owner_revision"),
        func.coalesce(FORGOTTEN_OF_OWNER, literal_column("0")).label("forgotten_revision"),
    ]
    after = tuple_(
        bindparam("after_revision", type_=BigInteger()),
        bindparam("after_id", type_=BIG_ID),
    )
    known_from = bindparam("known_from", type_=BigInteger())
    page = (
        select(*COLUMNS, TASKS.c.revision, TASKS.c.deleted_at)
        .where(
            OWNED,
            tuple_(TASKS.c.revision, TASKS.c.id) > after,
            or_(TASKS.c.deleted_at.is_(None), TASKS.c.revision > known_from),
        )
        .order_by(TASKS.c.revision, TASKS.c.id)
        .limit(bindparam("limit", type_=Integer))
    )
    return headed("list_changes", page, head, lambda columns: (columns.revision, columns.id))


_SELECT_CHANGES = _changes_statement()
# For all users with a stream in this process. It reads revisions only, no tasks.
_SELECT_REVISIONS = named(
    "get_revisions",
    select(OWNERS.c.user_id, OWNERS.c.revision).where(
        AnyOf(OWNERS.c.user_id, bindparam("owners", type_=list_of(OWNERS.c.user_id.type)))
    ),
)
