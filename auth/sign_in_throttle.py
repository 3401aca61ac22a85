"""Limits failed sign-ins, counted by a key such as e-mail and client address."""

import hashlib
import math
import time

from limits import RateLimitItemPerMinute
from limits.aio.storage import Storage
from limits.aio.strategies import FixedWindowRateLimiter

FAILURES_MAX = 10
WINDOW_MIN = 15


class TooManyAttempts(Exception):
    """The next attempt is admitted in `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"{FAILURES_MAX} attempts within {WINDOW_MIN} minutes have failed")
        self.retry_after_s = retry_after_s


class SignInThrottle:
    """Counts an attempt before it is made, so that concurrent ones count too; a success clears the count."""

    def __init__(self, storage: Storage) -> None:
        self._limiter = FixedWindowRateLimiter(storage)
        self._limit = RateLimitItemPerMinute(FAILURES_MAX, WINDOW_MIN)

    async def count(self, *about: str) -> None:
        """Count an attempt; *about* is the key.

        Raises:
            TooManyAttempts: too many have failed.
        """
        key = _key(about)
        if not await self._limiter.hit(self._limit, key):
            stats = await self._limiter.get_window_stats(self._limit, key)
            raise TooManyAttempts(max(1, math.ceil(stats.reset_time - time.time())))

    async def forget(self, *about: str) -> None:
        await self._limiter.clear(self._limit, _key(about))


def _key(about: tuple[str, ...]) -> str:
    """Return a short hash, from which no e-mail or client address can be read."""
    return hashlib.sha256(repr(about).encode(errors="replace")).hexdigest()
