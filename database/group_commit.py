"""Group commit: the writes of several requests in one SQLite transaction, as each commit waits for the disk.

Every write keeps its own outcome, and none is reported before the commit.
"""

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiosqlite

from database.calls import Call, InterruptibleConnection, Outcome
from database.slots import PoolBusy

GROUP_MAX = 64  # writes of one transaction; each is answered after the commit of all

Lend = Callable[[], AbstractAsyncContextManager[aiosqlite.Connection]]


class GroupCommit:
    """Runs the writes that wait together, whenever *lend* gives the writing connection."""

    def __init__(self, lend: Lend, waiting_max: int) -> None:
        self._lend = lend
        self._waiting_max = waiting_max
        self._queue: deque[Call] = deque()
        self._draining: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def write(self, write: Call) -> list[Any]:
        """Return the rows of *write* after its commit.

        Raises:
            PoolBusy: too many writes are waiting.
            Unavailable: the writing connection was not free in time.
            sqlite3.Error: the statement or its commit failed.
        """
        if len(self._queue) >= self._waiting_max:
            raise PoolBusy(f"{len(self._queue)} requests are waiting to write")
        self._queue.append(write)
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await write.rows

    async def close(self) -> None:
        """Wait for the group that is being written."""
        if self._draining is not None:
            await asyncio.wait({self._draining})

    async def _drain(self) -> None:
        group: list[Call] = []
        try:
            while self._queue:
                async with self._lend() as connection:
                    group = [self._queue.popleft() for _ in range(min(len(self._queue), GROUP_MAX))]
                    # No public method of aiosqlite runs a function on the connection's thread.
                    outcomes = await connection._execute(  # type: ignore[no-untyped-call] # not annotated
                        _run, connection._conn, group
                    )
                for write, outcome in zip(group, outcomes, strict=True):
                    write.resolve(outcome)
        except Exception as error:  # whatever it is, no request may wait for ever
            for write in (*group, *self._queue):
                write.resolve(error)
            self._queue.clear()
        finally:
            self._draining = None


def _run(connection: InterruptibleConnection, group: list[Call]) -> list[Outcome]:
    if len(group) > 1 and (outcomes := _run_together(connection, group)):
        return outcomes
    return [write.run(connection) for write in group]


def _run_together(connection: InterruptibleConnection, group: list[Call]) -> list[Outcome] | None:
    """Return the outcomes of *group* after one commit; None if all was undone and can be repeated.

    SQLite undoes a statement that fails, and the transaction goes on. An interrupt, a full disk and the like
    end the transaction.
    """
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:  # another process writes
        return [error] * len(group)
    try:
        outcomes: list[Outcome] = []
        for write in group:
            outcomes.append(write.run(connection))
            if not connection.in_transaction:
                return None
        began = time.perf_counter()
        connection.execute("COMMIT")
        commit_s = time.perf_counter() - began
        for write in group:
            write.seconds += commit_s
    except sqlite3.Error as error:
        outcomes = [error] * len(group)
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    return outcomes
