"""Slashes of a path: an encoded one belongs to its part (`web/paths.py`), and one at the end means nothing.

`/api/alice/tasks/` is answered as `/api/alice/tasks`: a redirect would repeat the Host header that a stranger
sent. `/api/alice/tasks%0A` is nothing, though `$`, with which the patterns of the routes end, would take it.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

import errors
from web import paths, problems


class SlashesMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path is changed in place: the log reads the route that the router adds.
        if scope["type"] == "http":
            # The first test spares nearly every request the second.
            if b"%2" in scope["raw_path"] and b"%2F" in scope["raw_path"].upper():
                scope["path"] = paths.decode(scope["raw_path"])
            if scope["path"].endswith("/") and scope["path"] != "/":
                scope["path"] = scope["path"][:-1]
            if scope["path"].endswith("\n"):
                await problems.render(scope, errors.NotFound(errors.NOTHING_HERE))(scope, receive, send)
                return
        await self.app(scope, receive, send)
