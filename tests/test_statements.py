"""What Citus refuses in a statement, by its SQL on any PostgreSQL; `tests/test_citus.py` runs them all."""

import re

import pytest
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg

from database.statements import compile_statement
from tests.statements import sent

DIALECT = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # not in its stubs


def refused(sql: str) -> list[str]:
    """Return the parts of *sql* that Citus refuses: casts to days and times, and SELECT after RETURNING.

    The casts depend on the session's settings, so they are not immutable.
    """
    casts = re.findall(r" AS (?:DATE|TIMESTAMP)[^,()]*\)", sql)
    return casts + [part for part in map(_until_closed, sql.split("RETURNING ")[1:]) if "SELECT" in part]


def _until_closed(sql: str) -> str:
    depth = 0
    for index, sign in enumerate(sql):
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return sql[:index]
    return sql


def test_no_statement_has_what_citus_refuses() -> None:
    statements = [compile_statement(statement, DIALECT).sql for statement in sent()]

    assert sum("RETURNING" in sql for sql in statements) > 20
    assert [sql for sql in statements if refused(sql)] == []


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE task SET due_date = CASE WHEN $1 THEN CAST($2 AS DATE) ELSE due_date END",
        "UPDATE task SET updated_at = CAST(value ->> 'updated_at' AS TIMESTAMP) AT TIME ZONE 'UTC'",
        "INSERT INTO task (title) VALUES ($1) RETURNING id, (SELECT count(*) FROM task)",
        "WITH a AS (UPDATE task SET title = '' RETURNING coalesce(id, (SELECT 1))) SELECT * FROM a",
    ],
)
def test_what_citus_refuses_is_noticed(sql: str) -> None:
    assert refused(sql)
