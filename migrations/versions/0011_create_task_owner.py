"""Create the table of the users' revisions and numbers of tasks; on SQLite triggers keep it."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# As `queries/revisions.py` does it on PostgreSQL. Every change of a task raises its version, except erasing.
TRIGGERS = {
    "task_inserted": """AFTER INSERT ON task BEGIN
        INSERT INTO task_owner (user_id, revision, task_count) VALUES (NEW.user_id, 1, NEW.deleted_at IS NULL)
            ON CONFLICT (user_id) DO UPDATE
            SET revision = revision + 1, task_count = task_count + (NEW.deleted_at IS NULL);
        UPDATE task SET revision = (SELECT revision FROM task_owner WHERE user_id = NEW.user_id)
            WHERE id = NEW.id;
    END""",
    "task_updated": """AFTER UPDATE OF version ON task WHEN NEW.version <> OLD.version BEGIN
        UPDATE task_owner
            SET revision = revision + 1,
                task_count = task_count + (NEW.deleted_at IS NULL) - (OLD.deleted_at IS NULL)
            WHERE user_id = NEW.user_id;
        UPDATE task SET revision = (SELECT revision FROM task_owner WHERE user_id = NEW.user_id)
            WHERE id = NEW.id;
    END""",
    "task_removed": """AFTER DELETE ON task BEGIN
        UPDATE task_owner
            SET forgotten_revision = max(forgotten_revision, OLD.revision),
                task_count = task_count - (OLD.deleted_at IS NULL)
            WHERE user_id = OLD.user_id;
    END""",
}


def upgrade() -> None:
    op.create_table(
        "task_owner",
        sa.Column("user_id", sa.String(255), nullable=False),
        sa.Column("revision", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("task_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("forgotten_revision", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.PrimaryKeyConstraint("user_id", name="pk_task_owner"),
        postgresql_with={"fillfactor": 50},
    )
    op.execute(
        "INSERT INTO task_owner (user_id, task_count) SELECT user_id, count(*) FROM task GROUP BY user_id"
    )
    if op.get_bind().dialect.name == "sqlite":
        for name, trigger in TRIGGERS.items():
            op.execute(f"CREATE TRIGGER {name} {trigger}")


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for name in TRIGGERS:
            op.execute(f"DROP TRIGGER IF EXISTS {name}")
    op.drop_table("task_owner")
