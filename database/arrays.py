"""Lists as one parameter or column on both databases, so that SQL does not depend on their length.

PostgreSQL has arrays; SQLite reads JSON.
"""

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
    """The objects of a JSON array as rows of one column, `value`."""

    name = "records"
    inherit_cache = True


@compiles(Records)
def _records(element: Records, compiler: SQLCompiler, **options: Any) -> str:
    return f"jsonb_array_elements(CAST({compiler.process(element.clauses, **options)} AS jsonb))"


@compiles(Records, "sqlite")
def _records_sqlite(element: Records, compiler: SQLCompiler, **options: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **options)})"


def records(parameter: str) -> Any:
    """Return a table of the records in *parameter*, a JSON array; `Member` reads their fields."""
    return Records(bindparam(parameter, type_=Text())).table_valued("value", name="value")


class Member(FunctionElement[Any]):
    """A member of a record as a value of its column's type."""

    inherit_cache = True

    def __init__(self, record: ColumnElement[Any], name: str, kind: TypeEngine[Any]) -> None:
        super().__init__(record)
        self.member, self.type = name, kind


@compiles(Member)
def _member(element: Member, compiler: SQLCompiler, **options: Any) -> str:
    record = compiler.process(element.clauses, **options)
    if isinstance(element.type, ARRAY):
        return f"ARRAY(SELECT jsonb_array_elements_text({record} -> '{element.member}'))"
    if isinstance(element.type, DateTime):  # in UTC, whatever the session's time zone is
        return f"CAST({record} ->> '{element.member}' AS TIMESTAMP) AT TIME ZONE 'UTC'"
    kind = compiler.dialect.type_compiler_instance.process(element.type)
    return f"CAST({record} ->> '{element.member}' AS {kind})"


@compiles(Member, "sqlite")
def _member_sqlite(element: Member, compiler: SQLCompiler, **options: Any) -> str:
    record = compiler.process(element.clauses, **options)
    arrow = "->" if isinstance(element.type, ARRAY) else "->>"
    return f"{record} {arrow} '{element.member}'"
