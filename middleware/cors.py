"""CORS for the configured origins: every answer carries its headers, errors and crashes too."""

from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

import errors
from web import problems

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "Prefer",
    "X-Request-ID",
    "traceparent",
)
EXPOSED_HEADERS = (
    "ETag",
    "Location",
    "Link",
    "X-Total-Count",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-ID",
    "Idempotent-Replayed",
    "set-auth-jwt",
    "set-auth-token",
)


# Better Auth's client always includes credentials, for which browsers require this. We read no cookies.
_CREDENTIALS = {"Access-Control-Allow-Credentials": "true"}
_VARY = (b"vary", b"Origin")  # tells caches that another origin may get other headers


class PreflightRefused(errors.Problem):
    status = 400


class CORS(CORSMiddleware):
    """Starlette's CORS rules, with refusals as problems. The front calls it; it wraps no application."""

    def __init__(self, origins: Sequence[str]) -> None:
        super().__init__(
            _no_app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=REQUEST_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )

    def add_headers(self, message: Message, request_headers: Headers | None) -> None:
        """Add the CORS headers to the start of an answer; *request_headers* are those of a browser."""
        if request_headers is None:
            message["headers"].append(_VARY)
            return
        headers = MutableHeaders(scope=message)
        headers.update(self.simple_headers)
        origin = request_headers["origin"]
        if not self.allow_all_origins and self.is_allowed_origin(origin=origin):
            self.allow_explicit_origin(headers, origin)
            headers.update(_CREDENTIALS)
        else:
            headers["Vary"] = ", ".join([*headers.getlist("Vary"), "Origin"])

    def preflight(self, scope: Scope, headers: Headers) -> Response:
        answer = self.preflight_response(headers)
        if answer.status_code < 400:
            if answer.headers["access-control-allow-origin"] != "*":
                answer.headers.update(_CREDENTIALS)
            return answer
        refusal = problems.render(scope, PreflightRefused(bytes(answer.body).decode()))
        for name in ("vary", "access-control-allow-origin"):
            if name in answer.headers:
                refusal.headers[name] = answer.headers[name]
        return refusal


async def _no_app(_scope: Scope, _receive: Receive, _send: Send) -> None:
    raise NotImplementedError
