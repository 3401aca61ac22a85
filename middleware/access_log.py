"""An id for every request, one line about it, and the last word when a handler crashes."""

import time
from urllib.parse import quote

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors

PATH_LOGGED_MAX = 500


class AccessLogMiddleware:
    def __init__(self, app: ASGIApp, *, lines: bool = True) -> None:
        self.app = app
        self._lines = lines
        self._log = structlog.get_logger("access").bind()  # bound once: it costs more than the line

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = errors.request_id(scope)
        status: int | None = None
        size_bytes = 0

        async def send_and_watch(message: Message) -> None:
            nonlocal status, size_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *scope["state"].get("rate_limit", ()),  # here, so that crashes carry them too
                ]
            else:
                size_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_and_watch)
        except ClientDisconnect:
            status = 499  # as nginx says it: there is nobody left to answer
        except Exception:
            self._log.exception(
                "crash", request_id=request_id, method=scope["method"], path=_plain(scope["path"])
            )
            if status is not None:
                raise  # half an answer has left: the server must cut it off
            await errors.render(scope, errors.InternalError())(scope, receive, send_and_watch)
        finally:
            if self._lines:
                self._write_line(scope, request_id, status, time.perf_counter() - started, size_bytes)

    def _write_line(
        self, scope: Scope, request_id: str, status: int | None, duration_s: float, size_bytes: int
    ) -> None:
        self._log.info(
            "request",
            request_id=request_id,
            method=scope["method"],
            path=_plain(scope["path"]),
            status=status,
            duration_ms=round(duration_s * 1000, 2),
            bytes=size_bytes,
        )


def _plain(path: str) -> str:
    """Return *path* in characters that no terminal obeys, and not too many of them."""
    return quote(path[:PATH_LOGGED_MAX], safe="/:@!$&'()*+,;=-._~")
