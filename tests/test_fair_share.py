import asyncio
import contextlib

import asyncpg
import pytest

import fair_share
from errors import TooManyRequests
from fair_share import FairShare
from main import create_app
from tests.conftest import person, running, settings_for
from tests.postgres import Server


async def _hold(share: FairShare, user_id: str, released: asyncio.Event) -> None:
    if not share.enter(user_id):
        await share.wait(user_id)
    try:
        await released.wait()
    finally:
        share.leave(user_id)


async def test_a_user_has_so_many_slots_and_others_have_their_own() -> None:
    share = FairShare(2)

    assert [share.enter("alice") for _ in range(3)] == [True, True, False]
    assert share.enter("bob")
    share.leave("alice")
    assert share.enter("alice")


async def test_requests_that_wait_get_their_slots_in_order() -> None:
    share, order = FairShare(1), []
    assert share.enter("alice")

    async def wait(number: int) -> None:
        await share.wait("alice")
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
    assert share.enter("alice")
    waiting = asyncio.create_task(share.wait("alice"))
    await asyncio.sleep(0)
    if when == "handed over":
        share.leave("alice")
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    if when == "waiting":
        share.leave("alice")

    assert share.enter("alice")
    share.leave("alice")
    assert (share._taken, share._waiting) == ({}, {})  # nothing is kept of a user without requests


async def test_too_many_waiting_requests_of_a_user_are_429(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "WAITING_MAX", 2)
    share, released = FairShare(1), asyncio.Event()
    holding = [asyncio.create_task(_hold(share, "alice", released)) for _ in range(3)]
    await asyncio.sleep(0)

    with pytest.raises(TooManyRequests) as refused:
        await share.wait("alice")
    assert share.enter("bob")

    released.set()
    await asyncio.gather(*holding)
    assert refused.value.headers == {"Retry-After": "1"}


async def test_one_users_waiting_requests_leave_connections_for_others(postgres: Server) -> None:
    name = await postgres.create_database()
    other = await asyncpg.connect(postgres.url_of(name))
    try:
        async with running(create_app(settings_for(postgres.url_of(name), database_pool_size=6))) as client:
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
        await postgres.drop_database(name)

    assert {answer.status_code for answer in answers} == {200}
