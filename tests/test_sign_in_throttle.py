import asyncio

import pytest
from limits.aio.storage import memory

from auth import sign_in_throttle
from auth.sign_in_throttle import FAILURES_MAX, WINDOW_MIN, SignInThrottle, TooManyAttempts
from tests.conftest import Clock
from web import counters
from web.counters import LocalStorage

ALICE = ("alice@example.com", "192.0.2.1")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sign_in_throttle, "time", clock)
    monkeypatch.setattr(counters, "time", clock)
    monkeypatch.setattr(memory, "time", clock)
    return clock


async def _exhaust(counted: SignInThrottle) -> None:
    for _ in range(FAILURES_MAX):
        await counted.count(*ALICE)


async def test_attempts_beyond_the_limit_are_refused_until_the_window_ends(clock: Clock) -> None:
    counted = SignInThrottle(LocalStorage())
    await _exhaust(counted)

    clock.now += 60
    for _ in range(3):
        with pytest.raises(TooManyAttempts) as refused:
            await counted.count(*ALICE)
        assert refused.value.retry_after_s == (WINDOW_MIN - 1) * 60

    clock.now += refused.value.retry_after_s
    await counted.count(*ALICE)


@pytest.mark.parametrize("other", [("bob@example.com", ALICE[1]), (ALICE[0], "192.0.2.2")])
async def test_attempts_on_another_account_or_address_are_not_affected(other: tuple[str, str]) -> None:
    counted = SignInThrottle(LocalStorage())
    await _exhaust(counted)

    await counted.count(*other)


async def test_concurrent_attempts_are_each_counted() -> None:
    counted = SignInThrottle(LocalStorage())

    made = await asyncio.gather(*(counted.count(*ALICE) for _ in range(50)), return_exceptions=True)

    assert made.count(None) == FAILURES_MAX


async def test_a_success_resets_the_failure_count() -> None:
    counted = SignInThrottle(LocalStorage())
    await _exhaust(counted)

    await counted.forget(*ALICE)

    await _exhaust(counted)


async def test_no_email_is_stored_in_plain_text() -> None:
    storage = LocalStorage()

    await SignInThrottle(storage).count(*ALICE)

    assert max(storage._words[counters._COUNT :: counters._ENTRY_WORDS]) == 1
    assert b"alice" not in storage._words.obj[:]  # type: ignore[index] # the whole table
