import re
from typing import get_args

import pytest
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.sql.base import Executable

import bulk
import idempotency
import queries
from listing import OWNED, TASKS, Shape
from tests.statements import bulks, constants, every_statement, lists

NAMED = PGDialect_asyncpg(paramstyle="named")  # type: ignore[no-untyped-call] # not in its stubs
_TABLES = "(?:task|idempotency_key)"
_READ = re.compile(rf"\b(?:FROM|UPDATE|JOIN) {_TABLES}\b")
_OWNED = re.compile(rf"\b{_TABLES}\.user_id = :owner\b")
# They remove what has expired, whoever sent it.
_OF_NOBODY = [idempotency._FIND_PORTION, idempotency._REMOVE_PORTION]
_WRITTEN = re.compile(rf"\bINSERT INTO {_TABLES} \(([^)]*)\)\s+(?:VALUES \(|SELECT )(.*)", re.DOTALL)


def sql_of(statement: Executable) -> str:
    return str(statement.compile(dialect=NAMED))  # type: ignore[attr-defined] # not in its stubs


def is_bound_to_its_owner(sql: str) -> bool:
    """Return whether *sql* reads rows of one owner only, in each of its parts, and writes no other's."""
    written = _WRITTEN.search(sql)
    own = not written or _value_of_user_id(written).startswith(":owner")
    return own and len(_READ.findall(sql)) == len(_OWNED.findall(sql)) and ":owner" in sql


def _value_of_user_id(written: "re.Match[str]") -> str:
    place = written[1].split(", ").index("user_id")
    return written[2].split(", ")[place]


def test_every_statement_is_bound_to_its_owner() -> None:
    assert len(constants(queries)) >= 8
    assert len(constants(bulk)) >= 5
    assert len(constants(idempotency)) >= 3
    assert all(len(lists(shape)) == 48 and len(bulks(shape)) == 4 for shape in get_args(Shape))

    for statement in every_statement():
        if any(statement is each for each in _OF_NOBODY):
            continue
        assert is_bound_to_its_owner(sql_of(statement)), sql_of(statement)


@pytest.mark.parametrize(
    "statement",
    [
        select(TASKS.c.id).where(TASKS.c.id == 1),
        update(TASKS).values(title="mine"),
        select(TASKS.c.id).where(OWNED, TASKS.c.id.in_(select(TASKS.c.id))),
        select(TASKS.c.id).where(TASKS.c.user_id != "alice"),
        TASKS.insert().values(user_id="bob", title="not alice's"),
    ],
)
def test_one_that_is_not_would_be_seen(statement: Executable) -> None:
    assert not is_bound_to_its_owner(sql_of(statement))
