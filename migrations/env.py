"""Run by Alembic: how migrations reach the database, and which tables are ours."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from math import inf
from typing import Any

import structlog
from alembic import context
from sqlalchemy import Connection, Engine, event, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.util import await_only
from sqlmodel import SQLModel

import db
import models  # noqa: F401 - registers the tables
from config import load_settings, refuse

# Any number that no other advisory lock in the database uses.
MIGRATION_LOCK = 7_240_115_033
POLL_S = 0.25
# While a migration waits for a table, all requests for that table wait behind it.
TABLE_LOCK_TIMEOUT = "1s"
ATTEMPTS = 60
PAUSE_S = 2.0  # between two attempts, so that waiting requests are served
LOCK_NOT_AVAILABLE = "55P03"

# Only PostgreSQL with pg_trgm has it, so the models do not.
OPTIONAL_INDEX = "ix_task_words"

_log = structlog.get_logger("migrations")


def is_ours(name: str | None, kind: str, _: Any) -> bool:
    """Keep Better Auth's tables, which may stand beside ours, out of every comparison."""
    if kind == "table":
        return name in SQLModel.metadata.tables
    return name != OPTIONAL_INDEX


def run(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        upgrade(connection)  # on SQLite one transaction holds all revisions and locks the database
        return
    with only_migration(connection.engine):
        if is_direct(connection):
            # A role's limits are meant for requests. Building an index takes longer and blocks none.
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("SET lock_timeout = 0"))
        connection.commit()
        event.listen(connection, "begin", limit_waiting)
        upgrade(connection)


def upgrade(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        version_table="task_schema_version",
        include_name=is_ours,
        transactional_ddl=True,
        transaction_per_migration=connection.dialect.name == "postgresql",
    )
    try:
        with context.begin_transaction():
            context.run_migrations()
    except PendingRollbackError as error:
        # Alembic's autocommit block touches a connection that has ended, which hides the error that ended it.
        raise ConnectionError("the connection ended during a migration") from error


@contextlib.contextmanager
def only_migration(engine: Engine) -> Iterator[None]:
    """Hold the lock that lets one process migrate at a time.

    A transaction on a connection of its own holds it. That transaction ends when the process is killed, keeps
    one server connection of a pooler in transaction mode, and lasts while the other connection commits.
    Waiting processes poll: an index build (CONCURRENTLY) waits for every older statement, so a statement
    that waits for this lock would be a deadlock.

    Raises:
        TimeoutError: the lock was not free within the attribute `wait_s`; without that it waits for ever.
    """
    deadline = time.monotonic() + context.config.attributes.get("wait_s", inf)
    with engine.connect() as holder:
        while not holder.scalar(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK}):
            holder.rollback()
            if time.monotonic() > deadline:
                raise TimeoutError("another process is migrating")
            await_only(asyncio.sleep(POLL_S))
        holder.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        yield


def is_direct(connection: Connection) -> bool:
    """Whether there is no pooler in between; behind one, a SET affects other clients."""
    server_pid = connection.connection.driver_connection.get_server_pid()  # type: ignore[union-attr] # asyncpg's
    return bool(connection.scalar(text("SELECT pg_backend_pid()")) == server_pid)


def limit_waiting(connection: Connection) -> None:
    connection.exec_driver_sql(f"SELECT set_config('lock_timeout', '{TABLE_LOCK_TIMEOUT}', true)")


async def migrate(database: db.Database) -> None:
    engine = database.engine()
    try:
        for attempt in range(ATTEMPTS):
            try:
                async with engine.connect() as connection:
                    return await connection.run_sync(run)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", "") != LOCK_NOT_AVAILABLE or attempt + 1 == ATTEMPTS:
                    raise
                _log.warning("a table is locked by another session", attempt=attempt + 1)
            await asyncio.sleep(PAUSE_S)
    finally:
        await engine.dispose()


def configured_database() -> db.Database:
    settings = load_settings()
    try:
        return db.connect(settings.resolved_database_url, pool_size=1)
    except ValueError as error:
        refuse([f"DATABASE_URL: {error}"])


if connection := context.config.attributes.get("connection"):
    run(connection)
else:
    asyncio.run(migrate(context.config.attributes.get("database") or configured_database()))
