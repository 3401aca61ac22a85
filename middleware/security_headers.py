"""Response headers that restrict what browsers may do."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_POLICY = b"content-security-policy"
HSTS = (b"strict-transport-security", b"max-age=31536000")  # a year; subdomains may not be ours
NO_STORE = (b"cache-control", b"no-store")
NOTHING = (CONTENT_POLICY, b"default-src 'none'; frame-ancestors 'none'")
ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
)


class SecurityHeadersMiddleware:
    """Adds them to every response. A page brings its own content policy; everything else may load nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        added = _ADDED[scope["scheme"] == "https", scope["path"].startswith("/api/")]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = message.get("headers", ())
                brings_policy = any(name == CONTENT_POLICY for name, _ in own)
                message["headers"] = [*own, *added] if brings_policy else [*own, *added, NOTHING]
            await send(message)

        await self.app(scope, receive, send_with_headers)


# By whether the request came by https, and whether its path is below /api/: tasks and accounts are private.
_ADDED = {
    (is_https, is_private): ALWAYS + (HSTS,) * is_https + (NO_STORE,) * is_private
    for is_https in (False, True)
    for is_private in (False, True)
}
