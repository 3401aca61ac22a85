"""Run by Alembic: how migrations reach the database, and which tables are ours."""

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, text
from sqlmodel import SQLModel

import db
import models  # noqa: F401 - registers the tables
from config import load_settings, refuse

# Any number will do, as long as nothing else in the database locks by it.
MIGRATION_LOCK = 7_240_115_033


# Only PostgreSQL with pg_trgm has it, so the models do not.
OPTIONAL_INDEX = "ix_task_search"


def is_ours(name: str | None, kind: str, _: Any) -> bool:
    """Keep Better Auth's tables, which may stand beside ours, out of every comparison."""
    if kind == "table":
        return name in SQLModel.metadata.tables
    return name != OPTIONAL_INDEX


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        version_table="task_schema_version",
        include_name=is_ours,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        # One process migrates, the others wait here and then find nothing to do. On SQLite the
        # transaction itself is the lock. It ends with the transaction, as a pooler needs it.
        if connection.dialect.name == "postgresql":
            if timeout := context.config.attributes.get("lock_timeout"):  # of who will try again
                connection.execute(
                    text("SELECT set_config('lock_timeout', :timeout, true)"), {"timeout": timeout}
                )
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        context.run_migrations()


async def migrate(database: db.Database) -> None:
    engine = database.engine()
    async with engine.connect() as connection:
        await connection.run_sync(run)
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
