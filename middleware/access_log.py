"""Gives every request an id, a log line and a measurement, and answers 500 when a handler crashes."""

import re
import time
from typing import Any
from urllib.parse import quote

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
from observability import logs, metrics
from web import problems
from web.request_state import request_id, state_of

PATH_LOGGED_MAX = 500
UNMATCHED = "unmatched"
# Version, trace, parent and flags (W3C Trace Context, section 3.2); a later version may append more.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


class AccessLogMiddleware:
    def __init__(self, app: ASGIApp, *, lines: bool = True, measures: bool = True) -> None:
        self.app = app
        self._lines, self._measures = lines, measures
        self._log = structlog.get_logger("access").bind()  # bound once: binding costs more than the line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        identifier = request_id(scope)
        logs.request_id.set(identifier)
        method, path = scope["method"], scope["path"]
        if self._measures:
            metrics.requests_in_flight.inc()
        status: int | None = None
        size_bytes = 0

        async def send_and_watch(message: Message) -> None:
            nonlocal status, size_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", identifier.encode()),
                    *state_of(scope).get("rate_limit", ()),  # here, so that crashes carry them too
                ]
            else:
                size_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_and_watch)
        except ClientDisconnect:
            status = 499  # nginx's code for a client that has disconnected
        except Exception:
            self._log.exception("crash", method=method, path=_plain(path), **_identity(scope))
            if status is not None:
                raise  # the response has begun, so the server must cut it off
            await problems.render(scope, errors.InternalError())(scope, receive, send_and_watch)
        finally:
            duration_s, route = time.perf_counter() - started, _route(scope)
            status = status or 499  # cancelled, because the client has disconnected
            if self._measures:
                metrics.requests_in_flight.dec()
                metrics.request_answered(route or UNMATCHED, method, status, duration_s)
            if self._lines:
                self._log.info(
                    "request",
                    method=method,
                    path=_plain(path),
                    route=route,
                    status=status,
                    duration_ms=round(duration_s * 1000, 2),
                    bytes=size_bytes,
                    **_identity(scope),
                )


def _route(scope: Scope) -> str | None:
    """Return the matched route's template with its prefix; None for static files or without a match."""
    context = scope.get("fastapi", {}).get("effective_route_context")
    return context.path_format if context else None


def _identity(scope: Scope) -> dict[str, Any]:
    """Return the request's id, the user of its verified token, and its trace id."""
    state = state_of(scope)
    identity: dict[str, Any] = {"request_id": state["request_id"]}
    if "user_id" in state:
        identity["user_id"] = state["user_id"]
    if trace_id := _trace_id(scope):
        identity["trace_id"] = trace_id
    return identity


def _trace_id(scope: Scope) -> str | None:
    sent = [value for name, value in scope["headers"] if name == b"traceparent"]
    if len(sent) != 1 or not (found := _TRACEPARENT.fullmatch(sent[0])):
        return None
    # In version 00 nothing may follow the flags.
    return None if sent[0].startswith(b"00") and found[2] else found[1].decode()


def _plain(path: str) -> str:
    """Return *path* shortened and quoted, so that it cannot control a terminal."""
    return quote(path[:PATH_LOGGED_MAX], safe="/:@!$&'()*+,;=-._~")
