"""The interface of a database: run statements, each alone or several in a transaction."""

from abc import ABC, abstractmethod
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from math import inf
from typing import Any

from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncEngine

from database.fair_share import UNLIMITED
from database.statements import Compiled, Row, Statement
from observability import metrics
from observability.logs import BoundedLog

_log = BoundedLog("database")


@dataclass(frozen=True)
class Timeouts:
    """Timeouts of a database in seconds: to connect, to run a statement, to wait for a free connection."""

    connect_s: float = 6
    statement_s: float = 4
    wait_s: float = 6


DEFAULT_TIMEOUTS = Timeouts()


class Executor(ABC):
    """Runs statements. Values are named like the statement's `bindparam`s."""

    share = UNLIMITED  # slots of each user

    @abstractmethod
    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        """Return every row of *statement*: a `Row`, or an object if the statement asks for objects.

        Raises:
            Unavailable: the database cannot be used right now.
        """

    async def one(self, statement: Statement, **values: Any) -> Row | None:
        """Return the first row of *statement*, or None."""
        rows = await self.all(statement, **values)
        return rows[0] if rows else None


class Database(Executor):
    """Runs statements, each in its own transaction, except within `transaction`."""

    dialect: Dialect
    slow_statement_s = inf
    # A start waits this long for the database. Then the port opens, and requests get 503 until it is ready.
    start_wait_s = 1.5

    @property
    @abstractmethod
    def usage(self) -> dict[str, int]:
        """How many connections are in which state."""

    @abstractmethod
    async def open(self) -> None:
        """Connect ahead of the first request; an unreachable database does not stop the start."""

    @abstractmethod
    async def close(self) -> None: ...

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[Executor]:
        """Lend an executor whose statements are committed together, or rolled back if the block raises."""

    @abstractmethod
    def engine(self) -> AsyncEngine:
        """Return a SQLAlchemy engine on the same database, for migrations."""

    def took(self, compiled: Compiled, seconds: float) -> None:
        """Record how long a statement took; a slow one is logged by name, without its values."""
        metrics.statement_ran(compiled.name, seconds)
        if seconds > self.slow_statement_s:
            _log.warning("slow statement", reason=compiled.name, duration_ms=round(seconds * 1000, 1))


def share_of(connections: int) -> int:
    """Return how many of *connections* one user may occupy: a third, and at least one."""
    return max(1, connections // 3)
