"""Statements: SQLAlchemy expressions with a name, compiled once for each driver."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from sqlalchemy import ColumnElement, Select, TypeDecorator, func, select, true
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.base import Executable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

Row = dict[str, Any]
S = TypeVar("S", bound=Executable)

UNNAMED = "unnamed"
ABSENT = msgspec.UNSET


def named(name: str, statement: S, *, objects: bool = False, head: Sequence[ColumnElement[Any]] = ()) -> S:
    """Return *statement* with the name under which metrics and the log show it.

    *objects*: its rows are objects with the columns as attributes. Making and encoding one takes a quarter of
    the time of a `Row`, which matters for lists. An attribute that is `ABSENT` is left out of the JSON.
    *head* is for SQLite only (see `headed`).
    """
    return statement.execution_options(name=name, objects=objects, head=head)


class Deferred(NamedTuple):
    """A statement that *build* makes from *arguments* when it is compiled, and that is not kept.

    An expression takes some 200 KB, its SQL 5 KB, which matters for statements with many variants.
    """

    build: Callable[..., "Executable | PerDatabase"]
    arguments: tuple[Any, ...]
    writes: bool = False


class PerDatabase(NamedTuple):
    """A statement as each database wants it.

    *writes* is whether it changes tasks. Its type does not tell: PostgreSQL writes in the CTEs of a SELECT.
    """

    postgresql: Executable
    sqlite: Executable
    writes: bool = True


def headed(
    name: str,
    page: Select[Any],
    head: Sequence[ColumnElement[Any]],
    order: Callable[[Any], Iterable[ColumnElement[Any]]],
) -> PerDatabase:
    """Return the statement of a *page* whose rows are objects that have the values of *head* too.

    An empty page is one row with those and nulls. *order* returns the order for the columns of the page.
    PostgreSQL joins page and head. SQLite returns the rows as one JSON value and the head beside it, as a
    join would double the time.
    """
    rows, once = page.subquery("page"), select(*head).subquery("head")
    joined = select(*rows.c, *once.c).select_from(once.outerjoin(rows, true())).order_by(*order(rows.c))
    return PerDatabase(
        named(name, joined, objects=True), named(name, page, objects=True, head=head), writes=False
    )


Statement = Executable | Deferred | PerDatabase


def changes_tasks(statement: Statement) -> bool:
    """Return whether *statement* writes tasks, as its `writes` says; a plain expression does not."""
    return isinstance(statement, PerDatabase | Deferred) and statement.writes


@dataclass(frozen=True)
class Compiled:
    """A statement as one driver wants it: SQL, values in order, and conversions both ways."""

    sql: str
    reads: bool
    parameters: Sequence[tuple[str, Any, Callable[[Any], Any] | None]]
    columns: Sequence[tuple[str, Callable[[Any], Any] | None]]
    name: str = UNNAMED
    row_class: type[Any] | None = None  # None: rows are dictionaries
    is_collected: bool = False  # into one row: a JSON array of arrays, and the head

    def arguments(self, values: Row) -> list[Any]:
        return [
            convert(values.get(name, default)) if convert else values.get(name, default)
            for name, default, convert in self.parameters
        ]

    def rows(self, found: Iterable[Sequence[Any]]) -> list[Any]:
        """Return what the driver has *found* as rows, with its values converted by their columns' types."""
        if self.row_class is not None:
            return self._objects(self.row_class, self._spread(*found) if self.is_collected else found)
        rows = [dict(zip(self._names, values, strict=False)) for values in found]  # strict: 0.2 µs a row more
        for name, convert in self._conversions:
            for row in rows:
                row[name] = convert(row[name])
        return rows

    def _objects(self, row_class: type[Any], found: Iterable[Sequence[Any]]) -> list[Any]:
        rows = [row_class(*values) for values in found]
        for name, convert in self._conversions:
            for row in rows:
                if (value := getattr(row, name)) is not None:
                    setattr(row, name, convert(value))
        return rows

    def _spread(self, collected: Sequence[Any]) -> Iterable[Sequence[Any]]:
        text, *head = collected
        rows = msgspec.json.decode(text)
        if head and not rows:
            rows = [[None] * (len(self.columns) - len(head))]
        return [[*row, *head] for row in rows] if head else rows

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, _ in self.columns]

    @cached_property
    def _conversions(self) -> list[tuple[str, Callable[[Any], Any]]]:
        return [(name, convert) for name, convert in self.columns if convert]


@lru_cache(maxsize=1024)
def compile_statement(statement: Statement, dialect: Dialect) -> Compiled:
    """Compile once. The cache finds a statement by identity, as each is built once, a `Deferred` by value."""
    if isinstance(statement, Deferred):
        statement = statement.build(*statement.arguments)
    writes = changes_tasks(statement)
    if isinstance(statement, PerDatabase):
        statement = statement.postgresql if dialect.name == "postgresql" else statement.sqlite
    options = statement.get_execution_options()
    objects, head = options.get("objects", False), options.get("head", ())
    columns = [
        (str(column.name), _result_processor(column.type, dialect))
        for column in (*statement.exported_columns, *head)  # type: ignore[attr-defined] # not in its stubs
    ]
    is_collected = objects and dialect.name == "sqlite"
    if is_collected:  # into one row, because the driver waits for the GIL at each
        rows = statement.subquery("rows")  # type: ignore[attr-defined] # not in its stubs
        statement = select(func.json_group_array(func.json_array(*rows.c)), *head).select_from(rows)
    compiled = statement.compile(dialect=dialect)  # type: ignore[attr-defined] # not in its stubs
    assert isinstance(compiled, SQLCompiler)  # noqa: S101 - for the type checker
    parameters = []
    for name in compiled.positiontup or []:
        bind = compiled.binds[name]
        convert = bind.type.dialect_impl(dialect).bind_processor(dialect)
        parameters.append((name, bind.effective_value, convert))
    row_class = _row_class(tuple(name for name, _ in columns)) if objects else None
    reads = statement.is_select and not writes
    name = options.get("name", UNNAMED)
    return Compiled(compiled.string, reads, parameters, columns, name, row_class, is_collected)


@lru_cache
def _row_class(names: tuple[str, ...]) -> type[Any]:
    return msgspec.defstruct("Record", names, gc=False)  # rows cannot be part of a reference cycle


def _result_processor(kind: TypeEngine[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    if dialect.name == "postgresql" and not isinstance(kind, TypeDecorator):
        return None  # asyncpg returns Python's types already
    return kind.dialect_impl(dialect).result_processor(dialect, None)
