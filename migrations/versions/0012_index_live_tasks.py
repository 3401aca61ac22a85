"""Index live tasks, the trash and revisions. Deleted tasks must not slow lists down."""

import sqlalchemy as sa

from migrations.indexes import create_index, drop_index

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

NEWEST_FIRST: list[str | sa.TextClause] = ["user_id", sa.text("created_at DESC"), sa.text("id DESC")]
LIVE, DELETED = "deleted_at IS NULL", "deleted_at IS NOT NULL"
REPLACED = ("ix_task_user_id_created_at_id", "ix_task_pending", "ix_task_user_id_due_date_id")


def upgrade() -> None:
    _create("ix_task_live", NEWEST_FIRST, LIVE)
    _create("ix_task_live_pending", NEWEST_FIRST, f"{LIVE} AND NOT completed")
    _create("ix_task_live_due_date", ["user_id", "due_date", "id"], LIVE)
    # Each has the tasks in the trash first, and then the tombstones.
    _create("ix_task_deleted", ["user_id", "erased", "deleted_at", "id"], DELETED)
    _create("ix_task_deleted_at", ["erased", "deleted_at"], DELETED)
    create_index("ix_task_revision", "task", ["user_id", "revision", "id"])
    for name in REPLACED:
        drop_index(name, "task")


def downgrade() -> None:
    create_index("ix_task_user_id_created_at_id", "task", NEWEST_FIRST)
    create_index(
        "ix_task_pending",
        "task",
        NEWEST_FIRST,
        postgresql_where=sa.text("NOT completed"),
        sqlite_where=sa.text("completed = 0"),
    )
    create_index("ix_task_user_id_due_date_id", "task", ["user_id", "due_date", "id"])
    for name in (
        "ix_task_revision",
        "ix_task_deleted_at",
        "ix_task_deleted",
        "ix_task_live_due_date",
        "ix_task_live_pending",
        "ix_task_live",
    ):
        drop_index(name, "task")


def _create(name: str, columns: list[str | sa.TextClause], where: str) -> None:
    sqlite = where.replace("NOT completed", "completed = 0")
    create_index(name, "task", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(sqlite))
