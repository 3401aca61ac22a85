"""The state that the layers of a request share: the entries of its scope's `state`, each named once."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypedDict

from starlette.types import Message, Scope

REQUEST_ID_PATTERN = "[A-Za-z0-9._~+/=:-]{1,128}"
_PLAIN_ID = re.compile(REQUEST_ID_PATTERN.encode())
_ids = random.Random()  # noqa: S311 - ids are no secret, and this takes a third of the time


class RequestState(TypedDict, total=False):
    """`rate_limit` holds header fields; it is present once the request was charged to a user or an address.

    `user_id` is the subject of a verified token. `overloaded` marks an answer after which the connection
    pauses. `task` answers the request; the server names it, as asking for it is slow before Python 3.12.
    `send_whole` sends the start and the body of a response in one call, if `server.protocol` serves.
    `body_received` says that reading the body will not wait. `expires_at` is until when the verified token
    is accepted, in seconds since 1970. `is_head` marks a HEAD request,
    `streams_since` (`time.perf_counter`) a stream. `headers` is the cache of `headers_of`.
    """

    request_id: str
    user_id: str
    rate_limit: tuple[tuple[bytes, bytes], ...]
    overloaded: bool
    task: asyncio.Task[Any]
    send_whole: Callable[[Message, bytes], Awaitable[None]]
    body_received: bool
    expires_at: float
    is_head: bool
    streams_since: float
    headers: dict[bytes, bytes]


def state_of(scope: Scope) -> RequestState:
    state: RequestState = scope.setdefault("state", {})
    return state


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """Return the headers of a request by name. If one was sent more than once, its first value counts."""
    state = state_of(scope)
    if "headers" not in state:
        state["headers"] = dict(reversed(scope["headers"]))
    return state["headers"]


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Return the values of the header *name*, in the order in which they were sent."""
    headers = headers_of(scope)
    if name not in headers:
        return []
    if len(headers) == len(scope["headers"]):  # no header was sent twice
        return [headers[name]]
    return [value for sent, value in scope["headers"] if sent == name]


def request_id(scope: Scope) -> str:
    """Return the id of this request: the client's `X-Request-ID` if it is a plain one, else a new one."""
    state = state_of(scope)
    if "request_id" not in state:
        sent = headers_of(scope).get(b"x-request-id", b"")
        is_plain = _PLAIN_ID.fullmatch(sent)
        state["request_id"] = sent.decode() if is_plain else f"{_ids.getrandbits(128):032x}"
    return state["request_id"]
