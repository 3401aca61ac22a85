"""Index idempotency keys by age, to remove the expired ones in portions, and note what each counts."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "idempotency_key", sa.Column("weight", sa.SmallInteger(), server_default=sa.text("1"), nullable=False)
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_idempotency_key_created_at", "idempotency_key")
    op.drop_column("idempotency_key", "weight")
