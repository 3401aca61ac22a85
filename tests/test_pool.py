import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

import pool as pool_module
from pool import Pool
from tests.postgres import Server


@pytest.fixture
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2)
    yield pool
    await pool.close()


async def test_a_connection_is_used_again(pool: Pool) -> None:
    async with pool.connection() as first:
        pass
    async with pool.connection() as second:
        pass

    assert second is first


async def test_a_statement_is_prepared_once(pool: Pool) -> None:
    names = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 1 +%'"
    async with pool.connection() as connection:
        for number in range(3):
            ((found,),) = await connection.fetch("SELECT 1 + $1::int", [number])
            assert found == 1 + number

        assert await connection.raw.fetchval(names) == 1


async def test_who_waits_too_long_is_told_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WAIT_S", 0.05)

    async with pool.connection(), pool.connection():
        with pytest.raises(TimeoutError):
            async with pool.connection():
                pass
    async with pool.connection():
        pass


async def test_waiters_are_served_in_order(pool: Pool) -> None:
    async with pool.connection(), pool.connection():
        served: list[int] = []

    async def use(number: int) -> None:
        async with pool.connection() as connection:
            served.append(number)
            await connection.fetch("SELECT 1", [])

    await asyncio.gather(*(use(number) for number in range(20)))

    assert served == list(range(20))


async def test_an_error_of_the_statement_keeps_the_connection(pool: Pool) -> None:
    async with pool.connection() as first:
        pass
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with pool.connection() as connection:
            await connection.fetch("SELECT 1 / $1::int", [0])
    async with pool.connection() as second:
        pass

    assert first is connection is second


@pytest.mark.parametrize("sql", ["SELECT pg_sleep(5)"])
async def test_an_interrupted_statement_costs_its_connection(pool: Pool, sql: str) -> None:
    used: list[Any] = []

    async def sleep() -> None:
        async with pool.connection() as connection:
            used.append(connection)
            await connection.fetch(sql, [])

    task = asyncio.create_task(sleep())
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert used[0].raw.is_closed()
    async with pool.connection() as connection:
        assert connection is not used[0]
        assert await connection.fetch("SELECT 1", [])


async def test_a_failed_connect_gives_the_turn_back() -> None:
    pool = Pool(lambda: asyncpg.connect("postgresql://nobody@127.0.0.1:1/nowhere"), 1)

    for _ in range(3):
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            async with pool.connection():
                pass


async def test_an_idle_connection_is_replaced_before_the_server_drops_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool.connection() as first:
        pass
    monkeypatch.setattr(pool_module, "IDLE_MAX_S", 0.0)

    async with pool.connection() as second:
        assert second is not first
    assert first.raw.is_closed()
