"""Index the lists of pending tasks, of due dates and, where PostgreSQL can, of words."""

import contextlib

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError, ProgrammingError

from migrations.indexes import create_index

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

WORDS = "lower(title || ' ' || coalesce(description, ''))"


def upgrade() -> None:
    create_index(
        "ix_task_pending",
        "task",
        ["user_id", sa.text("created_at DESC"), sa.text("id DESC")],
        postgresql_where=sa.text("NOT completed"),
        sqlite_where=sa.text("completed = 0"),
    )
    create_index("ix_task_user_id_due_date_id", "task", ["user_id", "due_date", "id"])
    if op.get_bind().dialect.name == "postgresql" and _has_extensions():
        with contextlib.suppress(ProgrammingError):  # they may be in a schema that we do not look into
            create_index(
                "ix_task_search",
                "task",
                ["user_id", sa.text(f"({WORDS}) gin_trgm_ops")],
                postgresql_using="gin",
            )


def _has_extensions() -> bool:
    """Add the extensions that index words by trigrams, where they are installed and we may."""
    with contextlib.suppress(DBAPIError), op.get_bind().begin_nested():
        op.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
        op.execute("CREATE EXTENSION IF NOT EXISTS btree_gin")
        return True
    return False


def downgrade() -> None:
    for index in ("ix_task_search", "ix_task_user_id_due_date_id", "ix_task_pending"):
        op.execute(f"DROP INDEX IF EXISTS {index}")
