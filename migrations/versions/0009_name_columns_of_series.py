"""Name what is remembered of a series by the field's terms. Rows stay as they are."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NAMES = {"series_day": "anchor_day", "succeeded": "has_successor"}


def upgrade() -> None:
    for old, new in NAMES.items():
        op.execute(f"ALTER TABLE task RENAME COLUMN {old} TO {new}")


def downgrade() -> None:
    for old, new in NAMES.items():
        op.execute(f"ALTER TABLE task RENAME COLUMN {new} TO {old}")
