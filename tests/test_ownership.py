from typing import Any, get_args

import pytest
from sqlalchemy import (
    BindParameter,
    Delete,
    Insert,
    Join,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    exists,
    or_,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql.asyncpg import PGCompiler_asyncpg, PGDialect_asyncpg
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.elements import BinaryExpression, BooleanClauseList, Label
from sqlalchemy.sql.selectable import Alias

from database.statements import PerDatabase, compile_statement
from queries import bulk, changes, idempotency, purge, revisions, stats, tasks, trash
from queries.filters import Shape
from queries.owner import OWNED, TASKS
from tests.statements import bulks, constants, every_statement, list_statements, variants

POSTGRES = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # not in its stubs
KEYS = idempotency._KEYS
OWNED_TABLES = (TASKS, KEYS, revisions.OWNERS)
ALIAS = TASKS.alias("other")
OTHER_BIND = bindparam("owner_too", type_=TASKS.c.user_id.type)
# They find or remove expired rows of any user, or read the revisions of users with open streams.
_WITHOUT_OWNER = [
    idempotency._FIND_PORTION,
    idempotency._REMOVE_PORTION,
    purge._FIND_OLD_TRASH,
    purge._FIND_OLD_TOMBSTONES,
    changes._SELECT_REVISIONS,
]


class _Noting(PGCompiler_asyncpg):
    """Compiles to SQL and records each statement nested in it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.parts: list[Any] = []
        super().__init__(*arguments, **options)

    def visit_textclause(self, *_arguments: Any, **_options: Any) -> Any:
        raise AssertionError("text is not looked into")


def _noting(name: str) -> Any:
    def visit(compiler: _Noting, statement: Any, *arguments: Any, **options: Any) -> Any:
        compiler.parts.append(statement)
        return getattr(PGCompiler_asyncpg, name)(compiler, statement, *arguments, **options)

    return visit


for _name in ("visit_select", "visit_insert", "visit_update", "visit_delete"):
    setattr(_Noting, _name, _noting(_name))


def parts(statement: Any) -> list[Any]:
    """Return the statement and all nested ones: sub-selects, parts of a UNION, CTEs."""
    compiled: list[Any] = _Noting(PGDialect_asyncpg(), statement).parts  # type: ignore[no-untyped-call] # not in its stubs
    return compiled


def owned_tables(element: Any) -> list[Any]:
    """Return the tables with owned rows that *element* is or joins."""
    if isinstance(element, Join):
        return owned_tables(element.left) + owned_tables(element.right)
    table = element.element if isinstance(element, Alias) else element
    return [element] if isinstance(table, Table) and table in OWNED_TABLES else []


def conjuncts(condition: Any) -> list[Any]:
    if isinstance(condition, BooleanClauseList) and condition.operator is operators.and_:
        return [each for clause in condition.clauses for each in conjuncts(clause)]
    return [condition]


def is_owner(value: Any) -> bool:
    value = value.element if isinstance(value, Label) else value
    return isinstance(value, BindParameter) and value.key == "owner"


def is_limited_to_owner(condition: Any, table: Any) -> bool:
    """Whether *condition*, split at AND, restricts *table* to the owner's rows."""
    return any(
        isinstance(each, BinaryExpression)
        and each.operator is operators.eq
        and each.left is table.c.user_id
        and is_owner(each.right)
        for each in conjuncts(condition)
    )


def breaches(statement: Any) -> list[str]:
    """Return the parts of *statement* that may read or change another user's rows."""
    found = []
    for part in parts(statement):
        if isinstance(part, Insert):
            if part.table in OWNED_TABLES and not is_owner(_inserted_user(part)):
                found.append(f"inserts for another user: {part}")
            continue
        froms = part.get_final_froms() if isinstance(part, Select) else [part.table]
        tables = [table for each in froms for table in owned_tables(each)]
        condition = and_(true(), *part._where_criteria)
        found += [f"no owner: {part}" for table in tables if not is_limited_to_owner(condition, table)]
        if isinstance(part, Update) and "user_id" in _set(part):
            found.append(f"gives a row away: {part}")
    return found


def _set(statement: Any) -> dict[str, Any]:
    """Return the values that *statement* writes, by column name."""
    assert not getattr(statement, "_multi_values", ()), "of many rows: not looked into"
    return {getattr(column, "key", column): value for column, value in (statement._values or {}).items()}


def _inserted_user(statement: Any) -> Any:
    if statement.select is None:
        return _set(statement).get("user_id")
    place = list(statement._select_names).index("user_id")
    return list(statement.select.selected_columns)[place]


def test_every_statement_is_bound_to_its_owner() -> None:
    assert len([*constants(tasks), *constants(stats)]) >= 8
    assert len(constants(bulk)) >= 5
    assert len(constants(idempotency)) >= 3
    assert all(len(list_statements(shape)) == 48 and len(bulks(shape)) == 5 for shape in get_args(Shape))

    for statement in every_statement():
        assert bool(breaches(statement)) is any(statement is each for each in _WITHOUT_OWNER), breaches(
            statement
        )


@pytest.mark.parametrize(
    "statement",
    [
        select(TASKS.c.id).where(TASKS.c.id == 1),
        select(TASKS.c.id).where(TASKS.c.user_id != OWNED.right),
        select(TASKS.c.id).where(TASKS.c.user_id == "alice"),
        select(TASKS.c.id).where(TASKS.c.user_id == OTHER_BIND),
        select(TASKS.c.id).where(or_(OWNED, TASKS.c.completed)),
        select(TASKS.c.id).where(~OWNED),
        select(TASKS.c.id).where(OWNED | (TASKS.c.id == 1), TASKS.c.completed),
        select(TASKS.c.id).where(OWNED, TASKS.c.id.in_(select(TASKS.c.id))),
        select(TASKS.c.id)
        .where(OWNED, exists(select(ALIAS.c.id).where(or_(ALIAS.c.user_id == OWNED.right))))
        .where(exists(select(ALIAS.c.id))),
        select(TASKS.c.id, select(KEYS.c.key).scalar_subquery()).where(OWNED),
        select(TASKS.c.id).join(KEYS, true()).where(OWNED),
        select(TASKS.c.id, ALIAS.c.id).where(OWNED, TASKS.c.id == ALIAS.c.id),
        select(select(TASKS.c.id).cte("all").c.id),
        union_all(select(TASKS.c.id).where(OWNED), select(TASKS.c.id)),
        update(TASKS).values(title="mine"),
        update(TASKS).where(or_(OWNED, TASKS.c.completed)).values(title="mine"),
        update(TASKS).where(OWNED).values(title=select(ALIAS.c.title).scalar_subquery()),
        update(TASKS).where(OWNED).values(user_id=OTHER_BIND),
        TASKS.delete().where(OWNED | TASKS.c.completed),
        TASKS.insert().values(user_id="bob", title="not alice's"),
        TASKS.insert().values(user_id=OTHER_BIND, title="not alice's"),
        TASKS.insert().values(title="without"),
        TASKS.insert().from_select(["title", "user_id"], select(OWNED.right, OTHER_BIND)),
        TASKS.insert().from_select(["user_id", "title"], select(OWNED.right, TASKS.c.title)),
        TASKS.insert().values(user_id=OWNED.right, title=select(TASKS.c.title).scalar_subquery()),
    ],
    ids=str,
)
def test_a_statement_that_reaches_other_users_is_noticed(statement: Executable) -> None:
    assert breaches(statement)


WRITING = [
    each
    for module in (tasks, bulk, trash, purge)
    for each in vars(module).values()
    if isinstance(each, PerDatabase) and each.writes
]
WRITING += [bulk._reopen_all(shape) for shape in get_args(Shape)]
WRITING += [bulk._delete_all(shape, trash) for shape in get_args(Shape) for trash in (False, True)]
WRITING += [bulk._complete_all(shape, series) for shape in get_args(Shape) for series in (False, True)]


@pytest.mark.parametrize("statement", WRITING, ids=lambda each: compile_statement(each, POSTGRES).name)
def test_whoever_changes_tasks_locks_their_owner_first(statement: PerDatabase) -> None:
    """Otherwise revisions would become visible out of order, and two requests could deadlock (40P01)."""
    for part in parts(statement.postgresql):
        if isinstance(part, Update | Insert | Delete) and part.table is TASKS:
            assert any(name in str(part) for name in ("locked", "following")), str(part)

    sql = compile_statement(statement, POSTGRES).sql
    first = min(sql.index(words) for words in ("FOR NO KEY UPDATE", "ON CONFLICT") if words in sql)
    writes = ("UPDATE task SET", "INSERT INTO task ", "DELETE FROM task ")
    assert first < min(sql.index(words) for words in writes if words in sql)


def test_deleted_tasks_are_left_out() -> None:
    reading = [*constants(tasks), *constants(stats), *constants(bulk)]
    listing = [each for shape in get_args(Shape) for each in list_statements(shape) + bulks(shape)]
    reading += [each for statement in listing for each in variants(statement)]
    for statement in reading:
        for part in parts(statement):
            if not isinstance(part, Insert) and TASKS in _sources(part):
                assert "task.deleted_at IS NULL" in str(and_(true(), *part._where_criteria)), str(part)


def _sources(part: Any) -> list[Any]:
    if isinstance(part, Select):
        return [table for each in part.get_final_froms() for table in owned_tables(each)]
    return [part.table]
