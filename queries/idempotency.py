"""Idempotency-Key: the first answer is stored for 24 hours, in the same transaction as its changes."""

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import structlog
from sqlalchemy import Integer, Table, bindparam, delete, func, insert, select, true
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from database.base import Database
from database.statements import named
from errors import Unavailable
from models import TIMESTAMP, IdempotencyKey
from queries.owner import Owner
from queries.rows import NOW
from refusals import KeyInUse, KeyRefused, KeyReused, TooManyKeys

KEPT = timedelta(hours=24)
KEYS_MAX = 10_000  # of one user at once: as many as tasks by default
WEIGHT_BYTES = 5_000  # an answer counts as one key and one more per full 5,000 bytes: at most 50 MB
SWEEP_S = 60.0  # between two searches for expired keys
PORTION = 500  # keys removed by one statement: 5 ms, in which SQLite's other writers wait
PAUSE_S = 0.1  # between two portions: 5,000 keys a second are more than requests can add

_KEYS: Table = IdempotencyKey.__table__  # type: ignore[attr-defined] # SQLModel adds it
_log = structlog.get_logger("idempotency")


async def once(
    owner: Owner, key: str, request: Any, work: Callable[[Owner], Awaitable[Any]]
) -> tuple[Any, bool]:
    """Return the result of *work*, or the one stored for *key*, and whether it is the stored one.

    *request* is what the client sent; two requests are the same if it is equal. *work* runs in a transaction,
    which is rolled back if it raises. Its result is stored as JSON.

    Raises:
        KeyInUse: the first request is still running.
        KeyReused: the first request was a different one.
        TooManyKeys: no more can be kept for this user.
    """
    # Not by msgspec: fingerprints that are already stored were computed from this encoding.
    fingerprint = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    try:
        return await _do_or_repeat(owner, key, fingerprint, work)
    except Exception as error:
        if not _may_be_answered(error):
            raise
    return await _do_or_repeat(owner, key, fingerprint, work)


def _may_be_answered(error: Exception) -> bool:
    """Whether an answer may be stored although the first attempt ended in *error*."""
    match error:
        case KeyRefused():
            return False
        case Unavailable():
            return error.lost  # the COMMIT may have succeeded
    # Another request with this key may have committed between our read and our lock. Then this one fails on
    # the stored key or on the other one's changes: it may have added the last task that the limit allows.
    return True


async def _do_or_repeat(
    owner: Owner, key: str, fingerprint: str, work: Callable[[Owner], Awaitable[Any]]
) -> tuple[Any, bool]:
    now = datetime.now(UTC)
    expiry = now - KEPT
    async with owner.transaction() as tx:
        found = await tx.one(_LOCK_AND_FIND, key=key, expiry=expiry)
        assert found is not None  # noqa: S101 - the lock always returns a row
        if not found["mine"]:
            raise KeyInUse
        if found["expired"]:
            await tx.one(_REMOVE, key=key, expiry=expiry)
        elif found["answer"] is not None:
            if found["fingerprint"] != fingerprint:
                raise KeyReused
            return msgspec.json.decode(found["answer"]), True
        if found["used"] >= KEYS_MAX:
            raise TooManyKeys
        content = await work(tx)
        answer = msgspec.json.encode(content)
        weight = 1 + len(answer) // WEIGHT_BYTES
        await tx.one(_KEEP, key=key, fingerprint=fingerprint, answer=answer.decode(), weight=weight, now=now)
    return content, False


async def sweep(database: Database) -> None:
    """Remove expired keys until cancelled, also those of inactive users."""
    await asyncio.sleep(random.uniform(0, SWEEP_S))  # noqa: S311 - so that processes take turns
    while True:
        try:
            more = await remove_expired(database)
        except Unavailable:  # the database has logged it
            more = False
        except Exception:
            _log.exception("expired keys are not removed")
            more = False
        await asyncio.sleep(PAUSE_S if more else SWEEP_S)


async def remove_expired(database: Database) -> bool:
    """Remove the oldest `PORTION` of the expired keys and return whether there may be more."""
    portion = await database.one(_FIND_PORTION, expiry=datetime.now(UTC) - KEPT)
    if portion is None or not portion["count"]:
        return False  # nothing is written, so that this works on a read replica too
    # Of two processes that remove the same portion, one waits and then finds nothing.
    await database.one(_REMOVE_PORTION, expiry=portion["last"])
    return bool(portion["count"] == PORTION)


class _TryLock(FunctionElement[bool]):
    """Locks the key until the transaction ends; false if it is taken. SQLite locks the whole database."""

    type = true().type
    inherit_cache = True


@compiles(_TryLock)
def _try_lock(element: _TryLock, compiler: SQLCompiler, **options: Any) -> str:
    owner, key = (compiler.process(part, **options) for part in element.clauses)
    # A key has no line break, so that no two pairs result in the same text.
    return f"pg_try_advisory_xact_lock(hashtextextended({owner} || chr(10) || {key}, 0))"


@compiles(_TryLock, "sqlite")
def _try_lock_sqlite(_element: _TryLock, _compiler: SQLCompiler, **_: Any) -> str:
    return "1"


_OWNED = _KEYS.c.user_id == bindparam("owner", type_=_KEYS.c.user_id.type)
_THIS = _KEYS.c.key == bindparam("key", type_=_KEYS.c.key.type)
_EXPIRED = _KEYS.c.created_at <= bindparam("expiry", type_=TIMESTAMP)


def _lock_and_find() -> Any:
    lock = select(_TryLock(_OWNED.right, _THIS.right).label("mine")).subquery("lock")
    kept = select(_KEYS, _EXPIRED.label("expired")).where(_OWNED, _THIS).subquery("kept")
    # Each weighs at least 1, so reading this many is enough to see that there are too many.
    counted = select(_KEYS.c.weight).where(_OWNED).limit(KEYS_MAX).subquery("counted")
    used = select(func.coalesce(func.sum(counted.c.weight), 0)).scalar_subquery()
    return select(
        lock.c.mine, kept.c.fingerprint, kept.c.answer, kept.c.expired, used.label("used")
    ).select_from(lock.outerjoin(kept, true()))


def _find_portion() -> Any:
    portion = (
        select(_KEYS.c.created_at).where(_EXPIRED).order_by(_KEYS.c.created_at).limit(PORTION).subquery()
    )
    last = func.max(portion.c.created_at, type_=TIMESTAMP)
    return select(last.label("last"), func.count().label("count")).select_from(portion)


_LOCK_AND_FIND = named("find_answer", _lock_and_find())
_REMOVE = named("remove_answer", delete(_KEYS).where(_OWNED, _THIS, _EXPIRED))
_KEEP = named(
    "keep_answer",
    insert(_KEYS).values(
        user_id=_OWNED.right,
        key=_THIS.right,
        fingerprint=bindparam("fingerprint", type_=_KEYS.c.fingerprint.type),
        answer=bindparam("answer", type_=_KEYS.c.answer.type),
        weight=bindparam("weight", type_=Integer()),
        created_at=NOW,
    ),
)
# The only ones without an owner: they reveal nothing about users and remove only what no request can read.
_FIND_PORTION = named("find_expired_answers", _find_portion())
_REMOVE_PORTION = named("remove_expired_answers", delete(_KEYS).where(_EXPIRED))
