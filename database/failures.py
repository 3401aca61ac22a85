"""Translates drivers' exceptions into problems, and tells which failures are transient."""

import sqlite3

import asyncpg

from database.slots import PoolBusy
from errors import NotMigrated, Overloaded, Unavailable
from observability import metrics
from observability.logs import BoundedLog

_log = BoundedLog("database")

# Classes and codes, from PostgreSQL's appendix A, of errors that end once the database is healthy.
_TRANSIENT_CLASSES = ("08", "53")
_TRANSIENT_CODES = {
    "57P01", "57P02", "57P03", "57P05", "57014", "55P03", "55000",
    "25006", "25P03", "40001", "40P01", "58000",
}  # fmt: skip


_TRANSIENT_SQLITE = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_INTERRUPT,
}  # fmt: skip


class _Translated:
    """Raises a problem that a route can answer with in place of a driver's exception."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception) and is_transient_error(error):
            raise unavailable(error) from error
        if isinstance(error, asyncpg.InsufficientPrivilegeError):  # until an operator grants it
            raise unavailable(error) from error
        if isinstance(error, Exception) and _is_not_migrated(error):
            raise unavailable(error, NotMigrated) from error


translated = _Translated()  # shared: it has no state, and a generator for each statement would take time


def unavailable(error: Exception, kind: type[Unavailable] = Unavailable) -> Unavailable:
    metrics.database_unavailable(type(error).__name__)
    _log.warning("database unavailable", reason=type(error).__name__, error=str(error))
    if isinstance(error, PoolBusy):
        return Overloaded()
    unavailable = kind()
    unavailable.lost = _is_lost(error)
    return unavailable


def _is_lost(error: Exception) -> bool:
    """Whether the connection broke; a timeout does not count."""
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code[:2] == "08" or code in ("57P01", "57P02", "57P03")
    if isinstance(error, TimeoutError):
        return False
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | OSError)


def is_transient(error: BaseException | None) -> bool:
    """Whether *error*, or an error in its chain of causes, is transient."""
    while error is not None:
        if isinstance(error, Exception) and is_transient_error(error):
            return True
        error = error.__cause__
    return False


def _is_not_migrated(error: Exception) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith(("no such table", "no such column"))
    return isinstance(error, asyncpg.UndefinedTableError | asyncpg.UndefinedColumnError)


def is_transient_error(error: Exception) -> bool:
    """Whether the same statement may succeed later. Any other error is a bug of ours."""
    if isinstance(error, asyncpg.PostgresError):
        code = error.sqlstate or ""
        return code[:2] in _TRANSIENT_CLASSES or code in _TRANSIENT_CODES
    if isinstance(error, asyncpg.InterfaceError):
        return not isinstance(error, ValueError)  # ValueError: a value does not fit its type
    if isinstance(error, sqlite3.OperationalError):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in _TRANSIENT_SQLITE
    # asyncpg raises InternalClientError when a connection ends while it changes its state.
    return isinstance(error, OSError | TimeoutError | PoolBusy | asyncpg.InternalClientError)
