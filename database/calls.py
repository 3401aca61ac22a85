"""Statements of requests as calls for the thread of a SQLite connection."""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from typing import Any

Outcome = list[Any] | Exception


class InterruptibleConnection(sqlite3.Connection):
    """A connection that stops a running statement once `is_cancelled` returns True (see `sqlite._Timed`)."""

    is_cancelled: Callable[[], bool] = staticmethod(lambda: False)


class Call:
    """One statement of one request. `rows` resolves when it is done, for a write after the commit."""

    def __init__(self, sql: str, arguments: list[Any]) -> None:
        self.sql, self.arguments = sql, arguments
        self.rows: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.seconds = 0.0  # of its execution and its commit

    def run(self, connection: InterruptibleConnection) -> Outcome:
        """Return the rows or the error, on the connection's thread. A cancelled call is not begun."""
        if self.rows.cancelled():
            return []
        began = time.perf_counter()
        connection.is_cancelled = self.rows.cancelled
        try:
            return connection.execute(self.sql, self.arguments).fetchall()
        except Exception as error:  # whatever it is, it is this call's alone
            if str(error).startswith("Could not decode"):  # the driver goes on with the text
                return sqlite3.DataError("a text in the file is not UTF-8")
            return error
        finally:
            del connection.is_cancelled
            self.seconds = time.perf_counter() - began

    def resolve(self, outcome: Outcome) -> None:
        if self.rows.done():
            return  # the request was cancelled
        if isinstance(outcome, Exception):
            self.rows.set_exception(outcome)
        else:
            self.rows.set_result(outcome)
