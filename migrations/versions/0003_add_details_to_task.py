"""Add what people plan with to tasks, and the table of answers that are kept."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIMED_DAY = "due_time IS NULL OR due_date IS NOT NULL"


def upgrade() -> None:
    sqlite = op.get_bind().dialect.name == "sqlite"
    texts = sa.ARRAY(sa.Text()).with_variant(sa.JSON(), "sqlite")
    for column in (
        sa.Column("priority", sa.SmallInteger(), nullable=True),
        sa.Column("category", sa.String(50), nullable=True),
        sa.Column("tags", texts, server_default=sa.text("'[]'" if sqlite else "'{}'"), nullable=False),
        sa.Column("due_date", sa.Date(), nullable=True),
        sa.Column("recurring", sa.String(7), nullable=True),
        sa.Column("reminder", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("series_day", sa.SmallInteger(), nullable=True),
        sa.Column("succeeded", sa.Boolean(), server_default=sa.false(), nullable=False),
    ):
        op.add_column("task", column)
    # SQLite adds a rule to a table only with a column; to make the table anew would forget the last id.
    op.execute(
        "ALTER TABLE task ADD COLUMN due_time VARCHAR(5) "
        f"CONSTRAINT ck_task_due_time_has_due_date CHECK ({TIMED_DAY})"
    )
    op.create_table(
        "idempotency_key",
        sa.Column("user_id", sa.String(255), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("user_id", "key", name="pk_idempotency_key"),
    )


def downgrade() -> None:
    op.drop_table("idempotency_key")
    for index in (
        "ix_task_search",
        "ix_task_user_id_due_date_id",
        "ix_task_pending",
    ):  # may be those of the release
        op.execute(f"DROP INDEX IF EXISTS {index}")
    for column in (
        "due_time",
        "succeeded",
        "series_day",
        "reminder",
        "recurring",
        "due_date",
        "tags",
        "category",
        "priority",
    ):
        op.drop_column("task", column)
