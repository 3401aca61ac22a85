"""Bounds how many statements of one user run at once, so that no user can occupy every connection."""

import asyncio
from collections import deque
from sys import maxsize

from errors import TooManyRequests

WAITING_MAX = 100  # per user; a front end that loads ten things at once only waits a moment
RETRY_AFTER_S = 1


class FairShare:
    """At most *per_user* slots for each user; further requests of the same user wait in order."""

    def __init__(self, per_user: int) -> None:
        self._per_user = per_user
        self._taken: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    def take(self, user_id: str) -> bool:
        """Take a slot of *user_id* and return True, or return False if all are taken."""
        taken = self._taken.get(user_id, 0)
        if taken >= self._per_user:
            return False
        self._taken[user_id] = taken + 1
        return True

    async def enter(self, user_id: str) -> None:
        """Take a slot of *user_id*, or wait in order until one is released.

        Raises:
            TooManyRequests: `WAITING_MAX` requests of the user are waiting already.
        """
        if self.take(user_id):
            return
        waiting = self._waiting.setdefault(user_id, deque())
        if len(waiting) >= WAITING_MAX:
            raise TooManyRequests(retry_after_s=RETRY_AFTER_S)
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if not slot.cancelled():
                self.leave(user_id)  # `leave` had just handed the slot over
            elif slot in waiting:  # else `leave` has removed it
                waiting.remove(slot)
            raise

    def leave(self, user_id: str) -> None:
        """Release a slot; the request that has waited longest gets it."""
        waiting = self._waiting.get(user_id)
        while waiting:
            slot = waiting.popleft()
            if not slot.done():  # else its request was cancelled
                slot.set_result(None)
                break
        else:
            self._release(user_id)
        if waiting is not None and not waiting:
            del self._waiting[user_id]

    def _release(self, user_id: str) -> None:
        if self._taken[user_id] > 1:
            self._taken[user_id] -= 1
        else:
            del self._taken[user_id]


UNLIMITED = FairShare(maxsize)
