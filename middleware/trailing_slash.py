"""`/api/alice/tasks/` is `/api/alice/tasks`: answered as such, without a redirect.

A redirect would repeat the Host header that a stranger sent.
"""

from starlette.types import ASGIApp, Receive, Scope, Send


class TrailingSlashMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/") and scope["path"] != "/":
            scope["path"] = scope["path"][:-1]  # in place: the log reads the route that the router adds
        await self.app(scope, receive, send)
