"""Every statement that the service runs about somebody's rows."""

import itertools
from datetime import date
from types import ModuleType
from typing import get_args

from sqlalchemy.sql.base import Executable

import bulk
import idempotency
import listing
import queries
from schemas import Filter, Order

TODAY = date(2026, 11, 21)
STATES = (frozenset({False, True}), frozenset({True}))


def every_statement() -> list[Executable]:
    return [
        *(each for module in (queries, bulk, idempotency) for each in constants(module)),
        *(statement for shape in shapes() for statement in lists(shape) + bulks(shape)),
    ]


def constants(module: ModuleType) -> list[Executable]:
    return [value for value in vars(module).values() if isinstance(value, Executable) and _runs(value)]


def _runs(value: Executable) -> bool:
    # Tables and columns are executables too, though nobody runs them.
    return bool(value.is_select or value.is_dml)


def shapes() -> list[listing.Shape]:
    wanted = [Filter(states=states, words=words) for states in STATES for words in ((), ("one",))]
    every = Filter(frozenset({True}), ("one", "two"), ("high",), ("home",), ("a",), TODAY, TODAY)
    return [listing.shape_of(each) for each in (*wanted, every)]


def lists(shape: listing.Shape) -> list[Executable]:
    orders = [
        Order(field=field, descending=descending)
        for field in ("created_at", "title", "priority", "due_date")
        for descending in (False, True)
    ]
    cases = itertools.product(orders, get_args(listing.Start))
    return [
        build(shape, order, start) for order, start in cases for build in (listing.page, listing.counted_page)
    ]


def bulks(shape: listing.Shape) -> list[Executable]:
    return [
        bulk._delete_all(shape),
        bulk._reopen_all(shape),
        *(bulk._complete_all(shape, in_series=in_series) for in_series in (False, True)),
    ]
