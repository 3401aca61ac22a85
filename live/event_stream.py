"""A response of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from errors import Unavailable
from live.streams import Streams, Subscription
from observability import metrics
from queries.owner import Owner
from refusals import ChangesForgotten
from schemas import SyncPosition
from web.answers import dump
from web.request_state import state_of

HEARTBEAT_S = 15.0  # proxies close connections that are silent for longer
SLOW_S = 10.0  # a client that does not take an event in this time is cut off
LAST_WORD_S = 1.0
RECONNECT_MS = 2_000
UNAVAILABLE_PAUSE_S = 1.0

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

    *seal* makes the token of a position.
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
                reason = SHUTTING_DOWN if subscription.is_ending else TOKEN_EXPIRED
            except TimeoutError:
                reason = TOO_SLOW
            end = event("end", {"reason": reason})
            try:
                async with asyncio.timeout(LAST_WORD_S):
                    await send({"type": "http.response.body", "body": end})
            except TimeoutError:
                return

    async def _send(self, send: Send, part: bytes) -> None:
        async with asyncio.timeout(SLOW_S):
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def _parts(self, subscription: Subscription) -> AsyncIterator[bytes]:
        since = self._since
        yield b"retry: %d\n\n" % RECONNECT_MS + event("ready", {}, self._seal(since))
        subscription.wake.set()  # what has changed since the position was read
        while not subscription.is_ending and (left := self._expires_at - time.time()) > 0:
            try:
                async with asyncio.timeout(min(HEARTBEAT_S, left)):
                    await subscription.wake.wait()
            except TimeoutError:
                yield b":\n\n"
                continue
            subscription.wake.clear()
            try:
                found = await self._streams.changes(self._owner, since)
            except Unavailable:
                await asyncio.sleep(UNAVAILABLE_PAUSE_S)
                subscription.wake.set()
                continue
            except ChangesForgotten:  # while it was reading: the next request gets the 410
                return
            since = found.next
            if found.has_more:
                subscription.wake.set()
            if found.changes:
                metrics.events_sent.inc(len(found.changes))
                pairs = zip(found.changes, found.positions, strict=True)
                yield b"".join(event(each["type"], each, self._seal(after)) for each, after in pairs)
