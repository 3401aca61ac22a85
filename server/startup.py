"""Prepares the database at startup: connects and migrates, and retries while it is unreachable."""

import asyncio
import contextlib
import gc
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from database import failures
from database.base import Database
from server.readiness import Readiness

RETRY_MAX_S = 30.0  # between two attempts to migrate or connect
SIGNAL_S = 0.1  # until a signal ends the wait for the database at the latest
MIGRATION_WAIT_S = 1.0  # for another process that migrates, before this one says so in the log
END_S = 0.5  # for closing connections when the service stops
# Allocations before the garbage collector looks for cycles. Requests make none, and a list of 200 allocates
# 700 containers, so with Python's default, 700, each would start a collection.
GC_THRESHOLD = 10_000

PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"  # Alembic is configured there

_log = structlog.get_logger("main")


@asynccontextmanager
async def prepared(
    database: Database, readiness: Readiness, *background: Coroutine[Any, Any, None], migrates: bool
) -> AsyncIterator[None]:
    """Prepare *database* and run *background* until the block ends.

    The block begins after the first attempt, or after `Database.start_wait_s`; later attempts run alongside.
    A signal ends the wait.
    """
    first_attempt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    tasks = {
        asyncio.create_task(_prepare(database, readiness, first_attempt, migrates=migrates)),
        *map(asyncio.create_task, background),
    }
    try:
        waited_until = time.monotonic() + database.start_wait_s
        while readiness.is_awaited and not first_attempt.done() and time.monotonic() < waited_until:
            await asyncio.wait({first_attempt}, timeout=SIGNAL_S)
        if not first_attempt.cancel():  # it is over
            first_attempt.result()  # raises a permanent failure
        gc.freeze()  # objects made at startup stay, so the collector need not scan them again
        gc.set_threshold(GC_THRESHOLD)
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait({*tasks, asyncio.create_task(database.close())}, timeout=END_S)


def migrate(database: Database) -> None:
    """Bring the schema of *database* to head; of several processes one does it and the others wait."""
    _upgrade(database=database)


async def _prepare(
    database: Database, readiness: Readiness, first_attempt: "asyncio.Future[None]", *, migrates: bool
) -> None:
    """Connect and migrate, and try again while the database is unreachable.

    *first_attempt* resolves after the first attempt, with the exception if the failure is permanent. By then
    the caller may have stopped waiting.
    """
    migrated, opened = not migrates, False
    try:
        for attempt in itertools.count():
            opened = opened or await _succeeds(database.open(), "database cannot be opened yet")
            migrated = migrated or (opened and await _is_now_migrated(database, readiness))
            if attempt == 0:
                await _log_not_ready(readiness)
            if not first_attempt.done():
                first_attempt.set_result(None)
            if migrated and opened:
                return
            await asyncio.sleep(min(2**attempt, RETRY_MAX_S))
    except Exception as error:
        if first_attempt.done():
            _log.exception("migration failed" if opened else "database cannot be opened")
        else:
            first_attempt.set_exception(error)


async def _is_now_migrated(database: Database, readiness: Readiness) -> bool:
    with contextlib.suppress(Exception):  # migrating will meet it too
        if await readiness.is_migrated():
            return True
    return await _succeeds(_migrate(database), "database cannot be migrated yet")


async def _succeeds(attempt: Awaitable[None], event: str) -> bool:
    try:
        await attempt
    except Exception as error:
        if not failures.is_transient(error):
            raise
        _log.warning(event, reason=type(error).__name__, error=str(error))
        return False
    return True


async def _log_not_ready(readiness: Readiness) -> None:
    try:
        if reason := await readiness.not_ready_reason():
            _log.error("not ready", reason=reason)
    except Exception:  # the readiness probe will report it too, so start anyway
        _log.exception("not ready")


async def _migrate(database: Database) -> None:
    """Bring the schema to head on this loop, where it can be cancelled: its revision is then undone."""
    engine = database.engine()
    try:
        async with engine.connect() as connection:
            await connection.run_sync(
                lambda synchronous: _upgrade(connection=synchronous, wait_s=MIGRATION_WAIT_S)
            )
    finally:
        await engine.dispose()


def _upgrade(**attributes: Any) -> None:
    from alembic import command, config  # 0.2 s of CPU and 7 MB, which only a start that migrates pays for

    alembic = config.Config(toml_file=PROJECT_FILE)
    alembic.attributes.update(attributes)
    command.upgrade(alembic, "head")
