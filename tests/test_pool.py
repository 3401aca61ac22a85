import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

import pool as pool_module
from pool import Pool
from tests.postgres import Server

PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2)
    yield pool
    await pool.close()


async def pid(pool: Pool) -> int:
    """Return which connection served us."""
    ((found,),) = await pool.fetch(PID, [])
    return int(found)


async def occupied(pool: Pool, count: int = 2) -> list["asyncio.Task[object]"]:
    """Return tasks that each hold a connection for ever, once they do."""
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(pool.fetch("SELECT pg_sleep(60)", [])) for _ in range(count)
    ]
    await asyncio.sleep(0.2)
    return tasks


async def test_a_connection_is_used_again(pool: Pool) -> None:
    assert await pid(pool) == await pid(pool)


async def test_no_more_connections_are_made_than_allowed(pool: Pool) -> None:
    assert len(set(await asyncio.gather(*(pid(pool) for _ in range(50))))) == 2


async def test_a_statement_is_prepared_once(pool: Pool) -> None:
    for number in range(3):
        assert await pool.fetch("SELECT 1 + $1::int", [number]) == [(1 + number,)]

    names = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 1 +%'"
    assert await pool.fetch(names, []) == [(1,)]


async def test_who_waits_too_long_is_told_so(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WAIT_S", 0.05)
    holders = await occupied(pool)

    with pytest.raises(TimeoutError):
        await pid(pool)

    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    assert await pid(pool)


async def test_waiters_are_served_in_order(pool: Pool) -> None:
    served: list[int] = []

    async def use(number: int) -> None:
        await pid(pool)
        served.append(number)

    (holder,) = await occupied(pool, 1)
    await asyncio.gather(*(use(number) for number in range(20)))
    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)

    assert served == list(range(20))


async def test_an_error_of_the_statement_keeps_the_connection(pool: Pool) -> None:
    before = await pid(pool)

    with pytest.raises(asyncpg.DivisionByZeroError):
        await pool.fetch("SELECT 1 / $1::int", [0])

    assert await pid(pool) == before


async def test_an_interrupted_statement_costs_its_connection(pool: Pool) -> None:
    before = await pid(pool)
    (holder,) = await occupied(pool, 1)

    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)

    assert await pid(pool) != before


async def test_a_failed_connect_gives_the_turn_back() -> None:
    pool = Pool(lambda: asyncpg.connect("postgresql://nobody@127.0.0.1:1/nowhere"), 1)

    for _ in range(3):
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await pid(pool)


async def test_a_cancelled_wait_gives_no_turn_away(pool: Pool) -> None:
    holders = await occupied(pool)
    waiters = [asyncio.create_task(pid(pool)) for _ in range(5)]
    await asyncio.sleep(0)

    for task in (*waiters, *holders):
        task.cancel()
    await asyncio.gather(*waiters, *holders, return_exceptions=True)

    assert len(set(await asyncio.gather(*(pid(pool) for _ in range(20))))) == 2


async def test_an_idle_connection_is_replaced_before_the_server_drops_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pid(pool)
    monkeypatch.setattr(pool_module, "IDLE_MAX_S", 0.0)

    assert await pid(pool) != before


async def test_a_server_with_fewer_places_than_wanted_is_used_as_far_as_it_goes(postgres: Server) -> None:
    await postgres.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    url = postgres.url.replace("postgres@", "few@")
    pool = Pool(lambda: asyncpg.connect(url), 6)

    errors = await pool.warm()

    assert [type(error) for error in errors] == [asyncpg.TooManyConnectionsError]
    assert await pid(pool)
    await pool.close()
    await postgres.execute("DROP ROLE few")
