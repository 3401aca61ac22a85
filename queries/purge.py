"""The purge: deletes what is old or too much in the trash for good, and in the end the tombstones.

It works in portions, each in a transaction of its own, of one process at a time. Every statement that changes
rows is about one owner, whose row it locks first, like those of requests.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from sys import maxsize
from typing import Any

import structlog
from sqlalchemy import BigInteger, Integer, Select, bindparam, delete, false, func, select, true, update
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from database.base import Database
from database.statements import PerDatabase, Row, named
from errors import Unavailable
from models import TIMESTAMP
from observability import metrics
from queries.owner import OWNED, TASKS, Owner
from queries.revisions import OWNERS, changing
from queries.rows import ERASED, IN_TRASH, THESE

FIRST_S = 10.0  # after a start, which has other things to do
PURGE_S = 600.0  # between two purges
PAUSE_S = 0.1  # between two portions
PORTION = 500  # rows of one transaction: some 20 ms, in which their owners cannot change tasks
OWNERS_MAX = 50  # of one transaction: each takes a round trip
DELETERS_MAX = 10_000  # users remembered in one process

_log = structlog.get_logger("purge")


class Deleters:
    """Users with deletions since the last purge of their tasks; beyond `DELETERS_MAX` none is added."""

    def __init__(self) -> None:
        self._user_ids: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._user_ids)

    def add(self, user_id: str) -> None:
        if len(self._user_ids) < DELETERS_MAX:
            self._user_ids[user_id] = None

    def pop(self) -> str:
        return self._user_ids.popitem()[0]


class _Elsewhere(Exception):
    """Another process purges."""


@dataclass(frozen=True)
class Purge:
    """Purges trash older than *trash_days*, and tombstones older than that and *sync_days*.

    Of each user in *deleters* it keeps the newest *tasks_max* of either.
    """

    database: Database
    trash_days: int
    sync_days: int
    tasks_max: int = maxsize
    deleters: Deleters = field(default_factory=Deleters)

    async def run(self) -> None:
        """Purge from time to time until cancelled."""
        await asyncio.sleep(FIRST_S)
        while True:
            try:
                await self.once()
            except Unavailable:  # the database has logged it
                pass
            except Exception:
                _log.exception("trash is not purged")
            await asyncio.sleep(PURGE_S)

    async def once(self) -> None:
        """Purge what is due, unless another process does.

        Raises:
            Unavailable: the database cannot be used right now; the rest is due the next time.
        """
        now = datetime.now(UTC)
        of_trash = now - timedelta(days=self.trash_days)
        of_tombstones = now - timedelta(days=max(self.trash_days, self.sync_days))
        with contextlib.suppress(_Elsewhere):
            await self._purge(_ERASE, partial(self.database.all, _FIND_OLD_TRASH, expiry=of_trash))
            await self._purge(_DROP, partial(self.database.all, _FIND_OLD_TOMBSTONES, expiry=of_tombstones))
            if self.tasks_max < maxsize:
                await self._bound()

    async def _bound(self) -> None:
        for _ in range(len(self.deleters)):
            user_id = self.deleters.pop()
            owner = Owner(user_id, self.database)
            try:
                for statement, find in ((_ERASE, _FIND_EXCESS_TRASH), (_DROP, _FIND_EXCESS_TOMBSTONES)):
                    await self._purge(statement, partial(owner.all, find, tasks_max=self.tasks_max))
            except BaseException:
                self.deleters.add(user_id)
                raise

    async def _purge(self, statement: PerDatabase, find: Callable[..., Awaitable[list[Row]]]) -> None:
        while True:
            portion = await find(limit=PORTION)
            if not portion:
                return  # nothing is written, so that this works on a read replica too
            of_owners = sorted(_by_owner(portion).items())
            count = await self._purge_portion(statement, of_owners[:OWNERS_MAX])
            has_more = len(portion) == PORTION or len(of_owners) > OWNERS_MAX
            if not count or not has_more:
                return
            await asyncio.sleep(PAUSE_S)

    async def _purge_portion(self, statement: PerDatabase, of_owners: list[tuple[str, list[Row]]]) -> int:
        count = 0
        async with self.database.transaction() as tx:
            lock = await tx.one(_TRY_LOCK)
            if not lock or not lock["mine"]:
                raise _Elsewhere
            for user_id, rows in of_owners:
                # A task that was restored since and deleted again is not as old any more.
                until = max(row["deleted_at"] for row in rows)
                ids = [row["id"] for row in rows]
                count += len(await Owner(user_id, tx).all(statement, ids=ids, until=until))
        metrics.tasks_purged("erased" if statement is _ERASE else "dropped", count)
        return count


def _by_owner(portion: Iterable[Row]) -> dict[str, list[Row]]:
    rows = defaultdict(list)
    for row in portion:
        rows[row["user_id"]].append(row)
    return rows


class _TryLock(FunctionElement[bool]):
    """Whether only this process may purge until the transaction ends. SQLite has one writer anyway."""

    type = true().type
    inherit_cache = True


@compiles(_TryLock)
def _try_lock(_element: _TryLock, _compiler: SQLCompiler, **_: Any) -> str:
    return "pg_try_advisory_xact_lock(hashtextextended('purge', 0))"


@compiles(_TryLock, "sqlite")
def _try_lock_sqlite(_element: _TryLock, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


_FOUND = TASKS.c.user_id, TASKS.c.id, TASKS.c.deleted_at
_TOMBSTONE = TASKS.c.deleted_at.is_not(None), TASKS.c.erased == true()
_EXPIRED = TASKS.c.deleted_at <= bindparam("expiry", type_=TIMESTAMP)
_OLD_ENOUGH = TASKS.c.deleted_at <= bindparam("until", type_=TIMESTAMP)
_LIMIT = bindparam("limit", type_=Integer())
_TASKS_MAX = bindparam("tasks_max", type_=BigInteger())


def _find_old(name: str, *conditions: Any) -> Select[Any]:
    statement = select(*_FOUND).where(*conditions, _EXPIRED)
    return named(name, statement.order_by(TASKS.c.deleted_at).limit(_LIMIT))


def _find_excess(name: str, *conditions: Any) -> Select[Any]:
    statement = select(*_FOUND).where(OWNED, *conditions)
    newest_first = TASKS.c.deleted_at.desc(), TASKS.c.id.desc()
    return named(name, statement.order_by(*newest_first).limit(_LIMIT).offset(_TASKS_MAX))


def _drop_statement() -> PerDatabase:
    """Return the deletion of tombstones, which keeps the newest revision among them in the owner's row.

    On PostgreSQL, as in `changing`, the owner's row is locked first. On SQLite a trigger keeps the revision.
    """
    own = OWNERS.c.user_id == OWNED.right
    locked = select(OWNERS.c.revision).where(own).with_for_update(key_share=True).cte("locked")
    tombstones = delete(TASKS).where(OWNED, *_TOMBSTONE, THESE, _OLD_ENOUGH)
    dropped = (
        tombstones.where(locked.c.revision.is_not(None))  # joins it, so that it is locked first
        .returning(TASKS.c.id, TASKS.c.revision)
        .cte("dropped")
    )
    latest = select(func.max(dropped.c.revision).label("revision")).subquery("latest")
    forgotten = (
        update(OWNERS)
        .where(own, latest.c.revision > OWNERS.c.forgotten_revision)
        .values(forgotten_revision=latest.c.revision)
        .cte("forgotten")
    )
    return PerDatabase(
        named("drop_tombstones", select(dropped.c.id).add_cte(forgotten)),
        named("drop_tombstones", tombstones.returning(TASKS.c.id)),
    )


_TRY_LOCK = named("lock_purge", select(_TryLock().label("mine")))
# The first two search all users. The statements that write filter by the owner and the ids that they return.
_FIND_OLD_TRASH = _find_old("find_old_trash", IN_TRASH)
_FIND_OLD_TOMBSTONES = _find_old("find_old_tombstones", *_TOMBSTONE)
_FIND_EXCESS_TRASH = _find_excess("find_excess_trash", IN_TRASH)
_FIND_EXCESS_TOMBSTONES = _find_excess("find_excess_tombstones", *_TOMBSTONE)
_ERASE = changing(
    "erase_trash",
    update(TASKS).where(OWNED, IN_TRASH, THESE, _OLD_ENOUGH).values(ERASED),
    TASKS.c.id,
    changes=false(),
)
_DROP = _drop_statement()
