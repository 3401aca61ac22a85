"""Parsing time is at most linear in the input, wherever a client's bytes are parsed."""

import base64
import itertools
import time
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import pytest
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from auth import tokens
from main import create_app
from tests.conftest import SECRET, running, settings_for

KIB = 1024
SIZES = (16 * KIB, 32 * KIB, 64 * KIB)
MOST_CPU_S = 1.0  # a quadratic parser takes at least 5 s for 64 KiB; normal is 0.1 s, 0.3 s on a busy machine
MOST_RATIO = 3.2  # of the times for twice the length: 2 is linear, 4 quadratic
NEGLIGIBLE_S = 0.02  # below this, the ratio is noise
ATTEMPTS = 3  # the fastest counts, since other processes share the machine


class Sent(NamedTuple):
    """A raw request, which may contain bytes that httpx would not send."""

    method: str = "GET"
    path: str = "/api/alice/tasks"
    query: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: tuple[bytes, ...] = (b"",)


Make = Callable[[int], Sent]
JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"application/x-www-form-urlencoded")


def filled(size: int, *parts: bytes) -> bytes:
    """Return *size* bytes: the first part, repetitions of the second, and the third."""
    before, unit, after = parts
    return before + unit * ((size - len(before) - len(after)) // len(unit)) + after


def header(name: str, *parts: bytes, method: str = "GET", path: str = "/api/alice/tasks/1") -> Make:
    body = (b"{}",) if method in ("PUT", "PATCH", "POST") else (b"",)
    return lambda size: Sent(method, path, b"", ((name.encode(), filled(size, *parts)), JSON), body)


def query(*parts: bytes, method: str = "GET", path: str = "/api/alice/tasks") -> Make:
    return lambda size: Sent(method, path, filled(size, *parts))


def body(*parts: bytes, path: str = "/api/alice/tasks", media_type: tuple[bytes, bytes] = JSON) -> Make:
    return lambda size: Sent("POST", path, b"", (media_type,), (filled(size, *parts),))


def path(*parts: bytes, method: str = "GET") -> Make:
    return lambda size: Sent(method, "/api/alice/tasks" + filled(size, *parts).decode())


def different(size: int, unit: str) -> bytes:
    """Return up to *size* bytes of repetitions of *unit*, each with its own number."""
    return b"".join(unit.format(number).encode() for number in range(size // len(unit.format(99_999))))


def encoded(payload: bytes) -> bytes:
    return base64.urlsafe_b64encode(payload).rstrip(b"=")


def bearer(*parts: bytes) -> Make:
    return lambda size: Sent(headers=((b"authorization", b"Bearer " + filled(size, *parts)),))


def token_of(where: int, *parts: bytes) -> Make:
    """A token whose header, payload or signature is hostile."""

    def make(size: int) -> Sent:
        part = [b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"alice","exp":9999999999}', b"0" * 32]
        part[where] = filled(min(size, 12 * KIB * size // SIZES[-1]), *parts)
        return Sent(headers=((b"authorization", b"Bearer " + b".".join(map(encoded, part))),))

    return make


def sign_up(*parts: bytes) -> Make:
    def make(size: int) -> Sent:
        content = b'{"name":"x","password":"short","email":"' + filled(size - 60, *parts) + b'"}'
        return Sent("POST", "/api/auth/sign-up/email", b"", (JSON,), (content,))

    return make


TAGS = (
    (b'"1",', b" ", b',"2"'),
    (b'"1"', b" ", b"x"),
    (b"", b",", b"x"),
    (b"", b", ", b'"'),
    (b'"', b"W/", b""),
    (b"", b'"1" ', b""),
    (b"", b'"1", ', b"x"),
    (b"", b" ,\t", b'"1"'),
    (b'"1"', b"\t", b'"2"'),
)
PLAIN = (
    (b"", b"a", b""),
    (b"", b" ", b"a"),
    (b"", b",", b""),
    (b"", b"a,", b""),
    (b"", b"\xff", b""),
    (b"", b"9", b""),
    (b'"', b"\\", b'"'),
    (b"a;", b" ;", b"="),
    (b"", b"a/", b""),
)
HEADERS = (
    "accept",
    "accept-encoding",
    "access-control-request-headers",
    "access-control-request-method",
    "authorization",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "forwarded",
    "host",
    "idempotency-key",
    "last-event-id",
    "origin",
    "prefer",
    "range",
    "traceparent",
    "tracestate",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-request-id",
    "if-modified-since",
    "if-unmodified-since",
)
NUMBERS = (
    (b"", b"9", b""),
    (b"1", b"0", b""),
    (b"0.", b"1", b""),
    (b"", b"1", b"e5"),
    (b"-", b"0", b"1"),
    (b"1e", b"9", b""),
)
TEXTS = (
    (b"", b" ", b"x"),
    (b"", b"a ", b""),
    (b"", b"\\u0000", b""),
    (b"", b"\\ud800", b""),
    (b"", b"a-", b""),
    (b"", b"\xc4\xb0", b""),
    (b"", b"\\\\", b""),
    (b"2026-02-28", b" ", b"x"),
    (b"09:30", b":", b""),
    (b"", b"9", b""),
)
FIELDS = (
    "title",
    "description",
    "category",
    "due_date",
    "due_time",
    "priority",
    "recurring",
    "completed",
    "nothing",
)
PARAMETERS = (
    "status",
    "completed",
    "search",
    "q",
    "priority",
    "category",
    "tags",
    "due_date_from",
    "due_date_to",
    "sort",
    "order",
    "limit",
    "cursor",
    "count",
    "nothing",
)

CASES: dict[str, Make] = {
    **{
        f"{name} {parts} {method}": header(name, *parts, method=method)
        for name in ("if-match", "if-none-match")
        for parts in TAGS
        for method in ("GET", "PUT", "DELETE")
    },
    **{
        f"{name} {parts}": header(name, *parts, method="POST", path="/api/alice/tasks")
        for name in HEADERS
        for parts in PLAIN
    },
    **{
        f"{name} {parts} in the query": query(name.encode() + b"=", *parts)
        for name in PARAMETERS
        for parts in ((b"a", b""), (b"+", b"a"), (b"%", b""), (b"%00", b""), (b"9", b""), (b"%C4%B0+", b""))
    },
    **{
        f"{name} very often in the query": query(b"", name.encode() + b"=high&", b"", method=method)
        for name in PARAMETERS
        for method in ("GET", "DELETE")
    },
    "addresses of trusted proxies": header("x-forwarded-for", b"", b"10.0.0.1,", b"10.0.0.1"),
    "unknown parameters": lambda size: Sent(query=different(size, "p{}=1&")),
    "unknown parameters of a change of many": lambda size: Sent("DELETE", query=different(size, "p{}=1&")),
    "different categories": lambda size: Sent(query=different(size, "category={}&")),
    "ampersands": query(b"", b"&", b""),
    "equals signs": query(b"", b"=", b""),
    "semicolons": query(b"", b";", b""),
    "percent signs": query(b"", b"%", b""),
    **{f"id {parts}": path(b"/", *parts) for parts in ((b"9", b""), (b"a", b""), (b"0", b"1"), (b"-", b"1"))},
    "slashes": path(b"", b"/", b""),
    "slashes after an id": path(b"/1", b"/", b""),
    "stats and slashes": path(b"/stats", b"/", b"x"),
    **{
        f"{field} {before!r} {unit!r} {after!r}": body(
            b'{"title":"x","' + field.encode() + b'":"' + before, unit, after + b'"}'
        )
        for field in FIELDS
        for before, unit, after in TEXTS
    },
    **{
        f"number {parts} in {field}": body(
            b'{"title":"","' + field.encode() + b'":' + before, unit, after + b"}"
        )
        for field in ("completed", "nothing")
        for parts in NUMBERS
        for before, unit, after in (parts,)
    },
    "many long numbers": lambda size: Sent(
        "POST", headers=(JSON,), body=(filled(size, b'{"x":[', b"9" * 4000 + b",", b"0]}"),)
    ),
    "arrays": body(b'{"x":', b"[", b""),
    "arrays, closed": lambda size: Sent(
        "POST", headers=(JSON,), body=(b"[" * (size // 2) + b"]" * (size // 2),)
    ),
    "objects": body(b"", b'{"a":', b""),
    "white space": body(b"", b" ", b""),
    "white space around a member": body(b"{", b" ", b'"a":1'),
    "quotes": body(b"", b'"', b""),
    "commas": body(b'{"x":[0', b",0", b"]"),
    "a long name": body(b'{"', b"a", b'":1}'),
    "a name that is twice": body(b"{", b'"a":1,', b'"a":1}'),
    "tags": body(b'{"title":"x","tags":[', b'"a",', b'"a"]}'),
    "operations": body(b'{"operations":[', b"{},", b"{}]}", path="/api/alice/tasks/bulk"),
    "operations on one task": body(
        b'{"operations":[', b'{"op":"complete","id":1},', b"{}]}", path="/api/alice/tasks/bulk"
    ),
    "different names": lambda size: Sent(
        "POST", headers=(JSON,), body=(b'{"title":"",' + different(size - 30, '"n{}":1,') + b'"a":1}',)
    ),
    "single bytes": lambda size: Sent("POST", headers=(JSON,), body=tuple(b" " for _ in range(size))),
    **{f"token {parts}": bearer(*parts) for parts in (*PLAIN, (b"", b".", b""), (b"a.", b"=", b".b"))},
    **{
        f"part {where} of a token: {parts}": token_of(where, *parts)
        for where in range(3)
        for parts in (
            (b"", b"[", b""),
            (b'{"a":', b"9", b"}"),
            (b"{", b'"a":1,', b'"a":1}'),
            (b'{"sub":"', b" ", b'","exp":1}'),
            (b'{"alg":"', b"a", b'"}'),
            (b'{"exp":', b"9", b',"sub":"alice"}'),
            (b"", b"\xff", b""),
        )
    },
    **{
        f"e-mail {parts}": sign_up(*parts)
        for parts in (
            (b"a@", b"a.", b"1"),
            (b"", b"a.", b"@"),
            (b"", b".", b"@b.cd"),
            (b"", b"a", b""),
            (b"a@", b"a-", b""),
            (b"a@", b"a", b".1"),
            (b"", b"@", b""),
            (b"", b" ", b"a@b.cd"),
        )
    },
    **{
        f"form {parts}": body(*parts, path="/api/auth/token", media_type=FORM)
        for parts in (
            (b"username=", b"a", b"&password=x"),
            (b"", b"&", b""),
            (b"", b"username=a&", b""),
            (b"", b"%", b""),
            (b"", b"=", b""),
        )
    },
    "form of different fields": lambda size: Sent(
        "POST", "/api/auth/token", headers=(FORM,), body=(different(size, "f{}=1&"),)
    ),
}


@pytest.fixture(scope="module")
async def keeper(tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = f"sqlite:///{tmp_path_factory.mktemp('hostile') / 'tasks.db'}"
    app = create_app(settings_for(url, local_accounts=True, allowed_hosts="testserver"))
    async with running(app):
        # As the server wraps the app if it has trusted proxies.
        wrapped: Any = app
        yield ProxyHeadersMiddleware(wrapped, trusted_hosts=["127.0.0.1", "10.0.0.0/8"])


async def answer(app: ASGIApp, sent: Sent) -> tuple[int, float]:
    """Return the response status and the CPU seconds of the event loop's thread."""
    names = {name for name, _ in sent.headers}
    token = tokens.issue("alice", SECRET, 3600).encode()
    usual = ((b"host", b"testserver"), (b"authorization", b"Bearer " + token))
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": sent.method,
        "scheme": "http",
        "path": sent.path,
        "raw_path": sent.path.encode(),
        "query_string": sent.query,
        "root_path": "",
        "headers": [*(pair for pair in usual if pair[0] not in names), *sent.headers],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    chunks, last = iter(sent.body), len(sent.body) - 1
    number = -1
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": "http.request", "body": next(chunks), "more_body": number < last}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    began = time.thread_time()
    await app(scope, receive, send)
    return statuses[0], time.thread_time() - began


@pytest.mark.no_cover  # coverage would dominate the measurement
@pytest.mark.parametrize("make", CASES.values(), ids=[ascii(name) for name in CASES])
async def test_parsing_time_is_at_most_linear_in_the_input(keeper: ASGIApp, make: Make) -> None:
    took = []
    for size in SIZES:
        answers = [await answer(keeper, make(size)) for _ in range(ATTEMPTS)]
        assert {status for status, _ in answers} <= {200, 201, 204, 400, 401, 404, 408, 413, 415, 422, 429}
        took.append(min(seconds for _, seconds in answers))

    assert took[-1] < MOST_CPU_S
    for shorter, longer in itertools.pairwise(took):
        assert longer < MOST_RATIO * max(shorter, NEGLIGIBLE_S)
