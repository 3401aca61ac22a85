"""Sends a response, head and body in one write if the body comes in one piece, as almost all do."""

import re
from functools import lru_cache
from typing import Any

from starlette.types import Message
from uvicorn.protocols.http.httptools_impl import HEADER_RE, STATUS_LINE, RequestResponseCycle

WITHOUT_BODY = frozenset({204, 304})
_FRAMING = re.compile(b"connection|transfer-encoding", re.IGNORECASE)  # fields that uvicorn acts on
_IN_VALUES = bytes([9, *range(32, 127), *range(128, 256)])  # as uvicorn allows
# A transport keeps a piece until its last byte is sent, so a long body in one piece is held as a whole.
PIECE_BYTES = 64 * 1024


class Sender:
    """The `send` of one request.

    The start of a response waits for the first part of its body; `send_whole` takes both at once. Streams,
    HEAD, 204 and 304 are left to uvicorn, which checks each field with two regular expressions and writes
    head and body separately. That takes 10 µs more for the same bytes.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle: Any = cycle
        self._start: Message | None = None

    async def __call__(self, message: Message) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start" and self._start is None and not cycle.response_started:
            self._start = message
            return
        start, self._start = self._start, None
        if start is not None:
            if _is_last(message):
                await self.send_whole(start, message.get("body", b""))
                return
            await cycle.send(start)
        if cycle.flow.write_paused and cycle.chunked_encoding and _is_last(message):
            self._end_stream(message.get("body", b""))
            return
        await cycle.send(message)

    async def begin(self) -> None:
        """Send the start of the response, if it waits."""
        start, self._start = self._start, None
        if start is not None:
            await self._cycle.send(start)

    async def send_whole(self, start: Message, body: bytes) -> None:
        """Send a response of which nothing has been sent yet."""
        cycle = self._cycle
        pieces = self._pieces(start, body)
        if pieces is None:
            await cycle.send(start)
            await cycle.send({"type": "http.response.body", "body": body})
            return
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        cycle.waiting_for_100_continue = False
        cycle.response_started = cycle.response_complete = True
        for piece in pieces:
            cycle.transport.write(piece)
        self._finish()

    def _pieces(self, start: Message, body: bytes) -> list[bytes] | None:
        """Return the response, a long one in pieces; None if uvicorn has to frame or refuse it."""
        cycle, status = self._cycle, start["status"]
        fields = [*cycle.default_headers, *start.get("headers", ())]
        if cycle.scope["method"] == "HEAD" or status in WITHOUT_BODY:
            return None
        if (b"content-length", b"%d" % len(body)) not in fields:
            return None
        if not _are_plain(b"".join([name for name, _ in fields])):
            return None
        if b"".join([value for _, value in fields]).translate(None, _IN_VALUES):
            return None
        if not cycle.keep_alive:
            fields.append((b"connection", b"close"))
        head = b"".join([b"%s: %s\r\n" % field for field in fields])
        rest = range(PIECE_BYTES, len(body), PIECE_BYTES)
        first = b"".join((STATUS_LINE[status], head, b"\r\n", body[:PIECE_BYTES]))
        return [first, *(body[begin : begin + PIECE_BYTES] for begin in rest)]

    def _finish(self) -> None:
        cycle = self._cycle
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()

    def _end_stream(self, body: bytes) -> None:
        """Write the last chunk, which says why the stream ends, although the client does not read."""
        cycle = self._cycle
        if cycle.disconnected or cycle.response_complete:
            return
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        cycle.response_complete = True
        cycle.transport.write(chunk + b"0\r\n\r\n")
        self._finish()


@lru_cache(256)  # the same few lists of names, over and over
def _are_plain(names: bytes) -> bool:
    """Return whether the joined *names* of fields are valid, and none is one that uvicorn acts on."""
    return not (HEADER_RE.search(names) or _FRAMING.search(names))


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body")
