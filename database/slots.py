"""A semaphore that takes a free slot without a coroutine, and waits without a task or a timeout object."""

import asyncio
from collections import deque
from functools import cached_property


class PoolBusy(Exception):
    """Too many requests are waiting."""


class Slots:
    """*count* slots; requests wait for one in order, at most *wait_s* seconds."""

    def __init__(self, count: int, wait_s: float) -> None:
        self.free = count
        self._wait_s = wait_s
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()  # a system call before Python 3.12

    def take(self) -> bool:
        """Take a slot and return True, or return False if none is free."""
        if not self.free:
            return False
        self.free -= 1
        return True

    async def wait(self) -> None:
        """Wait for a slot; earlier requests are served first.

        Raises:
            TimeoutError: none was free in time.
        """
        slot = self._loop.create_future()
        timer = self._loop.call_later(self._wait_s, _expire, slot)
        self._queue.append(slot)
        try:
            await slot
        except (asyncio.CancelledError, TimeoutError):
            if slot in self._queue:
                self._queue.remove(slot)
            elif not slot.cancelled() and not slot.exception():
                self.give()  # it was handed over at the moment of the cancellation
            raise
        finally:
            timer.cancel()

    def give(self) -> None:
        """Release a slot; the request that has waited longest gets it."""
        while self._queue:
            slot = self._queue.popleft()
            if not slot.done():
                slot.set_result(None)
                return
        self.free += 1


def _expire(slot: "asyncio.Future[None]") -> None:
    if not slot.done():
        slot.set_exception(TimeoutError())
