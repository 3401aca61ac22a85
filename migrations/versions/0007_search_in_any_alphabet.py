"""Fold case beyond ASCII in every database."""

from alembic import op
from sqlalchemy import text

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# For databases whose own LC_CTYPE is C. The first is PostgreSQL's since 17, the next two are the C library's.
COLLATIONS = ("pg_c_utf8", "C.utf8", "C.UTF-8", "und-x-icu")


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    op.execute(
        "CREATE OR REPLACE FUNCTION task_fold_case(text) RETURNS text "
        f"LANGUAGE sql IMMUTABLE PARALLEL SAFE AS 'SELECT lower($1 {_collate()})'"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    op.execute("DROP FUNCTION IF EXISTS task_fold_case(text)")


def _collate() -> str:
    """Return the clause for a collation that folds beyond ASCII, empty if the database's own does."""
    known = op.get_bind().scalars(
        text("SELECT collname FROM pg_collation WHERE collname = ANY (:names)"), {"names": list(COLLATIONS)}
    )
    found = set(known)
    for clause in ("", *(f'COLLATE "{name}"' for name in COLLATIONS if name in found)):
        if op.get_bind().scalar(text(f"SELECT lower('É' {clause}) = 'é'")):
            return clause
    return ""
