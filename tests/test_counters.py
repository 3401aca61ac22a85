import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from auth.sign_in_throttle import FAILURES_MAX, SignInThrottle, TooManyAttempts
from tests.redis_server import Redis, running_redis
from tests.service import PROJECT
from web import counters
from web.counters import KEYS_MAX, TIMEOUT_S, LocalStorage, SharedStorage


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with running_redis(tmp_path) as redis:
        yield redis


@pytest.fixture
async def shared(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SharedStorage]:
    monkeypatch.setattr(counters, "RETRY_S", 0.3)
    storage = SharedStorage(redis.url, LocalStorage())
    yield storage
    await storage.close()


async def test_a_key_is_counted_until_it_expires() -> None:
    storage = LocalStorage()

    assert [await storage.incr("alice", 0.05) for _ in range(3)] == [1, 2, 3]
    assert await storage.incr("bob", 60) == 1

    await asyncio.sleep(0.06)
    assert await storage.incr("alice", 60) == 1


async def test_an_expired_key_gives_way_to_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "_PROBES", 2)
    monkeypatch.setattr(counters, "_ENTRIES", 3)  # all keys have the same two entries
    storage = LocalStorage()
    await storage.incr("alice", 60)
    await storage.incr("bob", 0.01)
    await asyncio.sleep(0.02)

    await storage.incr("carol", 30)
    assert (await storage.get("alice"), await storage.get("bob"), await storage.get("carol")) == (1, 0, 1)

    await storage.incr("dave", 60)  # carol's expires first
    assert (await storage.get("alice"), await storage.get("carol"), await storage.get("dave")) == (1, 0, 1)


async def test_a_cleared_key_is_counted_anew() -> None:
    storage = LocalStorage()
    await storage.incr("alice", 60)
    await storage.incr("bob", 60)

    await storage.clear("alice")

    assert (await storage.get("alice"), await storage.get("bob")) == (0, 1)
    assert await storage.incr("alice", 60) == 1
    await storage.reset()
    assert await storage.get("bob") == 0


async def test_a_flood_of_keys_takes_bounded_memory_and_time_for_each() -> None:
    storage = LocalStorage()
    started = time.process_time()
    for number in range(3 * KEYS_MAX):
        await storage.incr(f"alice{number}", 60)

    # Measured: 2 µs each; scanning all keys on each call would take milliseconds.
    assert (time.process_time() - started) / (3 * KEYS_MAX) < 50e-6
    assert await storage.incr(f"alice{3 * KEYS_MAX - 1}", 60) == 2  # the newest are kept


async def test_nearly_all_of_many_keys_have_an_entry_of_their_own() -> None:
    storage = LocalStorage()
    for number in range(KEYS_MAX):
        await storage.incr(f"alice{number}", 60)

    counts = [await storage.get(f"alice{number}") for number in range(KEYS_MAX)]

    assert counts.count(1) > 0.999 * len(counts)
    assert set(counts) <= {0, 1}


async def test_workers_count_in_the_same_table() -> None:
    with counters.create_table() as table:
        one, other = (LocalStorage(table.fileno()) for _ in range(2))

    assert [await storage.incr("alice", 60) for storage in (one, other, one)] == [1, 2, 3]
    assert await other.get_expiry("alice") == await one.get_expiry("alice") > time.time() + 50


COUNT_OFTEN = """
import asyncio, sys
from web.counters import LocalStorage
async def count(storage):
    for _ in range(50_000):
        await storage.incr("alice", 60)
asyncio.run(count(LocalStorage(int(sys.argv[1]))))
"""


async def test_nearly_all_counts_of_workers_at_the_same_moment_are_kept() -> None:
    with counters.create_table() as table:
        program = [sys.executable, "-c", COUNT_OFTEN, str(table.fileno())]
        both = [
            await asyncio.create_subprocess_exec(*program, cwd=PROJECT, pass_fds=(table.fileno(),))
            for _ in range(2)
        ]
        assert [await each.wait() for each in both] == [0, 0]

        assert 80_000 < await LocalStorage(table.fileno()).get("alice") <= 100_000


async def test_two_processes_share_their_counts_in_redis(redis: Redis, shared: SharedStorage) -> None:
    other = SharedStorage(redis.url, LocalStorage())

    assert [await storage.incr("alice", 60) for storage in (shared, other, shared)] == [1, 2, 3]
    await other.close()


async def test_failed_attempts_are_counted_and_reset_across_processes(
    redis: Redis, shared: SharedStorage
) -> None:
    other = SharedStorage(redis.url, LocalStorage())
    here, there = SignInThrottle(shared), SignInThrottle(other)
    for _ in range(FAILURES_MAX):
        await here.count("alice@example.com")

    with pytest.raises(TooManyAttempts) as refused:
        await there.count("alice@example.com")
    assert 890 <= refused.value.retry_after_s <= 900

    await there.forget("alice@example.com")
    await here.count("alice@example.com")
    await other.close()


async def test_without_redis_counting_goes_on_locally_and_is_logged_once(
    redis: Redis, shared: SharedStorage
) -> None:
    assert await shared.incr("alice", 60) == 1
    with capture_logs() as lines:
        redis.kill()
        assert [await shared.incr("alice", 60) for _ in range(20)] == list(range(1, 21))
        await asyncio.sleep(0.4)
        assert await shared.incr("alice", 60) == 21  # a retry finds Redis still down

        redis.start()
        await asyncio.sleep(0.4)
        assert [await shared.incr("alice", 60) for _ in range(3)] == [1, 2, 3]

    assert [line["event"] for line in lines] == ["redis is gone", "redis is back"]


async def _connect_all(shared: SharedStorage) -> None:
    """Open every connection: opening many at once may take longer than a request waits for Redis."""
    async with asyncio.timeout(30):
        while True:
            await asyncio.gather(*(shared.incr(f"someone{number}", 60) for number in range(50)))
            if shared._ask_again_at is None:
                return
            await asyncio.sleep(0.1)


@pytest.mark.timing
@pytest.mark.no_cover  # it measures time
async def test_a_frozen_redis_delays_each_client_once_and_mixes_up_no_replies(
    redis: Redis, shared: SharedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "RETRY_S", 2.0)
    people = [f"alice{number}" for number in range(50)]

    async def count_all() -> float:
        started = time.monotonic()
        await asyncio.gather(*(shared.incr(name, 60) for name in people))
        return time.monotonic() - started

    await _connect_all(shared)
    before = await asyncio.gather(*(shared.incr(name, 60, amount) for amount, name in enumerate(people, 1)))

    redis.freeze()
    with capture_logs() as lines:
        first_s = await count_all()
        then_s = min([await count_all() for _ in range(3)])
    redis.thaw()
    await _connect_all(shared)
    after = await asyncio.gather(*(shared.get(name) for name in people))

    assert before == list(range(1, 51))
    assert first_s < 10 * TIMEOUT_S  # in sequence, the 50 clients would wait 50 timeouts
    assert then_s < TIMEOUT_S  # Redis is not tried again yet
    assert [line["event"] for line in lines] == ["redis is gone"]
    # Redis may have counted requests sent before it froze, but never under another key.
    assert all(now - then in (0, 1, 2) for then, now in zip(before, after, strict=True))


async def test_counting_starts_locally_while_redis_is_unreachable(tmp_path: Path) -> None:
    storage = counters.connect("redis://:hunter2@127.0.0.1:1/0")
    with capture_logs() as lines:
        assert await storage.incr("alice", 60) == 1

    assert [line["event"] for line in lines] == ["redis is gone"]
    assert "hunter2" not in repr(lines)
    await storage.close()
