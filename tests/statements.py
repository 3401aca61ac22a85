"""Every statement of the service that reads or writes rows of a user."""

import itertools
from types import ModuleType
from typing import get_args

from sqlalchemy.sql.base import Executable

from database.statements import PerDatabase, Statement
from queries import bulk, changes, filters, idempotency, lists, purge, revisions, stats, tasks, trash
from schemas import Order

MODULES = (tasks, trash, purge, changes, stats, bulk, idempotency, revisions)


def every_statement() -> list[Executable]:
    """Return every statement; those that the databases want differently twice."""
    return [each for statement in sent() for each in variants(statement)]


def sent() -> list[Statement]:
    """Return every statement as the service sends it."""
    return [
        *(each for module in MODULES for each in vars(module).values() if variants(each)),
        *(each for shape in get_args(filters.Shape) for each in list_statements(shape) + bulks(shape)),
    ]


def constants(module: ModuleType) -> list[Executable]:
    return [each for value in vars(module).values() for each in variants(value)]


def variants(value: object) -> list[Executable]:
    if isinstance(value, PerDatabase):
        return [value.postgresql, value.sqlite]
    return [value] if isinstance(value, Executable) and _runs(value) else []


def _runs(value: Executable) -> bool:
    # Tables and columns are `Executable` too, but they are not statements.
    return bool(value.is_select or value.is_dml)


def list_statements(shape: filters.Shape) -> list[Statement]:
    orders = [
        Order(field=field, descending=descending)
        for field in ("created_at", "title", "priority", "due_date")
        for descending in (False, True)
    ]
    cases = itertools.product(orders, get_args(lists.Start))
    return [
        lists.page_of_tasks(shape, order, start, counts) for order, start in cases for counts in (False, True)
    ]


def bulks(shape: filters.Shape) -> list[Statement]:
    return [
        *(bulk._delete_all(shape, has_trash) for has_trash in (True, False)),
        bulk._reopen_all(shape),
        *(bulk._complete_all(shape, in_series) for in_series in (False, True)),
    ]
