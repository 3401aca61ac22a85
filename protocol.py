"""One HTTP/1.1 connection: heads of bounded size and time, refusals as problems, an orderly end."""

import asyncio
from collections import deque
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

import errors
from logs import BoundedLog

HEAD_MAX_BYTES = 64 * 1024  # four times the largest token
HEAD_TIMEOUT_S = 10.0
DRAIN_S = 1.0  # a client that has just been told nothing may have sent its next request already
LINGER_S = 1.0  # for a client that is still sending
HANG_UP_S = 0.1  # what is nearly done is done by then, and keeps its database connection
STALL_S = 30.0  # for a client that does not read: less than 48 KiB in this time is given up
OVERLOADED_PAUSE_S = 1.0  # as Retry-After asks: who asks again at once costs as much as who is served

_log = BoundedLog("http")


class MalformedRequest(errors.Problem):
    status = 400
    sentence = "This is not an HTTP request that can be understood"


class HeadTooLarge(errors.Problem):
    status = 431
    sentence = f"The request's head is larger than {HEAD_MAX_BYTES // 1024} KiB"


class HeadTimeout(errors.Problem):
    status = 408
    sentence = "The request's head did not arrive in time"


class Protocol(HttpToolsProtocol):
    """uvicorn's protocol, for clients that mean no good or know no better."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_body = False
        self._received_bytes = 0  # since the last head was complete, as they came
        self._head_bytes = 0  # of this head, as they were read
        self._hosts = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._refusal: errors.Problem | None = None
        self._application = self.app
        self.app = self._answer
        self._answering: asyncio.Task[Any] | None = None
        self._answered: Any = None  # the cycle of that task

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        if self._answering is not None:
            self._disconnect(self._answered)  # uvicorn tells the last of several requests only
            self.loop.call_later(HANG_UP_S, self._answering.cancel)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()  # what is closing has yet to be read

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            return
        self._unset_keepalive_if_required()
        if self._is_free():
            self._start_timer()
        if not self._in_body:
            self._received_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # there is nothing to upgrade to; the request is answered as it is
        except httptools.HttpParserError:
            self._refuse(HeadTooLarge() if self._head_bytes > HEAD_MAX_BYTES else MalformedRequest())
            return
        if self._received_bytes > HEAD_MAX_BYTES:
            self._refuse(HeadTooLarge())

    def on_message_begin(self) -> None:
        self._head_bytes = self._hosts = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if len(name) == 4 and name.lower() == b"host":
            self._hosts += 1
            if self._hosts > 1:  # RFC 9112, section 3.2: which one is meant?
                raise ValueError
        if not self._in_body:  # a trailer is no header (RFC 9110, section 6.5.1)
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body, self._received_bytes = True, 0
        self._stop_timer()
        super().on_headers_complete()
        if self._draining:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_writing()
        if self._refusal and self._is_free():
            self._send_refusal(self._refusal)
            return
        if self.scope.get("state", {}).get("overloaded") and not self.transport.is_closing():
            self.flow.pause_reading()
            self.loop.call_later(OVERLOADED_PAUSE_S, self._resume)

    def shutdown(self) -> None:
        """Answer what has been asked, and what is asked within `DRAIN_S`, and then close."""
        self._draining = True
        if self._is_free():
            self.loop.call_later(DRAIN_S, self._close_if_free)
        else:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, unless the client hangs up: what is done for it is cancelled then."""
        self._answering = task = asyncio.current_task()
        try:
            await self._application(scope, receive, send)
        except asyncio.CancelledError:
            if not self.transport.is_closing():
                raise
        finally:
            if self._answering is task:  # and not the next one's already
                self._answering = None

    def _is_free(self) -> bool:
        """Whether no request is being answered, or waits for that."""
        return self.cycle is None or self.cycle.response_complete

    def _disconnect(self, cycle: Any) -> None:
        """Tell who answers that nobody listens any more."""
        cycle.disconnected = True
        cycle.message_event.set()

    def _watch_writing(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
        left = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_S, self._check_writing, left)

    def _check_writing(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left >= before > 0:
            _log.warning("connection ended", reason="its client does not read")
            self.transport.abort()
        elif left:
            self._watch_writing()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_MAX_BYTES:
            raise ValueError  # ends the parser

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._is_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        self._timer = None
        if self._received_bytes:
            self._refuse(HeadTimeout())
        elif not self.transport.is_closing():
            self.transport.close()  # it has said nothing, or goes on with a body that nobody reads

    def _close_if_free(self) -> None:
        if self._is_free() and not self.transport.is_closing():
            self.transport.close()

    def _resume(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _refuse(self, problem: errors.Problem) -> None:
        """Answer with *problem*, after what has been asked before, and close."""
        self._stop_timer()
        self._refusal = problem
        if self.transport.is_closing():
            return
        _log.warning("request refused", reason=type(problem).__name__)
        if self._in_body and not self._is_free():
            self._give_up_last()
        if self._is_free() or self.cycle.disconnected:
            self._send_refusal(problem)

    def _give_up_last(self) -> None:
        """Give up the request whose body cannot be read."""
        if self.cycle is not self._answered:
            self.pipeline = deque(waiting for waiting in self.pipeline if waiting[0] is not self.cycle)
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answered
        elif self.cycle.response_started:
            self.transport.close()
        else:
            self._disconnect(self.cycle)

    def _send_refusal(self, problem: errors.Problem) -> None:
        if self.transport.is_closing():
            return
        scope: Any = {"headers": []}
        answer = errors.render(scope, problem)
        fields = [*answer.raw_headers, (b"x-request-id", errors.request_id(scope).encode())]
        head = b"".join(b"%s: %s\r\n" % field for field in (*fields, (b"connection", b"close")))
        self.transport.write(STATUS_LINE[problem.status] + head + b"\r\n" + bytes(answer.body))
        # To close while more arrives would reset the connection, and the answer would be lost.
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
