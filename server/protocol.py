"""One HTTP/1.1 connection: limits and timeouts of its requests, refusals as problems, an orderly end."""

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

import errors
from observability.logs import BoundedLog
from server import heads
from server.connections import Connections
from server.heads import (
    FIELDS_MAX,
    HEAD_MAX_BYTES,
    ConnectNotImplemented,
    HeadTimeout,
    HeadTooLarge,
    MalformedRequest,
)
from server.sender import Sender
from web import problems
from web.client_addresses import client_of
from web.request_state import request_id, state_of

HEAD_TIMEOUT_S = 10.0
# Longer than proxies keep idle connections (nginx: 60 s). A POST that meets the end of one cannot be retried.
PROXY_KEEP_ALIVE_S = 75
DRAIN_S = 1.0  # keep-alive clients may already have sent a request before they see `Connection: close`
LINGER_S = 1.0  # for a client that is still sending
CANCEL_DELAY_S = 0.1  # nearly finished work finishes by then, and keeps its database connection
STALL_CHECK_S = 5.0  # between two checks of the bytes that a client has not read
WRITE_BUFFER_MAX_BYTES = 16 * 1024  # with more unread, no further request of the connection is answered
PIPELINED_MAX = 20  # requests that wait for an answer on one connection; each takes about 3 KB
OVERLOADED_PAUSE_S = 1.0  # as Retry-After says; refusing a request costs as much as serving it

_log = BoundedLog("http")


class TooManyPipelined(errors.TooManyRequests):
    sentence = f"Over {PIPELINED_MAX} requests wait for an answer on this connection"

    def __init__(self) -> None:
        super().__init__(retry_after_s=1)


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, hardened against hostile and broken clients."""

    def __init__(self, *args: Any, connections: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._connections = connections
        self._release: Callable[[], None] | None = None  # undoes what `connections` has counted
        self._is_proxied = False
        self._in_body = False
        self._received_bytes = 0  # raw, since the last complete head
        self._head_bytes = self._fields = 0  # of the message so far, trailers included
        self._is_upgrade = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._refusal: bytes | None = None
        self._application = self.app
        self.app = self._answer
        self._answering: asyncio.Task[Any] | None = None
        self._answered: Any = None  # the cycle that `_answering` works on

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        transport.set_write_buffer_limits(WRITE_BUFFER_MAX_BYTES)
        self._is_proxied = self.client is None or self._connections.is_proxy(self.client[0])
        if self._is_proxied:
            self.timeout_keep_alive = PROXY_KEEP_ALIVE_S
        client = None if self.client is None or self._is_proxied else client_of(self.client[0])
        try:
            self._connections.add(client)
        except errors.Problem as problem:
            if self._connections.add_refused():
                self._release = self._connections.remove_refused
                self._refuse(problem)
            else:
                transport.abort()
            return
        self._release = partial(self._connections.remove, client)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._connections.remove_unread(self.transport)
        if self._release is not None:
            self._release()
        super().connection_lost(exc)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._answering is not None:
            self._disconnect(self._answered)  # uvicorn tells only the last of several requests
            self.loop.call_later(CANCEL_DELAY_S, self._answering.cancel)
        self.app = self._application  # else a reference cycle keeps the last head until a garbage collection

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()
        self._connections.add_unread(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_writing()  # the client reads, even if an answer refills the buffer before the next check
        self._connections.remove_unread(self.transport)
        if self.pipeline and (self._answered is None or self._answered.response_complete):
            self._start_asgi_task(*self.pipeline.pop())

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()  # the client may still have to read the last answer

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            return
        self._unset_keepalive_if_required()
        if not self._in_body:
            self._received_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            problem = error.__context__  # raised by one of the callbacks below
            self._refuse(problem if isinstance(problem, errors.Problem) else MalformedRequest())
            return
        if self._received_bytes > HEAD_MAX_BYTES:
            self._refuse(HeadTooLarge())
        elif self._is_idle():  # the head has not ended yet
            self._start_timer()

    def on_message_begin(self) -> None:
        self._head_bytes = self._fields = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._head_bytes += len(url)
        if self._head_bytes > HEAD_MAX_BYTES:
            raise HeadTooLarge
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._head_bytes += len(name) + len(value)
        if self._fields > FIELDS_MAX or self._head_bytes > HEAD_MAX_BYTES:
            raise HeadTooLarge
        if not self._in_body:  # trailers are ignored (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ConnectNotImplemented
            self._is_upgrade = True
            return
        version = self.parser.get_http_version()
        heads.check(self.headers, version)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
        if not self.url.startswith(b"/") and self.url != b"*":
            host, self.url = heads.split_target(self.url)
            self.headers[:] = [field for field in self.headers if field[0] != b"host"] + [(b"host", host)]
        if len(self.pipeline) >= PIPELINED_MAX:
            raise TooManyPipelined
        super().on_headers_complete()
        self._in_body, self._received_bytes = True, 0
        self._stop_timer()
        if self._draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._answered.body.clear()  # the handler may not have read it, and the connection may stay open
        is_overloaded = state_of(self._answered.scope).get("overloaded")
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()
        if self._refusal and self._is_idle():
            self._send_refusal()
            return
        # A proxy sends other clients' requests on the same connection, and these must not wait.
        if is_overloaded and not self._is_proxied and not self.transport.is_closing():
            self.flow.pause_reading()
            self.loop.call_later(OVERLOADED_PAUSE_S, self._resume)

    def shutdown(self) -> None:
        """Answer the requests received so far and within `DRAIN_S`, and then close."""
        self._draining = True
        if self._is_idle():
            self.loop.call_later(DRAIN_S, self._close_if_idle)
        else:
            self.cycle.keep_alive = False

    def _feed(self, data: bytes) -> None:
        """Parse *data*. A request to upgrade is parsed again without the upgrade (RFC 9110, section 7.8).

        llhttp ends such a message at its head and leaves the rest to the new protocol. There is none here, so
        the body would be read as the next request.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._is_upgrade = False
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        parser = self.parser
        line = b"%s %s HTTP/%s\r\n" % (parser.get_method(), self.url, parser.get_http_version().encode())
        fields = (b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade")
        return line + b"".join(fields) + b"\r\n"

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if self.flow.write_paused:  # the client does not read; `resume_writing` continues
            self.pipeline.append((cycle, app))
            self.flow.pause_reading()
            return
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    async def _answer(self, scope: Any, receive: Any, _send: Any) -> None:
        """Run the application; it is cancelled when the client disconnects."""
        if self._answered.disconnected:  # or its body was malformed
            return
        task = asyncio.current_task(self.loop)
        assert task is not None  # noqa: S101 - a coroutine runs in a task
        self._answering = task
        state = state_of(scope)
        state["task"], state["body_received"] = task, not self._answered.more_body
        sender = Sender(self._answered)
        state["send_whole"] = sender.send_whole
        try:
            await self._application(scope, receive, sender)
        except asyncio.CancelledError:
            if not self.transport.is_closing():
                raise
        finally:
            del state["send_whole"]  # they refer to each other: only the garbage collector could free them
            await sender.begin()  # a start without a body: uvicorn then closes the connection
            if self._answering is task:  # else the next request has begun
                self._answering = None

    def _is_idle(self) -> bool:
        """Return whether no request is being answered or waits for an answer."""
        return self.cycle is None or self.cycle.response_complete

    def _disconnect(self, cycle: Any) -> None:
        """Tell the handler of *cycle* that its client is gone."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _watch_writing(self, stalled_s: float = 0.0) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        left = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(
            STALL_CHECK_S, self._check_writing, left, stalled_s + STALL_CHECK_S
        )

    def _check_writing(self, before: int, stalled_s: float) -> None:
        left = self.transport.get_write_buffer_size()
        if not left:
            return
        if left < before:
            self._watch_writing()
        elif stalled_s < self._connections.stall_timeout_s:
            self._watch_writing(stalled_s)
        else:
            _log.warning("connection ended", reason="its client does not read")
            self.transport.abort()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._on_head_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_head_timeout(self) -> None:
        self._timer = None
        if self._received_bytes:
            self._refuse(HeadTimeout())
        elif not self.transport.is_closing():
            self.transport.close()  # it has sent nothing, or still sends a body that no handler reads
            self._watch_writing()

    def _close_if_idle(self) -> None:
        if self._is_idle() and not self.transport.is_closing():
            self.transport.close()

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _refuse(self, problem: errors.Problem) -> None:
        """Answer with *problem*, after the earlier requests, and close."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        # A malformed body belongs to a request with an id; a malformed head has no request yet.
        scope: Any = self.cycle.scope if self._in_body else {"headers": []}
        _log.warning("request refused", reason=type(problem).__name__, request_id=request_id(scope))
        self._refusal = _render(scope, problem)
        # Frees the head, which may be large, as the client may be slow to read the refusal.
        self.parser = self.scope = self.headers = None  # type: ignore[assignment] # as in uvicorn
        if self._in_body and self._is_idle():
            self.transport.close()  # the request has its answer already
            return
        if self._in_body:
            self._give_up_last()
        if self._is_idle() or self.cycle.disconnected:
            self._send_refusal()

    def _give_up_last(self) -> None:
        """Give up the request whose body cannot be read."""
        if self.cycle is not self._answered:
            self.pipeline = deque(waiting for waiting in self.pipeline if waiting[0] is not self.cycle)
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answered
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._disconnect(self.cycle)

    def _send_refusal(self) -> None:
        if self.transport.is_closing() or self._refusal is None:
            return
        self.transport.write(self._refusal)
        # Closing while data arrives would reset the connection and lose the answer.
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
        self._watch_writing()  # closing waits for the client to read


def _render(scope: Any, problem: errors.Problem) -> bytes:
    answer = problems.render(scope, problem)
    fields = [*answer.raw_headers, (b"x-request-id", request_id(scope).encode())]
    head = b"".join(b"%s: %s\r\n" % field for field in (*fields, (b"connection", b"close")))
    return STATUS_LINE[problem.status] + head + b"\r\n" + bytes(answer.body)
