"""Charges requests without a valid token to their client's address."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import QuotaExceeded
from web import problems
from web.paths import is_probe
from web.rate_limits import RateLimits
from web.request_state import state_of


class RateLimitMiddleware:
    """Charges a request to its client's address unless it was charged to a user, i.e. had a valid token.

    Expensive requests, above all those with a password, are counted by their routes before the work begins.
    The access log writes the headers, because it also answers crashes.
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
