"""Turns a database's URL into an object that runs statements, one round trip each."""

from sqlalchemy.exc import ArgumentError

from database.base import DEFAULT_TIMEOUTS, Database, Timeouts
from database.postgres import Postgres
from database.sqlite import SQLite

__all__ = ["Database", "Postgres", "SQLite", "Timeouts", "connect"]


def connect(url: str, *, pool_size: int, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> Database:
    """Return the database at *url*, not opened yet.

    Raises:
        ValueError: a clause about the URL, fit to follow `DATABASE_URL: `.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in ("sqlite", "sqlite+aiosqlite"):
        try:
            return SQLite(url, timeouts)
        except ArgumentError as error:
            raise ValueError("is not a valid URL") from error
    if scheme in ("postgres", "postgresql", "postgres+asyncpg", "postgresql+asyncpg"):
        return Postgres(url, pool_size, timeouts)
    raise ValueError("must begin with postgresql:// or sqlite:///")
