"""PostgreSQL by asyncpg: each statement takes one round trip on a connection of our own pool."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import Any

import asyncpg
from sqlalchemy import NullPool
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from database import urls
from database.base import DEFAULT_TIMEOUTS, Database, Executor, Timeouts, share_of
from database.failures import is_transient_error, translated, unavailable
from database.fair_share import FairShare
from database.pool import Connection, Pool
from database.statements import Statement, compile_statement
from errors import Unavailable

CANCEL_S = 0.5  # our timeout for a statement is this much longer than the server's


class Postgres(Database):
    def __init__(self, url: str, pool_size: int, timeouts: Timeouts = DEFAULT_TIMEOUTS) -> None:
        self.dialect = PGDialect_asyncpg()  # type: ignore[no-untyped-call] # not in its stubs
        self.target = urls.parse(url)
        self.share = FairShare(share_of(pool_size))
        self._pool_size = pool_size
        self._timeouts = timeouts
        # A pooler refuses startup parameters; behind one, the operator can set the role's statement_timeout.
        self._limits_server = not self.target.pooled

    @cached_property
    def pool(self) -> Pool:
        return Pool(self._connect, self._pool_size, wait_s=self._timeouts.wait_s)

    @property
    def usage(self) -> dict[str, int]:
        return self.pool.usage

    async def open(self) -> None:
        for error in await self.pool.warm():
            if not is_transient_error(error):
                raise error
            unavailable(error)

    async def close(self) -> None:
        await self.pool.close()

    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        compiled = compile_statement(statement, self.dialect)
        arguments, took = compiled.arguments(values), partial(self.took, compiled)
        try:
            with translated:
                records = await self.pool.fetch(compiled.sql, arguments, took)
        except Unavailable as error:
            if not error.lost or not compiled.reads:  # a write may have been committed
                raise
            with translated:
                records = await self.pool.fetch(compiled.sql, arguments, took)
        return compiled.rows(records)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        failure: Exception | None = None
        with translated:
            async with self.pool.connection() as connection:
                await connection.raw.execute("BEGIN")
                try:
                    yield _Transaction(self, connection)
                except Unavailable:
                    raise  # the pool closes the connection, which ends the transaction
                except Exception as error:
                    await connection.raw.execute("ROLLBACK")
                    failure = error
                else:
                    await connection.raw.execute("COMMIT")
        if failure:  # raised by the block, so not to be translated
            raise failure

    def engine(self) -> AsyncEngine:
        # A migration may take long, and may have to wait for another process that migrates.
        connect = partial(self._connect, patient=True)
        return create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)

    async def _connect(self, *, patient: bool = False) -> Any:
        arguments = {**self.target.arguments}
        arguments["timeout"] = arguments["timeout"] or self._timeouts.connect_s
        if not patient:
            # The server should time out first, because the connection stays usable then.
            arguments["command_timeout"] = self._timeouts.statement_s + CANCEL_S
            if self._limits_server:
                timeout = {"statement_timeout": str(round(self._timeouts.statement_s * 1000))}
                arguments["server_settings"] = timeout | arguments["server_settings"]
        try:
            return await asyncpg.connect(**arguments)
        except asyncpg.ProtocolViolationError as error:
            if not self._limits_server or patient:
                raise ConnectionError(str(error)) from error
            self._limits_server = False  # an undeclared pooler: it refuses startup parameters
            return await self._connect()
        except OSError:  # TimeoutError too
            raise
        except Exception as error:  # any other failure also leaves us without a connection
            raise ConnectionError(str(error)) from error


class _Transaction(Executor):
    def __init__(self, database: Postgres, connection: Connection) -> None:
        self._database = database
        self._connection = connection

    async def all(self, statement: Statement, **values: Any) -> list[Any]:
        compiled = compile_statement(statement, self._database.dialect)
        with translated:
            records = await self._connection.fetch(
                compiled.sql, compiled.arguments(values), partial(self._database.took, compiled)
            )
        return compiled.rows(records)
