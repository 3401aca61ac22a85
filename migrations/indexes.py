"""Indexes of tables that are in use."""

from typing import Any

import sqlalchemy as sa
from alembic import op

_IS_VALID = sa.text(
    "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:name) AND indrelid = to_regclass(:table)"
)


def create_index(name: str, table: str, columns: list[str | sa.TextClause], **options: Any) -> None:
    """Build an index while requests read and write *table*: on PostgreSQL CONCURRENTLY.

    That needs autocommit, so a failing revision does not undo the index: a revision that calls this does
    nothing else, and can be repeated. It keeps an existing index, unless a build was interrupted (INVALID).
    """
    connection = op.get_bind()
    if connection.dialect.name != "postgresql":
        op.create_index(name, table, columns, if_not_exists=True, **options)
        return
    # The server finishes a build whose client was killed, and holds this lock meanwhile. No request needs it.
    op.execute("SET LOCAL lock_timeout = 0")
    op.execute(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE")
    is_valid = connection.scalar(_IS_VALID, {"name": name, "table": table})
    if is_valid:
        return
    with op.get_context().autocommit_block():
        if is_valid is False:
            op.drop_index(name, table, postgresql_concurrently=True)
        op.create_index(name, table, columns, postgresql_concurrently=True, **options)


def drop_index(name: str, table: str) -> None:
    """Drop an index, if it exists, without blocking requests that use *table*."""
    if op.get_bind().dialect.name != "postgresql":
        op.drop_index(name, table, if_exists=True)
        return
    with op.get_context().autocommit_block():
        op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
