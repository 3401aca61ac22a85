"""Lists as one parameter or column on both databases, so that SQL does not depend on their length.

PostgreSQL has arrays; SQLite reads JSON.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    Boolean,
    ColumnElement,
    DateTime,
    Dialect,
    Text,
    TypeDecorator,
    bindparam,
    cast,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine

JSON_TEXT = JSON(none_as_null=True)


class _SentAsTexts(TypeDecorator[list[Any]]):
    """An array of *kind*, sent as text[], the only array type that asyncpg knows.

    For any other type it asks the server first, which costs each connection three more round trips and leaves
    a changed setting on a pooler's connection.
    """

    impl = ARRAY(Text())
    cache_ok = True

    def __init__(self, kind: TypeEngine[Any]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: list[Any] | None, _: Dialect) -> list[str] | None:
        return None if value is None else [str(element) for element in value]

    def bind_expression(self, bindparam: ColumnElement[Any]) -> ColumnElement[Any]:
        return cast(bindparam, ARRAY(self.kind))


def list_of(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    return _SentAsTexts(kind).with_variant(JSON_TEXT, "sqlite")


class AnyOf(FunctionElement[bool]):
    """Whether a value is in a list: `AnyOf(value, list)`."""

    type = Boolean()
    inherit_cache = True


@compiles(AnyOf)
def _any_of(element: AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    value, options_ = (compiler.process(part, **options) for part in element.clauses)
    return f"{value} = ANY ({options_})"


@compiles(AnyOf, "sqlite")
def _any_of_sqlite(element: AnyOf, compiler: SQLCompiler, **options: Any) -> str:
    value, options_ = (compiler.process(part, **options) for part in element.clauses)
    return f"{value} IN (SELECT value FROM json_each({options_}))"  # noqa: S608 - both are SQL already


class HasAll(FunctionElement[bool]):
    """Whether a list holds everything that another does: `HasAll(list, required)`."""

    type = Boolean()
    inherit_cache = True


@compiles(HasAll)
def _has_all(element: HasAll, compiler: SQLCompiler, **options: Any) -> str:
    column, required = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} @> {required}"


@compiles(HasAll, "sqlite")
def _has_all_sqlite(element: HasAll, compiler: SQLCompiler, **options: Any) -> str:
    column, required = (compiler.process(part, **options) for part in element.clauses)
    missing = f"required.value NOT IN (SELECT value FROM json_each({column}))"  # noqa: S608 - SQL already
    return f"NOT EXISTS (SELECT 1 FROM json_each({required}) AS required WHERE {missing})"  # noqa: S608 - SQL already


class Elements(FunctionElement[Any]):
    """The elements of a list as rows of one column, `value`."""

    name = "elements"
    inherit_cache = True


@compiles(Elements)
def _elements(element: Elements, compiler: SQLCompiler, **options: Any) -> str:
    return f"unnest({compiler.process(element.clauses, **options)})"


@compiles(Elements, "sqlite")
def _elements_sqlite(element: Elements, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


class Records(FunctionElement[Any]):
    """The objects of a JSON array as rows, on PostgreSQL with columns of *kinds*, on SQLite with `value`."""

    name = "records"
    inherit_cache = True

    def __init__(self, array: ColumnElement[Any], kinds: Mapping[str, TypeEngine[Any]]) -> None:
        super().__init__(array)
        self.kinds = kinds


@compiles(Records)
def _records(element: Records, compiler: SQLCompiler, **options: Any) -> str:
    array = compiler.process(element.clauses, **options)
    columns = ", ".join(f"{name} {_sql_type(kind, compiler)}" for name, kind in element.kinds.items())
    return f"ROWS FROM (jsonb_to_recordset(CAST({array} AS jsonb)) AS ({columns}))"


def _sql_type(kind: TypeEngine[Any], compiler: SQLCompiler) -> str:
    # Times are sent without an offset; with a time zone they would be read in the session's.
    return compiler.dialect.type_compiler_instance.process(DateTime() if isinstance(kind, DateTime) else kind)


@compiles(Records, "sqlite")
def _records_sqlite(element: Records, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


def records(parameter: str, kinds: Mapping[str, TypeEngine[Any]]) -> tuple[Any, dict[str, "Member"]]:
    """Return a table of the records in *parameter*, a JSON array, and their members of *kinds*."""
    array = bindparam(parameter, type_=Text())
    table = Records(array, kinds).table_valued("value", *kinds, name="record")
    return table, {name: Member(table.c.value, table.c[name], kind) for name, kind in kinds.items()}


class Member(FunctionElement[Any]):
    """A member of a record as a value of its column's type."""

    inherit_cache = True

    def __init__(self, record: ColumnElement[Any], column: Any, kind: TypeEngine[Any]) -> None:
        super().__init__(record, column)
        self.member, self.type = column.name, kind


@compiles(Member)
def _member(element: Member, compiler: SQLCompiler, **options: Any) -> str:
    _, column = (compiler.process(part, **options) for part in element.clauses)
    return f"{column} AT TIME ZONE 'UTC'" if isinstance(element.type, DateTime) else column


@compiles(Member, "sqlite")
def _member_sqlite(element: Member, compiler: SQLCompiler, **options: Any) -> str:
    record, _ = (compiler.process(part, **options) for part in element.clauses)
    arrow = "->" if isinstance(element.type, ARRAY) else "->>"
    return f"{record} {arrow} '{element.member}'"
