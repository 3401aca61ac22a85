"""Every statement about local accounts, each sent in one round trip."""

import secrets
import string
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, bindparam, false, or_, select, update
from sqlalchemy.dialects.postgresql import insert  # SQLite has the same clause, and compiles this one
from sqlalchemy.sql.base import Executable

from database.base import Database
from database.statements import Row, named
from models import ACCOUNT_ID_LENGTH, LocalAccount

ACCOUNTS: Table = LocalAccount.__table__  # type: ignore[attr-defined] # SQLModel adds it
COLUMNS = tuple(ACCOUNTS.c)
_LETTERS_AND_DIGITS = string.ascii_letters + string.digits


async def create_account(
    db: Database, *, name: str, email: str, image: str | None, password_hash: str
) -> Row | None:
    """Insert an account and return it, or None if there is one with this e-mail."""
    return await db.one(
        _INSERT,
        new_id="".join(secrets.choice(_LETTERS_AND_DIGITS) for _ in range(ACCOUNT_ID_LENGTH)),
        new_name=name,
        new_email=email.lower(),
        new_image=image,
        new_password_hash=password_hash,
        new_created_at=(now := datetime.now(UTC)),
        new_updated_at=now,
    )


async def account_of_email(db: Database, email: str) -> Row | None:
    return await db.one(_SELECT_BY_EMAIL, new_email=email.lower())


async def account_of_id(db: Database, account_id: str) -> Row | None:
    return await db.one(_SELECT_BY_ID, new_id=account_id)


async def end_sessions(db: Database, account_id: str, until: datetime) -> None:
    """End the sessions of the account that began at *until* or before; ended ones stay ended."""
    await db.one(_END_SESSIONS, new_id=account_id, new_sessions_ended_at=until)


def _new(name: str) -> ColumnElement[Any]:
    return bindparam(f"new_{name}", type_=ACCOUNTS.c[name].type)


def _insert_statement() -> Executable:
    given = ("id", "name", "email", "image", "password_hash", "created_at", "updated_at")
    return (
        insert(ACCOUNTS)
        .values(email_verified=false(), **{name: _new(name) for name in given})
        .on_conflict_do_nothing(index_elements=["email"])  # of two concurrent sign-ups, one succeeds
        .returning(*COLUMNS)
    )


_INSERT = named("create_account", _insert_statement())
_ended_at = ACCOUNTS.c.sessions_ended_at
_END_SESSIONS = named(
    "end_sessions",
    update(ACCOUNTS)
    .where(ACCOUNTS.c.id == _new("id"), or_(_ended_at.is_(None), _ended_at < _new("sessions_ended_at")))
    .values(sessions_ended_at=_new("sessions_ended_at"))
    .returning(ACCOUNTS.c.id),
)
_SELECT_BY_EMAIL = named("account_of_email", select(*COLUMNS).where(ACCOUNTS.c.email == _new("email")))
_SELECT_BY_ID = named("account_of_id", select(*COLUMNS).where(ACCOUNTS.c.id == _new("id")))
