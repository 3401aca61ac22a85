"""Allow a due time without a due date."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NAME = "ck_task_due_time_has_due_date"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        _replace_due_time("due_time")
    else:
        op.execute(f"ALTER TABLE task DROP CONSTRAINT IF EXISTS {NAME}")


def downgrade() -> None:
    """Times without a day are lost: the older code could not change such a task."""
    if op.get_bind().dialect.name == "sqlite":
        rule = f"CONSTRAINT {NAME} CHECK (new_due_time IS NULL OR due_date IS NOT NULL)"
        _replace_due_time("CASE WHEN due_date IS NOT NULL THEN due_time END", rule)
    else:
        rule = f"CONSTRAINT {NAME} CHECK (due_time IS NULL OR due_date IS NOT NULL)"
        op.execute("UPDATE task SET due_time = NULL WHERE due_date IS NULL AND due_time IS NOT NULL")
        op.execute(f"ALTER TABLE task ADD {rule} NOT VALID")


def _replace_due_time(value: str, rule: str = "") -> None:
    """Make the column anew. SQLite's usual way, a new table, would reuse the ids of deleted tasks."""
    op.execute(f"ALTER TABLE task ADD COLUMN new_due_time VARCHAR(5) {rule}")
    op.execute(f"UPDATE task SET new_due_time = {value} WHERE due_time IS NOT NULL")  # noqa: S608 - ours
    op.drop_column("task", "due_time")
    op.execute("ALTER TABLE task RENAME COLUMN new_due_time TO due_time")
