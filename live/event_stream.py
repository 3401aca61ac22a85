"""A response of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from errors import TooManyRequests, Unavailable
from live.streams import Streams, Subscription
from observability import metrics
from queries.changes import Changes
from queries.owner import Owner
from refusals import ChangesForgotten
from schemas import SyncPosition
from web.answers import dump
from web.request_state import state_of

HEARTBEAT_S = 15.0  # proxies close connections that are silent for longer
SEND_TIMEOUT_S = 10.0  # a client that does not take an event in this time is cut off
END_TIMEOUT_S = 1.0
RECONNECT_MS = 2_000
RETRY_DELAY_S = 1.0

TOKEN_EXPIRED, SHUTTING_DOWN, TOO_SLOW = "token-expired", "shutting-down", "too-slow"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),  # nginx
]


def event(name: str, data: Any, identifier: str | None = None) -> bytes:
    lines = [b"event: " + name.encode(), b"data: " + dump(data)]
    if identifier is not None:
        lines.append(b"id: " + identifier.encode())
    return b"\n".join(lines) + b"\n\n"


class EventStream(Response):
    """Tells *owner* what has changed since a position, until their token expires at *expires_at*.

    *expires_at* is in seconds since 1970; *seal* makes the token of a position.
    """

    def __init__(
        self,
        streams: Streams,
        owner: Owner,
        since: SyncPosition,
        *,
        expires_at: float,
        seal: Callable[[SyncPosition], str],
    ) -> None:
        self.status_code, self.background = 200, None
        self._streams, self._owner, self._since = streams, owner, since
        self._expires_at = expires_at
        self._seal = seal

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        if state_of(scope).get("is_head"):
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": b""})
            return
        async with self._streams.subscribed(self._owner) as subscription:
            state_of(scope)["streams_since"] = time.perf_counter()
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                async for part in self._parts(subscription):
                    await self._send(send, part)
                reason = SHUTTING_DOWN if subscription.ending.done() else TOKEN_EXPIRED
                last = event("end", {"reason": reason})
            except TimeoutError:
                last = event("end", {"reason": TOO_SLOW})
            except ChangesForgotten:  # the next request is answered 410
                last = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": last})

    async def _send(self, send: Send, part: bytes) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _parts(self, subscription: Subscription) -> AsyncIterator[bytes]:
        since, wake, ending = self._since, subscription.wake, subscription.ending
        yield b"retry: %d\n\n" % RECONNECT_MS + event("ready", {}, self._seal(since))
        wake.set()  # what has changed since the position was read
        while not ending.done() and (left := self._expires_at - time.time()) > 0:
            patience_s = min(HEARTBEAT_S, left)
            try:
                async with asyncio.timeout(patience_s):
                    await wake.wait()
            except TimeoutError:
                yield b":\n\n"
                continue
            wake.clear()
            reading = self._streams.read(self._owner, since, self._encode)
            waited: set[asyncio.Future[Any]] = {reading, ending}
            await asyncio.wait(waited, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                wake.set()
                yield b":\n\n"
                continue
            try:
                page = reading.result()
            except (Unavailable, TooManyRequests):
                wake.set()
                yield b":\n\n"
                await asyncio.wait({ending}, timeout=RETRY_DELAY_S)
                continue
            since = page.next
            subscription.revision = since.revision
            if page.has_more:
                wake.set()
                await asyncio.sleep(0)  # others may go first
            if page.length:
                metrics.events_sent(page.length)
                yield page.events

    def _encode(self, found: Changes) -> bytes:
        pairs = zip(found.changes, found.positions, strict=True)
        return b"".join(event(each["type"], each, self._seal(after)) for each, after in pairs)
