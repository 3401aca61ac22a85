"""The front: what every request passes on its way to a route, and every answer on its way back.

A request: CORS preflight, id and clock, deadline, HEAD, host, slashes, then the route of the table or else
the framework's router. An answer: rate limit of the client's address, security headers, id, CORS headers.
One layer with one `send` costs a request a third of what eight layers do.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
from middleware.access_log import AccessLog, route_of
from middleware.allowed_hosts import AllowedHosts, WrongHost
from middleware.cors import CORS
from middleware.security_headers import security_headers
from web import paths, problems
from web.answers import JSONAnswer
from web.rate_limits import RateLimits
from web.request_state import headers_of, request_id, state_of
from web.route_table import RouteTable

CLIENT_GONE = 499  # as nginx has it: the client did not wait for the answer


class FrontMiddleware:
    """*hosts* are the accepted Host headers; none means that all are accepted."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        rate_limits: RateLimits,
        deadline_s: float,
        origins: Sequence[str] = (),
        hosts: Sequence[str] = (),
        access_log: AccessLog | None = None,
        routes: Sequence[BaseRoute] = (),
    ) -> None:
        self.app = app
        self.rate_limits = rate_limits
        self.deadline_s = deadline_s
        self.hosts = AllowedHosts(hosts) if hosts else None
        self.cors = CORS(origins)
        self.access_log = access_log or AccessLog()
        self.table = RouteTable(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        browser_headers = None
        if b"origin" in headers_of(scope):  # a browser
            browser_headers = Headers(scope=scope)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in browser_headers:
                answer = self.cors.preflight(scope, browser_headers)
                answer.headers["X-Request-ID"] = request_id(scope)
                await answer(scope, receive, send)
                return
        await _Exchange(self, scope, receive, send, browser_headers).run()


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        front: FrontMiddleware,
        scope: Scope,
        receive: Receive,
        send: Send,
        browser_headers: Headers | None,
    ) -> None:
        self._front, self._scope, self._receive, self._send = front, scope, receive, send
        self._browser_headers = browser_headers
        self._path: str = scope["path"]  # as it was sent: it is normalized later
        self._status = 0  # until an answer begins
        self._size = 0
        self._is_replaced = False  # what the application still says is not sent
        self._late: asyncio.Task[None] | None = None  # answers when the deadline has passed
        task = state_of(scope).get("task") or asyncio.current_task()
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._task: asyncio.Task[Any] = task

    async def run(self) -> None:
        front, scope = self._front, self._scope
        started = front.access_log.start(scope)
        # The application answers HEAD as GET. The server keeps its own scope, and sends no body.
        inner = scope
        if scope["method"] == "HEAD":
            inner = {**scope, "method": "GET"}
            state_of(scope)["is_head"] = True
        timer = self._task.get_loop().call_later(front.deadline_s, self._expire)
        try:
            try:
                await self._handle(inner)
            except asyncio.CancelledError:
                if self._late is None:
                    raise
                self._task.uncancel()
            finally:
                timer.cancel()
                if self._late is not None:
                    await self._late
        except ClientDisconnect:
            self._status = CLIENT_GONE
        except Exception:
            front.access_log.crashed(scope, self._path)
            if self._status:
                raise  # half an answer has left: the server must cut it off
            await self._refuse(errors.InternalError())
        finally:
            # Without a status it was cancelled: the client has gone.
            status = self._status or CLIENT_GONE
            front.access_log.answered(scope, self._path, route_of(inner), status, self._size, started)

    async def _handle(self, scope: Scope) -> None:
        front = self._front
        if front.hosts and not paths.is_probe(scope["raw_path"]) and not front.hosts.admit(scope):
            await self._refuse(WrongHost())
            return
        if not paths.normalize(scope):
            await problems.render(scope, errors.NotFound(errors.NOTHING_HERE))(
                scope, self._receive, self._charge_and_send
            )
            return
        route = front.table.find(scope)
        if route is None:
            await front.app(scope, self._receive, self._charge_and_send)
            return
        try:
            response = await route.answer(Request(scope, self._receive))
        except problems.KNOWN as error:
            response = problems.answer(scope, error)
        if type(response) is JSONAnswer and self._scope["method"] != "HEAD":
            await self._send_whole(response)
        else:
            await response(scope, self._receive, self._charge_and_send)

    async def _send_whole(self, response: JSONAnswer) -> None:
        """Do what calling *response* does with fewer coroutines, and in one call where the server can."""
        if self._is_replaced or await self._is_over_limit():
            return
        start = {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
        self._add_headers(start)
        self._size += len(response.body)
        if send_whole := state_of(self._scope).get("send_whole"):
            await send_whole(start, bytes(response.body))
        else:
            await self._send(start)
            await self._send({"type": "http.response.body", "body": response.body})

    async def _charge_and_send(self, message: Message) -> None:
        """Charge the request once its answer begins, and send it unless a 429 or 503 has taken its place."""
        if self._is_replaced:
            return
        if message["type"] == "http.response.start" and await self._is_over_limit():
            return
        await self._add_headers_and_send(message)

    async def _is_over_limit(self) -> bool:
        """Charge the request to its address, unless a user was charged; beyond the limit, answer 429."""
        scope = self._scope
        if "rate_limit" in state_of(scope) or paths.is_probe(scope["raw_path"]):
            return False
        try:
            await self._front.rate_limits.count_address(scope)
        except errors.QuotaExceeded as problem:
            self._is_replaced = True
            await self._refuse(problem)
            return True
        return False

    async def _add_headers_and_send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._add_headers(message)
        elif self._scope["method"] == "HEAD":
            message = {**message, "body": b""}
        else:
            self._size += len(message.get("body", b""))
        await self._send(message)

    def _add_headers(self, start: Message) -> None:
        scope = self._scope
        self._status = start["status"]
        own = start.get("headers", ())
        identifier = (b"x-request-id", request_id(scope).encode())
        limits = state_of(scope).get("rate_limit", ())
        security = security_headers(scope["scheme"], self._path, own)
        start["headers"] = [*own, *security, identifier, *limits]
        self._front.cors.add_headers(start, self._browser_headers)

    async def _refuse(self, problem: errors.Problem) -> None:
        response = problems.render(self._scope, problem)
        await response(self._scope, self._receive, self._add_headers_and_send)

    def _expire(self) -> None:
        """Answer 503 and cancel the handler. An answer that has begun is bounded by the server."""
        if not self._status:
            self._is_replaced = True
            self._late = asyncio.ensure_future(self._refuse(errors.Unavailable()))
            self._task.cancel()
