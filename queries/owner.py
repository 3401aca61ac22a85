"""The owner of tasks. Every statement filters by `OWNED` or `LIVE` first and is run by an `Owner`."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from sys import maxsize
from typing import Any

from sqlalchemy import Table, and_, bindparam

from database.base import Database, Executor
from database.statements import Row, Statement, changes_tasks
from models import Task
from schemas import TaskOut

TASKS: Table = Task.__table__  # type: ignore[attr-defined] # SQLModel adds it
COLUMNS = tuple(TASKS.c[name] for name in TaskOut.model_fields)
OWNER = bindparam("owner", type_=TASKS.c.user_id.type)
OWNED = TASKS.c.user_id == OWNER  # deleted tasks too
LIVE = and_(OWNED, TASKS.c.deleted_at.is_(None))


@dataclass(frozen=True, slots=True)
class Owner:
    """A verified user, the database of their tasks, how many they may have, and whether there is a trash."""

    user_id: str
    db: Executor
    tasks_max: int = maxsize
    has_trash: bool = True
    on_change: Callable[[str], None] | None = None  # called with the user's id after a change
    on_delete: Callable[[str], None] | None = None  # called with the user's id, so that the purge looks there

    def note_deletion(self) -> None:
        """Have the next purge check this trash. Called before the statement, whose answer may be lost."""
        if self.on_delete:
            self.on_delete(self.user_id)

    async def one(self, statement: Statement, **values: Any) -> Row | None:
        rows = await self.all(statement, **values)
        return rows[0] if rows else None

    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        share, user_id = self.db.share, self.user_id
        if not share.take(user_id):  # without a coroutine where nothing has to wait
            await share.enter(user_id)
        try:
            rows = await self.db.all(statement, owner=user_id, **values)
        finally:
            share.leave(user_id)
        if self.on_change and changes_tasks(statement):
            self.on_change(user_id)
        return rows

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Owner"]:
        """Lend the same owner for statements in one transaction: the current one, or else a new one."""
        if not isinstance(self.db, Database):
            yield self
            return
        share, user_id = self.db.share, self.user_id
        await share.enter(user_id)
        try:
            async with self.db.transaction() as executor:
                yield replace(self, db=executor, on_change=None)
        finally:
            share.leave(user_id)
        if self.on_change:
            self.on_change(user_id)
