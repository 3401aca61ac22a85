"""Slashes of a path: an encoded one belongs to its part, and one at the end means nothing.

`/api/a%2Fb/tasks` has the tasks of the user `a/b`. The server decodes a path whole, after which `%2F` looks
like any other slash (RFC 3986, section 2.2).

`/api/alice/tasks/` is answered as `/api/alice/tasks`: a redirect would repeat the Host header that a stranger
sent. `/api/alice/tasks%0A` is nothing, though `$`, with which the patterns of the routes end, would take it.
"""

from urllib.parse import quote, unquote

from starlette.convertors import StringConvertor
from starlette.types import ASGIApp, Receive, Scope, Send

import errors

# Stands for an encoded slash until the path has been split. No client can send it: bytes that are not UTF-8
# are decoded as U+FFFD.
SLASH = "\udc2f"


class SlashesMiddleware:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path is changed in place: the log reads the route that the router adds.
        if scope["type"] == "http":
            # The first test spares nearly every request the second.
            if b"%2" in scope["raw_path"] and b"%2F" in scope["raw_path"].upper():
                parts = scope["raw_path"].decode("latin-1").split("/")
                scope["path"] = "/".join(unquote(part).replace("/", SLASH) for part in parts)
            if scope["path"].endswith("/") and scope["path"] != "/":
                scope["path"] = scope["path"][:-1]
            if scope["path"].endswith("\n"):
                await errors.render(scope, errors.NotFound(errors.NOTHING_HERE))(scope, receive, send)
                return
        await self.app(scope, receive, send)


class PartConvertor(StringConvertor):
    """A part of the path, in which slashes may be."""

    def convert(self, value: str) -> str:
        return value.replace(SLASH, "/")


def quoted_path(scope: Scope) -> str:
    """Return the path of *scope* as a client has to send it."""
    return "%2F".join(quote(part) for part in scope["path"].split(SLASH))
