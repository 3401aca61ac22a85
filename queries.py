"""Every statement. Each starts from the owner, is sent in one round trip and is built once."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Integer,
    Select,
    Table,
    bindparam,
    case,
    collate,
    delete,
    func,
    insert,
    literal,
    not_,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.sql.base import Executable

from db import Database, Row
from models import BIG_ID, TIMESTAMP, Task, TaskFields
from schemas import Listing

TASKS: Table = Task.__table__  # type: ignore[attr-defined] # SQLModel adds it
COLUMNS = tuple(TASKS.c)
WRITABLE = frozenset(TaskFields.model_fields)

_NOW = bindparam("now", type_=TIMESTAMP)
_OWNED = TASKS.c.user_id == bindparam("owner", type_=TASKS.c.user_id.type)
_THIS = TASKS.c.id == bindparam("task_id", type_=BIG_ID)


@dataclass(frozen=True, slots=True)
class Owner:
    """A verified user, and the database that keeps their tasks. Every statement starts from one."""

    user_id: str
    db: Database

    async def one(self, statement: Executable, **values: Any) -> Row | None:
        return await self.db.one(statement, owner=self.user_id, **values)

    async def all(self, statement: Executable, **values: Any) -> list[Row]:
        return await self.db.all(statement, owner=self.user_id, **values)


async def create_task(owner: Owner, fields: Mapping[str, Any]) -> Row:
    """Insert a task of *owner* and return it."""
    now = datetime.now(UTC)
    completed_at = now if fields["completed"] else None
    row = await owner.one(_INSERT, now=now, completed_at=completed_at, **_sent(fields))
    assert row is not None  # noqa: S101 - INSERT … RETURNING answers with the row or fails
    return row


async def get_task(owner: Owner, task_id: int) -> Row | None:
    return await owner.one(_SELECT_ONE, task_id=task_id)


async def update_task(owner: Owner, task_id: int, changes: Mapping[str, Any]) -> Row | None:
    """Set the fields in *changes* and return the task.

    What is set to the value it has is no change: version and times stay, so a retry is harmless.
    """
    if not changes:
        return await get_task(owner, task_id)
    statement = _update_statement(frozenset(changes))
    return await owner.one(statement, task_id=task_id, now=datetime.now(UTC), **_sent(changes))


async def toggle_task(owner: Owner, task_id: int) -> Row | None:
    return await owner.one(_TOGGLE, task_id=task_id, now=datetime.now(UTC))


async def delete_task(owner: Owner, task_id: int) -> bool:
    """Delete the task and return whether there was one."""
    return await owner.one(_DELETE, task_id=task_id) is not None


async def list_tasks(
    owner: Owner, listing: Listing, limit: int, after: tuple[Any, int] | None = None
) -> list[Row]:
    """Return up to *limit* tasks of *owner* that come after the position *after*."""
    key, task_id = after or (None, None)
    statement = _list_statement(listing, after is not None)
    return await owner.all(statement, limit=limit, after_key=key, after_id=task_id)


async def list_and_count_tasks(
    owner: Owner, listing: Listing, limit: int, after: tuple[Any, int] | None = None
) -> tuple[list[Row], int]:
    """Return the page as `list_tasks` does, and how many tasks all pages hold together."""
    key, task_id = after or (None, None)
    statement = _counted_list_statement(listing, after is not None)
    rows = await owner.all(statement, limit=limit, after_key=key, after_id=task_id)
    total = rows[0]["total"]
    # The count stands beside every task, and alone when the page is empty.
    tasks = [{name: row[name] for name in row if name != "total"} for row in rows if row["id"] is not None]
    return tasks, total


def position(row: Row, listing: Listing) -> tuple[Any, int]:
    """Return the place of *row* in the list, for the `after` of the next page."""
    return row[listing.sort_field], row["id"]


def _sent(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": value for name, value in fields.items()}


def _new(name: str) -> ColumnElement[Any]:
    return bindparam(f"new_{name}", type_=TASKS.c[name].type)


def _insert_statement() -> Executable:
    values = {name: _new(name) for name in WRITABLE}
    return (
        insert(TASKS)
        .values(
            user_id=_OWNED.right,
            completed_at=bindparam("completed_at", type_=TIMESTAMP),
            version=literal(1),
            created_at=_NOW,
            updated_at=_NOW,
            **values,
        )
        .returning(*COLUMNS)
    )


@lru_cache(maxsize=512)
def _update_statement(names: frozenset[str]) -> Executable:
    values: dict[str, Any] = {name: _new(name) for name in sorted(names)}
    changed = or_(*(TASKS.c[name].is_distinct_from(value) for name, value in values.items()))
    if "completed" in names:
        values["completed_at"] = case(
            (TASKS.c.completed == values["completed"], TASKS.c.completed_at),
            (values["completed"], _NOW),
        )
    return (
        update(TASKS)
        .where(_OWNED, _THIS)
        .values(
            version=TASKS.c.version + case((changed, 1), else_=0),
            updated_at=case((changed, _NOW), else_=TASKS.c.updated_at),
            **values,
        )
        .returning(*COLUMNS)
    )


def _toggle_statement() -> Executable:
    return (
        update(TASKS)
        .where(_OWNED, _THIS)
        .values(
            completed=not_(TASKS.c.completed),
            completed_at=case((TASKS.c.completed, None), else_=_NOW),
            version=TASKS.c.version + 1,
            updated_at=_NOW,
        )
        .returning(*COLUMNS)
    )


def _delete_statement() -> Executable:
    return delete(TASKS).where(_OWNED, _THIS).returning(TASKS.c.id)


@lru_cache(maxsize=512)
def _list_statement(listing: Listing, continued: bool) -> Select[Any]:
    key = _sort_key(listing.sort_field, TASKS.c[listing.sort_field])
    statement = _filtered(listing, *COLUMNS)
    if continued:
        after = tuple_(
            _sort_key(listing.sort_field, bindparam("after_key", type_=TASKS.c[listing.sort_field].type)),
            bindparam("after_id", type_=BIG_ID),
        )
        here = tuple_(key, TASKS.c.id)
        statement = statement.where(here < after if listing.descending else here > after)
    order = [key, TASKS.c.id]
    return statement.order_by(*(part.desc() if listing.descending else part for part in order)).limit(
        bindparam("limit", type_=Integer)
    )


@lru_cache(maxsize=512)
def _counted_list_statement(listing: Listing, continued: bool) -> Select[Any]:
    page = _list_statement(listing, continued).subquery("page")
    total = _filtered(listing, func.count().label("total")).subquery("counted")
    key = _sort_key(listing.sort_field, page.c[listing.sort_field])
    order = [key, page.c.id]
    return (
        select(total.c.total, *page.c)
        .select_from(total.outerjoin(page, true()))
        .order_by(*(part.desc() if listing.descending else part for part in order))
    )


def _filtered(listing: Listing, *columns: Any) -> Select[Any]:
    statement = select(*columns).select_from(TASKS).where(_OWNED)
    for unwanted in {False, True} - listing.states:
        statement = statement.where(TASKS.c.completed == literal(not unwanted, Boolean))
    return statement


def _sort_key(field: str, value: Any) -> ColumnElement[Any]:
    """Titles are sorted without regard to case and, the same everywhere, by code point."""
    return collate(func.lower(value), "C") if field == "title" else value


_INSERT = _insert_statement()
_SELECT_ONE = select(*COLUMNS).where(_OWNED, _THIS)
_TOGGLE = _toggle_statement()
_DELETE = _delete_statement()
