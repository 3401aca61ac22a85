"""Give each change of a task a revision of its owner, and let deleted tasks stay as rows."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for column in (
        sa.Column("revision", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("erased", sa.Boolean(), server_default=sa.false(), nullable=False),
    ):
        op.add_column("task", column)


def downgrade() -> None:
    op.execute("DELETE FROM task WHERE deleted_at IS NOT NULL")
    for column in ("erased", "deleted_at", "revision"):
        op.drop_column("task", column)
