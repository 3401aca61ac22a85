"""Index pending tasks, due dates, the age and weight of idempotency keys and, where PostgreSQL can, words.

Databases of a release have some of these: 0003 built them, with the words of `lower`.
"""

import contextlib

import sqlalchemy as sa
from alembic import op
from sqlalchemy.exc import DBAPIError, ProgrammingError

from migrations.indexes import create_index, drop_index

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

WORDS = "{fold}(title || ' ' || coalesce(description, ''))"


def upgrade() -> None:
    create_index(
        "ix_task_pending",
        "task",
        ["user_id", sa.text("created_at DESC"), sa.text("id DESC")],
        postgresql_where=sa.text("NOT completed"),
        sqlite_where=sa.text("completed = 0"),
    )
    create_index("ix_task_user_id_due_date_id", "task", ["user_id", "due_date", "id"])
    create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
    create_index("ix_idempotency_key_user_id_weight", "idempotency_key", ["user_id", "weight"])
    _index_words("ix_task_words", "task_fold_case")
    drop_index("ix_task_search", "task")


def downgrade() -> None:
    """Leave what 0003 of the release has."""
    _index_words("ix_task_search", "lower")
    drop_index("ix_task_words", "task")
    drop_index("ix_idempotency_key_user_id_weight", "idempotency_key")
    drop_index("ix_idempotency_key_created_at", "idempotency_key")


def _index_words(name: str, fold: str) -> None:
    if op.get_bind().dialect.name == "postgresql" and _has_extensions():
        columns: list[str | sa.TextClause] = ["user_id", sa.text(f"({WORDS.format(fold=fold)}) gin_trgm_ops")]
        with contextlib.suppress(ProgrammingError):  # they may be in a schema that we do not look into
            create_index(name, "task", columns, postgresql_using="gin")


def _has_extensions() -> bool:
    """Add the extensions that index words by trigrams, where they are installed and we may."""
    with contextlib.suppress(DBAPIError), op.get_bind().begin_nested():
        op.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
        op.execute("CREATE EXTENSION IF NOT EXISTS btree_gin")
        return True
    return False
