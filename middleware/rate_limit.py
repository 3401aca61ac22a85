"""How often a user, or an address without a valid token, may ask: `RateLimit` headers, and 429 beyond it."""

import math
import time
from zlib import crc32

import limits
from limits.aio.storage import Storage
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
import metrics
from connections import client_of
from errors import QuotaExceeded
from readiness import is_probe


class Limit:
    """A fixed window for each key, as draft-ietf-httpapi-ratelimit-headers-10 tells of it.

    Windows begin by the clock, shifted by the key: one call of the storage is enough, all processes agree
    without asking, and not everybody comes back in the same second.
    """

    def __init__(self, name: str, text: str, storage: Storage) -> None:
        item = limits.parse(text)
        self._name, self._most, self._window_s = name, item.amount, item.get_expiry()
        self._storage = storage
        self._policy = (b"ratelimit-policy", f'"{name}";q={self._most};w={self._window_s}'.encode())

    async def count(self, scope: Scope, key: str) -> None:
        """Count the request of *scope*, whose answer will say what is left.

        Raises:
            QuotaExceeded: nothing was left.
        """
        window, passed_s = divmod(time.time() + crc32(key.encode()), self._window_s)
        number = await self._storage.incr(f"{self._name}/{key}/{window:.0f}", self._window_s)
        left, reset_s = max(0, self._most - number), math.ceil(self._window_s - passed_s)
        told = f'"{self._name}";r={left};t={reset_s}'.encode()
        scope["state"]["rate_limit"] = (self._policy, (b"ratelimit", told))
        if number > self._most:
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
        scope["state"]["rate_limit"] = ()
        if self._user:
            await self._user.count(scope, user_id)

    async def count_address(self, scope: Scope) -> None:
        """Count a request without one.

        Raises:
            QuotaExceeded: too many came from its address.
        """
        scope["state"]["rate_limit"] = ()
        if self._anonymous:
            await self._anonymous.count(scope, client_address(scope))


class RateLimitMiddleware:
    """Counts a request for its client's address, unless it was counted for a user: it had no valid token.

    What costs more than an answer, a password above all, counts itself before it begins. The headers are
    written by the access log, which also answers crashes.
    """

    def __init__(self, app: ASGIApp, rate_limits: RateLimits) -> None:
        self.app = app
        self._rate_limits = rate_limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_probe(scope["raw_path"]):
            await self.app(scope, receive, send)
            return
        is_refused = False

        async def send_if_admitted(message: Message) -> None:
            nonlocal is_refused
            if "rate_limit" not in scope["state"]:
                try:
                    await self._rate_limits.count_address(scope)
                except QuotaExceeded as problem:
                    is_refused = True
                    await errors.render(scope, problem)(scope, receive, send)
            if not is_refused:
                await send(message)

        await self.app(scope, receive, send_if_admitted)


def client_address(scope: Scope) -> str:
    """Return the address that a request counts for: IPv4, or the /64 of an IPv6 one."""
    return client_of(scope["client"][0]) if scope.get("client") else ""
