"""Charges requests without a valid token to their client's address."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import QuotaExceeded
from web import problems
from web.paths import is_probe
from web.rate_limits import RateLimits
from web.request_state import state_of


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
            if "rate_limit" not in state_of(scope):
                try:
                    await self._rate_limits.count_address(scope)
                except QuotaExceeded as problem:
                    is_refused = True
                    await problems.render(scope, problem)(scope, receive, send)
            if not is_refused:
                await send(message)

        await self.app(scope, receive, send_if_admitted)
