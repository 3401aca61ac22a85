"""`/api/alice/tasks/` is `/api/alice/tasks`: answered as such, without a redirect.

A redirect would repeat the Host header that a stranger sent. `/api/alice/tasks%0A` is nothing, though `$`,
with which the patterns of the routes end, would take it.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

import errors


class TrailingSlashMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"].endswith("/") and scope["path"] != "/":
                scope["path"] = scope["path"][:-1]  # in place: the log reads the route that the router adds
            if scope["path"].endswith("\n"):
                await errors.render(scope, errors.NotFound(errors.NOTHING_HERE))(scope, receive, send)
                return
        await self.app(scope, receive, send)
