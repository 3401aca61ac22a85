"""CORS for the configured origins: outermost, so that errors and crashes carry its headers too."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
from web import problems
from web.request_state import request_id

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


class PreflightRefused(errors.Problem):
    status = 400


class ProblemCORSMiddleware(CORSMiddleware):
    """Starlette's middleware, with problems for its refusals and an id in every preflight response."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=REQUEST_HEADERS,
            expose_headers=EXPOSED_HEADERS,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not any(name == b"origin" for name, _ in scope["headers"]):
            await self.app(scope, receive, _varying(send))  # not a CORS request
            return
        headers = Headers(scope=scope)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            answer = self._preflight(scope, headers)
            answer.headers["X-Request-ID"] = request_id(scope)
            await answer(scope, receive, send)
            return
        await self.simple_response(scope, receive, send, headers)

    @staticmethod
    def allow_explicit_origin(headers: MutableHeaders, origin: str) -> None:
        CORSMiddleware.allow_explicit_origin(headers, origin)
        headers.update(_CREDENTIALS)

    def _preflight(self, scope: Scope, headers: Headers) -> Response:
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


def _varying(send: Send) -> Send:
    """Tell caches that another origin may get other headers."""

    async def send_with_vary(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"vary", b"Origin")]
        await send(message)

    return send_with_vary
