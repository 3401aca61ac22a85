import asyncio
import contextlib

import asyncpg
import pytest

from database import fair_share
from database.fair_share import FairShare
from errors import TooManyRequests
from main import create_app
from tests.conftest import person, running, settings_for


async def _hold(share: FairShare, user_id: str, released: asyncio.Event) -> None:
    await share.enter(user_id)
    try:
        await released.wait()
    finally:
        share.leave(user_id)


async def test_users_have_separate_slots() -> None:
    share = FairShare(2)
    for user_id in ("alice", "alice", "bob"):
        await asyncio.wait_for(share.enter(user_id), 1)

    third = asyncio.create_task(share.enter("alice"))
    await asyncio.sleep(0)
    assert not third.done()
    share.leave("alice")
    await asyncio.wait_for(third, 1)


async def test_requests_that_wait_get_their_slots_in_order() -> None:
    share, order = FairShare(1), []
    await share.enter("alice")

    async def wait(number: int) -> None:
        await share.enter("alice")
        order.append(number)
        share.leave("alice")

    waiting = [asyncio.create_task(wait(number)) for number in range(3)]
    await asyncio.sleep(0)
    share.leave("alice")
    await asyncio.gather(*waiting)

    assert order == [0, 1, 2]


@pytest.mark.parametrize("when", ["waiting", "handed over"])
async def test_a_cancelled_request_keeps_no_slot(when: str) -> None:
    share = FairShare(1)
    await share.enter("alice")
    waiting = asyncio.create_task(share.enter("alice"))
    await asyncio.sleep(0)
    if when == "handed over":
        share.leave("alice")
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    if when == "waiting":
        share.leave("alice")

    await asyncio.wait_for(share.enter("alice"), 1)
    share.leave("alice")
    assert (share._taken, share._waiting) == ({}, {})  # a user without requests has no entry


async def test_too_many_waiting_requests_of_a_user_are_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "WAITING_MAX", 2)
    share, released = FairShare(1), asyncio.Event()
    holding = [asyncio.create_task(_hold(share, "alice", released)) for _ in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(TooManyRequests) as refused:
        await share.enter("alice")
    await asyncio.wait_for(share.enter("bob"), 1)

    released.set()
    await asyncio.gather(*holding)
    assert refused.value.headers == {"Retry-After": "1"}


async def test_cancelled_requests_do_not_wait_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "WAITING_MAX", 2)
    share = FairShare(1)
    await share.enter("alice")
    for _ in range(5):  # clients disconnect while one statement takes long
        waiting = asyncio.create_task(share.enter("alice"))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    last = asyncio.create_task(share.enter("alice"))
    await asyncio.sleep(0)
    share.leave("alice")
    await asyncio.wait_for(last, 1)


async def test_one_users_waiting_requests_leave_connections_for_others(postgres_url: str) -> None:
    other = await asyncpg.connect(postgres_url)
    try:
        async with running(create_app(settings_for(postgres_url, database_pool_size=6))) as client:
            alice, bob = person("alice", client), person("bob", client)
            task = await alice.create()
            async with other.transaction():
                await other.execute("SELECT * FROM task FOR UPDATE")
                path = f"/{task['id']}/complete"
                waiting = [asyncio.create_task(alice.patch(path)) for _ in range(20)]
                await asyncio.sleep(0.1)

                async with asyncio.timeout(1):
                    assert (await bob.create())["title"] == "Buy milk"
            answers = await asyncio.gather(*waiting)
    finally:
        await other.close()

    assert {answer.status_code for answer in answers} == {200}
