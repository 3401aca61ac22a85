import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from database import pool as pool_module
from database.pool import STATEMENTS_MAX, Pool
from database.slots import PoolBusy
from tests.postgres import Server
from tests.postgres_proxy import running_proxy

PID = "SELECT pg_backend_pid()"


@pytest.fixture
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2, wait_s=6)
    yield pool
    await pool.close()


async def pid(pool: Pool) -> int:
    """Return the backend's process id, which identifies the connection."""
    ((found,),) = await pool.fetch(PID, [])
    return int(found)


async def occupied(pool: Pool, count: int = 2) -> list["asyncio.Task[object]"]:
    """Start tasks that each hold a connection until cancelled; return once they do."""
    tasks: list[asyncio.Task[object]] = [
        asyncio.create_task(pool.fetch("SELECT pg_sleep(60)", [])) for _ in range(count)
    ]
    await asyncio.sleep(0.2)
    return tasks


async def test_a_connection_is_reused(pool: Pool) -> None:
    assert await pid(pool) == await pid(pool)


async def test_no_more_connections_are_made_than_allowed(pool: Pool) -> None:
    assert len(set(await asyncio.gather(*(pid(pool) for _ in range(50))))) == 2


async def test_a_statement_is_prepared_once(pool: Pool) -> None:
    for number in range(3):
        assert await pool.fetch("SELECT 1 + $1::int", [number]) == [(1 + number,)]

    names = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 1 +%'"
    assert await pool.fetch(names, []) == [(1,)]


async def test_a_connection_keeps_its_most_recent_statements_prepared(pool: Pool) -> None:
    prepared = "SELECT statement FROM pg_prepared_statements"
    async with pool.connection() as connection:
        for number in range(3 * STATEMENTS_MAX):
            await connection.fetch(f"SELECT {number} + $1::int", [1])
            await connection.fetch("SELECT 'often used'", [])

        kept = {row["statement"] for row in await connection.fetch(prepared, [])}

    # The server may not know yet that the last statement was dropped.
    assert STATEMENTS_MAX <= len(kept) <= STATEMENTS_MAX + 1
    assert {"SELECT 'often used'", f"SELECT {3 * STATEMENTS_MAX - 1} + $1::int"} <= kept


async def test_a_connection_is_replaced_after_its_lifetime(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LIFETIME_S", 0.2)
    pool = Pool(lambda: asyncpg.connect(postgres.url), 1, wait_s=6)
    first = await pid(pool)
    assert await pid(pool) == first
    await asyncio.sleep(0.25)

    assert await pid(pool) == first  # the request that finds the connection expired still uses it
    assert await pid(pool) != first
    assert pool.usage == {"in use": 0, "idle": 1, "waiting": 0}
    await pool.close()


async def test_waiting_too_long_for_a_connection_raises_timeout_error(postgres: Server) -> None:
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2, wait_s=0.2)
    await pool.warm()  # connecting may take longer than that
    holders = await occupied(pool)

    with pytest.raises(TimeoutError):
        await pid(pool)

    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    assert await pid(pool)
    await pool.close()


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


async def test_a_cancelled_statement_drops_its_connection(pool: Pool) -> None:
    before = await pid(pool)
    (holder,) = await occupied(pool, 1)

    holder.cancel()
    await asyncio.gather(holder, return_exceptions=True)

    assert await pid(pool) != before


async def test_an_unreachable_server_is_awaited_once_and_then_fails_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE_S", 0.5)
    pool = Pool(lambda: asyncpg.connect("postgresql://nobody@127.0.0.1:1/nowhere"), 2, wait_s=6)
    times = []

    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            await asyncio.gather(*(pid(pool) for _ in range(5)))
        times.append(time.monotonic() - started)
    await pool.close()

    assert 0.4 < times[0] < 1.5
    assert max(times[1:]) < 0.1


@pytest.mark.parametrize(
    "error", [asyncpg.InternalClientError("?"), AttributeError("server_version"), EOFError()]
)
async def test_connecting_is_retried_after_any_error(postgres: Server, error: Exception) -> None:
    failures = [OSError("refused"), error, error]

    async def connect() -> Any:
        if failures:
            raise failures.pop(0)
        return await asyncpg.connect(postgres.url)

    pool = Pool(connect, 2, wait_s=6)

    assert await asyncio.wait_for(pid(pool), 5)
    assert failures == []
    await pool.close()


async def test_requests_made_while_the_server_wakes_get_a_connection(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = False

    async def connect() -> Any:
        if not awake:
            raise ConnectionRefusedError
        return await asyncpg.connect(postgres.url)

    pool = Pool(connect, 2, wait_s=6)
    asking = [asyncio.create_task(pid(pool)) for _ in range(20)]
    await asyncio.sleep(0.5)

    awake = True
    pids = await asyncio.wait_for(asyncio.gather(*asking), 2)

    assert 1 <= len(set(pids)) <= 2
    await pool.close()


async def test_a_full_queue_for_connections_is_pool_busy_at_once(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "WAITING_MAX_AT_LEAST", 3)
    monkeypatch.setattr(pool_module, "WAITING_MAX_PER_CONNECTION", 1)
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2, wait_s=6)
    holders = await occupied(pool)
    waiting = [asyncio.create_task(pid(pool)) for _ in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(PoolBusy):
        await pid(pool)

    for holder in holders:
        holder.cancel()
    await asyncio.gather(*holders, return_exceptions=True)
    assert all(await asyncio.gather(*waiting))
    await pool.close()


async def test_a_dead_idle_connection_and_all_others_are_replaced(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "CHECK_TIMEOUT_S", 0.2)
    async with running_proxy(postgres.url) as proxy:
        pool = Pool(lambda: asyncpg.connect(proxy.url), 3, wait_s=6)
        await pool.warm()
        before = set(await asyncio.gather(*(pid(pool) for _ in range(20))))
        proxy.swallow()  # drop all data of the current connections
        monkeypatch.setattr(pool_module, "UNCHECKED_S", 0.0)

        started = time.monotonic()
        after = await pid(pool)

        assert after not in before
        assert time.monotonic() - started < 1
        await pool.close()


@pytest.mark.parametrize(("idle_s", "checks"), [(29, 0), (31, 1)])
async def test_a_connection_is_checked_once_it_has_been_idle_for_half_a_minute(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, idle_s: float, checks: int
) -> None:
    before = await pid(pool)
    asked = []
    answers = pool_module.Connection.answers

    async def asked_and_answers(connection: pool_module.Connection) -> bool:
        asked.append(connection)
        return await answers(connection)

    monkeypatch.setattr(pool_module.Connection, "answers", asked_and_answers)
    pool._idle[0].used_at -= idle_s

    assert await pid(pool) == before
    assert len(asked) == checks
    assert await pid(pool) == before
    assert len(asked) == checks  # the connection was just used


async def test_a_cancelled_check_drops_its_connection(
    postgres: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "UNCHECKED_S", 0.0)
    monkeypatch.setattr(pool_module, "PATIENCE_S", 0.2)
    away = False

    async with running_proxy(postgres.url) as proxy:

        async def connect() -> Any:
            if away:
                raise ConnectionRefusedError
            return await asyncpg.connect(proxy.url)

        pool = Pool(connect, 1, wait_s=6)
        await pool.warm()
        proxy.swallow()
        checking = asyncio.create_task(pid(pool))
        await asyncio.sleep(0.1)
        checking.cancel()
        await asyncio.gather(checking, return_exceptions=True)

        away = True
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            await pid(pool)

        assert time.monotonic() - started < 1  # it would wait longer if the connection were still in use
        await pool.close()


async def test_cancelled_waiters_leak_no_connection(pool: Pool) -> None:
    holders = await occupied(pool)
    waiters = [asyncio.create_task(pid(pool)) for _ in range(5)]
    await asyncio.sleep(0)

    for task in (*waiters, *holders):
        task.cancel()
    await asyncio.gather(*waiters, *holders, return_exceptions=True)
    await asyncio.gather(*pool._tasks)  # which end the connections of the holders

    assert pool.usage == {"in use": 0, "idle": 0, "waiting": 0}
    assert len(set(await asyncio.gather(*(pid(pool) for _ in range(20))))) == 2


async def test_an_idle_connection_is_replaced_before_the_server_drops_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await pid(pool)
    monkeypatch.setattr(pool_module, "IDLE_MAX_S", 0.0)
    monkeypatch.setattr(pool_module, "UNCHECKED_S", 0.0)

    assert await pid(pool) != before


async def test_a_server_with_a_lower_connection_limit_than_the_pool_is_usable(postgres: Server) -> None:
    await postgres.execute("CREATE ROLE few LOGIN CONNECTION LIMIT 2")
    url = postgres.url.replace("postgres@", "few@")
    pool = Pool(lambda: asyncpg.connect(url), 6, wait_s=6)

    errors = await pool.warm()

    assert [type(error) for error in errors] == [asyncpg.TooManyConnectionsError]
    assert await pid(pool)
    await pool.close()
    await postgres.execute("DROP ROLE few")
