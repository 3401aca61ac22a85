import asyncio

import pytest

from database.slots import Slots


async def test_requests_get_slots_in_the_order_in_which_they_began_to_wait() -> None:
    slots, order = Slots(1, wait_s=5), []

    async def use(name: str) -> None:
        if not slots.take():
            await slots.wait()
        order.append(name)
        await asyncio.sleep(0)
        slots.give()

    await asyncio.gather(*(use(name) for name in "abc"))

    assert (order, slots.free, slots.waiting) == (["a", "b", "c"], 1, 0)


async def test_a_request_that_times_out_waiting_for_a_slot_is_passed_over() -> None:
    slots = Slots(1, wait_s=0.02)
    assert slots.take()

    with pytest.raises(TimeoutError):
        await slots.wait()
    assert slots.waiting == 0
    slots.give()

    assert (slots.free, slots.waiting) == (1, 0)


async def test_a_cancelled_request_loses_no_slot() -> None:
    slots = Slots(1, wait_s=5)
    assert slots.take()
    first, second = (asyncio.create_task(slots.wait()) for _ in range(2))
    await asyncio.sleep(0)

    slots.give()  # to the first waiter, which is cancelled before it runs again
    first.cancel()
    await second

    assert first.cancelled()
    assert (slots.free, slots.waiting) == (0, 0)


async def test_a_request_that_is_cancelled_while_it_waits_is_passed_over() -> None:
    slots = Slots(1, wait_s=5)
    assert slots.take()
    waiting = asyncio.create_task(slots.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    slots.give()

    assert (slots.free, slots.waiting) == (1, 0)
