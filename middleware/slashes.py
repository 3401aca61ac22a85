"""Slashes of a path: an encoded one belongs to its part (`web/paths.py`), and one at the end is ignored.

`/api/alice/tasks/` is answered like `/api/alice/tasks`, because a redirect would repeat the client's Host
header. `/api/alice/tasks%0A` is a 404, although the `$` that ends the routes' patterns would match it.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

import errors
from web import paths, problems


class SlashesMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The scope is changed in place, because the access log reads the route that the router adds to it.
        if scope["type"] == "http":
            # The first test is cheap and usually false.
            if b"%2" in scope["raw_path"] and b"%2F" in scope["raw_path"].upper():
                scope["path"] = paths.decode(scope["raw_path"])
            if scope["path"].endswith("/") and scope["path"] != "/":
                scope["path"] = scope["path"][:-1]
            if scope["path"].endswith("\n"):
                await problems.render(scope, errors.NotFound(errors.NOTHING_HERE))(scope, receive, send)
                return
        await self.app(scope, receive, send)
