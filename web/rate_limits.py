"""Rate limits of users, and of addresses without a valid token: `RateLimit` headers, and 429 beyond them."""

import math
import time
from zlib import crc32

import limits
from limits.aio.storage import Storage
from starlette.types import Scope

from errors import QuotaExceeded
from observability import metrics
from web.client_addresses import client_address
from web.counters import LocalStorage
from web.request_state import state_of


class Limit:
    """A fixed window for each key, reported as in draft-ietf-httpapi-ratelimit-headers-10.

    Windows follow the clock, shifted by the key. So one call of the storage is enough, all processes agree,
    and clients do not all return in the same second.
    """

    def __init__(self, name: str, text: str, storage: Storage) -> None:
        item = limits.parse(text)
        self._name, self._limit, self._window_s = name, item.amount, item.get_expiry()
        self._storage = storage
        self._add = storage.add if isinstance(storage, LocalStorage) else None
        self._policy = (b"ratelimit-policy", f'"{name}";q={self._limit};w={self._window_s}'.encode())

    async def count(self, scope: Scope, key: str) -> None:
        """Count the request of *scope*, and report in its answer's headers what is left.

        Raises:
            QuotaExceeded: nothing was left.
        """
        window, passed_s = divmod(time.time() + crc32(key.encode()), self._window_s)
        left_s = self._window_s - passed_s
        if self._add:  # without a coroutine, in one entry per key, which expires with its window
            number = self._add(f"{self._name}/{key}", left_s)
        else:  # a Redis counts in whole seconds, so the key names the window
            number = await self._storage.incr(f"{self._name}/{key}/{window:.0f}", self._window_s)
        left, reset_s = max(0, self._limit - number), math.ceil(left_s)
        told = f'"{self._name}";r={left};t={reset_s}'.encode()
        state_of(scope)["rate_limit"] = (self._policy, (b"ratelimit", told))
        if number > self._limit:
            metrics.rate_limited(self._name)
            raise QuotaExceeded(self._name, retry_after_s=reset_s)


class RateLimits:
    """The limit of a user and that of an address; `off` is none."""

    def __init__(self, storage: Storage, *, user: str, anonymous: str) -> None:
        self._user = Limit("user", user, storage) if user != "off" else None
        self._anonymous = Limit("anonymous", anonymous, storage) if anonymous != "off" else None

    async def count_user(self, scope: Scope, user_id: str) -> None:
        """Count a request with a valid token.

        Raises:
            QuotaExceeded: the user has sent too many.
        """
        state_of(scope)["rate_limit"] = ()
        if self._user:
            await self._user.count(scope, user_id)

    async def count_address(self, scope: Scope) -> None:
        """Count a request without a valid token.

        Raises:
            QuotaExceeded: too many came from its address.
        """
        state_of(scope)["rate_limit"] = ()
        if self._anonymous:
            await self._anonymous.count(scope, client_address(scope))
