"""Requests that may be sent again: the answer is kept for a day, in the transaction of what it tells of."""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import Table, and_, bindparam, delete, exists, insert, select, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

import queries
from db import ConstraintViolated, Row, named
from errors import Unavailable
from models import TIMESTAMP, IdempotencyKey
from queries import NOW, Owner
from task_limit import TooManyTasks

KEPT = timedelta(hours=24)
ATTEMPTS = 2  # another request may answer just before the lock is ours

_KEYS: Table = IdempotencyKey.__table__  # type: ignore[attr-defined] # SQLModel adds it


class KeyInUse(Exception):
    """The first request with this key has not been answered yet."""


class KeyReused(Exception):
    """The key belongs to a request with another body."""


async def create_task_once(
    owner: Owner, fields: Mapping[str, Any], key: str, sent: Mapping[str, Any]
) -> tuple[Row, bool]:
    """Create a task as `queries.create_task` does, or return what was answered to *key* before.

    *sent* is what makes the request the same: the fields that the client gave. The second value tells
    whether the answer is a repetition.

    Raises:
        KeyInUse: the first request is still running.
        KeyReused: the first request had another body.
        TooManyTasks, ConstraintViolated: as `queries.create_task`.
    """
    fingerprint = hashlib.sha256(orjson.dumps(sent, option=orjson.OPT_SORT_KEYS)).hexdigest()
    for attempt in range(ATTEMPTS):
        try:
            return await _create_or_repeat(owner, fields, key, fingerprint)
        except ConstraintViolated as error:
            if error.name not in _TAKEN or attempt + 1 == ATTEMPTS:
                raise
        except TooManyTasks:
            if attempt + 1 == ATTEMPTS:
                raise  # otherwise the last one may be of the first request with this key
        except Unavailable as error:
            if not error.lost or attempt + 1 == ATTEMPTS:
                raise  # otherwise the key tells whether it was done
    raise KeyInUse


async def _create_or_repeat(
    owner: Owner, fields: Mapping[str, Any], key: str, fingerprint: str
) -> tuple[Row, bool]:
    now = datetime.now(UTC)
    async with owner.transaction() as within:
        found = await within.one(_LOCK_AND_FIND, key=key, expiry=now - KEPT)
        assert found is not None  # noqa: S101 - the lock's row is always there
        if not found["mine"]:
            raise KeyInUse
        if found["answer"] is not None:
            if found["fingerprint"] != fingerprint:
                raise KeyReused
            return orjson.loads(found["answer"]), True
        if found["any_expired"]:
            await within.one(_REMOVE_EXPIRED, expiry=now - KEPT)
        row = await queries.create_task(within, fields)
        answer = orjson.dumps(row, option=orjson.OPT_UTC_Z).decode()
        await within.one(_KEEP, key=key, fingerprint=fingerprint, answer=answer, now=now)
    return row, False


class _TryLock(FunctionElement[bool]):
    """Whether the key is ours until the transaction ends; a writer of SQLite has the whole database."""

    type = true().type
    inherit_cache = True


@compiles(_TryLock)
def _try_lock(element: _TryLock, compiler: SQLCompiler, **options: Any) -> str:
    owner, key = (compiler.process(part, **options) for part in element.clauses)
    return f"pg_try_advisory_xact_lock(hashtextextended({owner} || '/' || {key}, 0))"


@compiles(_TryLock, "sqlite")
def _try_lock_sqlite(_element: _TryLock, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


# What PostgreSQL and SQLite say when another process has kept an answer to the same key just now.
_TAKEN = ("pk_idempotency_key", "idempotency_key.user_id, idempotency_key.key")

_OWNED = _KEYS.c.user_id == bindparam("owner", type_=_KEYS.c.user_id.type)
_THIS = _KEYS.c.key == bindparam("key", type_=_KEYS.c.key.type)
_EXPIRED = _KEYS.c.created_at <= bindparam("expiry", type_=TIMESTAMP)


def _lock_and_find() -> Any:
    lock = select(_TryLock(_OWNED.right, _THIS.right).label("mine")).subquery("lock")
    kept = select(_KEYS).where(_OWNED, _THIS, ~_EXPIRED).subquery("kept")
    return select(
        lock.c.mine,
        kept.c.fingerprint,
        kept.c.answer,
        exists().where(and_(_OWNED, _EXPIRED)).label("any_expired"),
    ).select_from(lock.outerjoin(kept, true()))


_LOCK_AND_FIND = named("find_answer", _lock_and_find())
_REMOVE_EXPIRED = named("remove_expired_answers", delete(_KEYS).where(_OWNED, _EXPIRED))
_KEEP = named(
    "keep_answer",
    insert(_KEYS).values(
        user_id=_OWNED.right,
        key=_THIS.right,
        fingerprint=bindparam("fingerprint", type_=_KEYS.c.fingerprint.type),
        answer=bindparam("answer", type_=_KEYS.c.answer.type),
        created_at=NOW,
    ),
)
