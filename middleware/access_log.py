"""One line and one measurement for every request."""

import logging
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import structlog
from msgspec import UNSET, Struct, UnsetType, to_builtins
from starlette.types import Scope

from observability import logs, metrics
from web.request_state import header_values, headers_of, request_id, state_of

PATH_LOGGED_MAX = 500
UNMATCHED = "unmatched"
_UNQUOTED = "/:@!$&'()*+,;=-._~"
_IS_PLAIN = re.compile(rf"[A-Za-z0-9{re.escape(_UNQUOTED)}]*").fullmatch
# Version, trace, parent and flags (W3C Trace Context, section 3.2); a later version may append more.
_TRACEPARENT = re.compile(
    rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


class Line(Struct):
    """A line of the access log; its fields are its members in JSON."""

    method: str
    path: str
    route: str | None
    status: int
    duration_ms: float
    bytes: int
    request_id: str
    user_id: str | UnsetType
    trace_id: str | UnsetType
    event: str
    level: str
    timestamp: datetime


class AccessLog:
    def __init__(self, *, lines: bool = True, measures: bool = True) -> None:
        self._log = structlog.get_logger("access").bind()  # bound once: binding costs more than the line
        self._lines = lines and self._log.is_enabled_for(logging.INFO)
        self._measures = measures
        self._write = getattr(self._log, "write_soon", self._write_now)  # only JSON has the former

    def start(self, scope: Scope) -> float:
        """Count the request of *scope* as in flight and return when it began."""
        logs.request_id.set(request_id(scope))
        if self._measures:
            metrics.in_flight.number += 1
        return time.perf_counter()

    def crashed(self, scope: Scope, path: str) -> None:
        """Log the exception that is being handled."""
        self._log.exception("crash", method=scope["method"], path=_plain(path), **_identity(scope))

    def answered(
        self, scope: Scope, path: str, route: str | None, status: int, size_bytes: int, started: float
    ) -> None:
        """Measure the request and write its line; *path* is as the client sent it."""
        duration_s = time.perf_counter() - started
        if self._measures:
            metrics.in_flight.number -= 1
            until_stream_s = state_of(scope).get("streams_since", started + duration_s) - started
            metrics.request_answered(route or UNMATCHED, scope["method"], status, until_stream_s)
        if self._lines:
            self._write(_render, (scope, path, route, status, size_bytes, duration_s, time.time()))

    def _write_now(self, _: Callable[..., bytes], answer: tuple[Any, ...]) -> None:
        values = to_builtins(_line(*answer))
        del values["level"], values["timestamp"]  # the console's processors add their own
        self._log.info(values.pop("event"), **values)


def _render(answer: tuple[Any, ...]) -> bytes:
    return logs.encode(_line(*answer))


def _line(
    scope: Scope, path: str, route: str | None, status: int, size_bytes: int, duration_s: float, at: float
) -> Line:
    state = state_of(scope)
    return Line(
        scope["method"],
        _plain(path),
        route,
        status,
        int(duration_s * 100_000 + 0.5) / 100,  # `round` takes four times as long
        size_bytes,
        state["request_id"],
        state.get("user_id", UNSET),
        _trace_id(scope) or UNSET,
        "request",
        "info",
        datetime.fromtimestamp(at, UTC),
    )


def route_of(scope: Scope) -> str | None:
    """Return the template of the route that was chosen, its prefix included; None for static files too."""
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
    if b"traceparent" not in headers_of(scope):
        return None
    sent = header_values(scope, b"traceparent")
    if len(sent) != 1 or not (found := _TRACEPARENT.fullmatch(sent[0])):
        return None
    # In version 00 nothing may follow the flags.
    return None if sent[0].startswith(b"00") and found[2] else found[1].decode()


def _plain(path: str) -> str:
    """Return *path* shortened and quoted, so that it cannot control a terminal."""
    path = path[:PATH_LOGGED_MAX]
    return path if _IS_PLAIN(path) else quote(path, safe=_UNQUOTED)  # `quote` takes 1 µs even for a plain one
