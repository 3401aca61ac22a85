"""Request framing, byte by byte, against the service as its own process."""

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from auth import tokens
from server.heads import FIELDS_MAX, HEAD_MAX_BYTES
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import Service, running_service

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
TOKEN = tokens.issue("alice", SECRET, 3600).encode()
LINE = b"POST /api/alice/tasks HTTP/1.1\r\n"
POST = LINE + b"Host: x\r\nAuthorization: Bearer " + TOKEN + b"\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\n"
# An invalid body, which is refused only after all of it has been read, and creates no task.
BODY = b'{"title": ""}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"3;a=b\r\n" + BODY[:3] + b"\r\n00a\r\n" + BODY[3:] + b"\r\n0\r\nX-Trailer: y\r\n\r\n"
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = (
    b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)

OK = (200, "")
READ = (422, "title: must be 1 to 200 characters")
NOT_JSON = (422, "body: is not valid JSON at character 0")
MALFORMED = (400, "This is not an HTTP request that can be understood")
HOST = (400, "An HTTP/1.1 request needs one Host header: a name or an address, and perhaps a port")
ENCODING = (501, "Of transfer encodings only chunked is implemented")
CONNECT = (501, "This service is no proxy: CONNECT is not implemented")

Answer = tuple[int, str]


def smuggling(fields: bytes) -> bytes:
    """Return a POST with *fields* whose body is itself a request."""
    return POST + fields + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED


SERVED: dict[str, tuple[bytes, list[Answer]]] = {
    "a body of a length": (POST + LENGTH + b"\r\n" + BODY, [READ]),
    "a body in chunks, with extensions and a trailer": (POST + CHUNKED + b"\r\n" + CHUNKS, [READ]),
    "a length in other white space": (POST + b"content-length:\t%d  \r\n\r\n" % len(BODY) + BODY, [READ]),
    "h2c and a body of a length": (POST + H2C + LENGTH + b"\r\n" + BODY, [READ]),
    "h2c and a body in chunks": (POST + H2C + CHUNKED + b"\r\n" + CHUNKS, [READ]),
    "websocket and a body": (POST + WEBSOCKET + LENGTH + b"\r\n" + BODY, [READ]),
    "TLS and a body": (
        POST + b"Connection: upgrade\r\nUpgrade: TLS/1.0\r\n" + LENGTH + b"\r\n" + BODY,
        [READ],
    ),
    "two upgrades": (POST + H2C + b"upgrade: foo\r\n" + LENGTH + b"\r\n" + BODY, [READ]),
    "h2c three times": ((POST + H2C + LENGTH + b"\r\n" + BODY) * 3, [READ] * 3),
    "h2c, others between": (
        (GET + b"Host: x\r\n\r\n" + POST + H2C + CHUNKED + b"\r\n" + CHUNKS) * 2,
        [OK, READ, OK, READ],
    ),
    "h2c without a body": (GET + b"Host: x\r\n" + H2C + b"\r\n", [OK]),
    "an upgrade in a trailer": (
        POST + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"Connection: upgrade\r\nUpgrade: h2c\r\n\r\n",
        [READ],
    ),
    "h2c and a request as the body": (smuggling(H2C), [NOT_JSON]),
    "websocket and a request as the body": (smuggling(WEBSOCKET), [NOT_JSON]),
    "a request as the body": (smuggling(b""), [NOT_JSON]),
    "GET with a body": (
        GET + b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        [OK],
    ),
    "HEAD with a body": (
        GET.replace(b"GET", b"HEAD")
        + b"Host: x\r\n"
        + CHUNKED
        + b"\r\n%x\r\n" % len(SMUGGLED)
        + SMUGGLED
        + b"\r\n0\r\n\r\n",
        [OK],
    ),
    "a request as the body of what is refused without reading it": (
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED) + SMUGGLED,
        [(405, "This method is not allowed at this address")],
    ),
    "empty lines before": (b"\r\n\r\n" + GET + b"Host: x\r\n\r\n", [OK]),
    "an absolute address": (b"GET http://y:80/health HTTP/1.1\r\nHost: x\r\n\r\n", [OK]),
    "an absolute address and h2c": (b"GET http://y:80/health HTTP/1.1\r\nHost: x\r\n" + H2C + b"\r\n", [OK]),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [(404, "There is nothing at this address")]),
    "a host without a name": (GET + b"Host:\r\n\r\n", [OK]),
    "an IPv6 host": (GET + b"Host: [::1]:8000 \r\n\r\n", [OK]),
    "a host with odd letters": (GET + b"Host: a_b.%2d!:\r\n\r\n", [OK]),
}
REFUSED: dict[str, tuple[bytes, list[Answer]]] = {
    "h2c and a body that breaks off": (POST + H2C + CHUNKED + b"\r\n1\r\nxx\r\n0\r\n\r\n", [MALFORMED]),
    "h2c in HTTP/1.0 with chunks": (
        POST.replace(b"1.1", b"1.0", 1) + H2C + CHUNKED + b"\r\n" + CHUNKS,
        [MALFORMED],
    ),
    "h2c with both lengths": (POST + H2C + LENGTH + CHUNKED + b"\r\n" + CHUNKS, [MALFORMED]),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", [CONNECT]),
    "CONNECT with a body": (
        b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED),
        [CONNECT],
    ),
    "CONNECT to a path": (b"CONNECT /health HTTP/1.1\r\nHost: x\r\n\r\n", [CONNECT]),
    "what follows a close": (GET + b"Host: x\r\nConnection: close\r\n\r\n", [OK]),
    "what follows a close and h2c": (
        GET + b"Host: x\r\nConnection: close, upgrade\r\nUpgrade: h2c\r\n\r\n",
        [OK],
    ),
    "what follows HTTP/1.0": (b"GET /health HTTP/1.0\r\n\r\n", [OK]),
    "what follows HTTP/1.0 and h2c": (b"GET /health HTTP/1.0\r\n" + H2C + b"\r\n", [OK]),
    "length, then chunks": (POST + LENGTH + CHUNKED + b"\r\n0\r\n\r\n", [MALFORMED]),
    "chunks, then length": (POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n", [MALFORMED]),
    "two lengths": (POST + b"Content-Length: 0\r\nContent-Length: 36\r\n\r\n", [MALFORMED]),
    "the same length twice": (POST + LENGTH * 2 + b"\r\n" + BODY, [MALFORMED]),
    "a list of lengths": (POST + b"Content-Length: 0, 36\r\n\r\n", [MALFORMED]),
    "a length with a sign": (POST + b"Content-Length: +0\r\n\r\n", [MALFORMED]),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", [MALFORMED]),
    "a hexadecimal length": (POST + b"Content-Length: 0x0\r\n\r\n", [MALFORMED]),
    "a length with a space": (POST + b"Content-Length: 0 36\r\n\r\n", [MALFORMED]),
    "an empty length": (POST + b"Content-Length:\r\n\r\n", [MALFORMED]),
    "a length beyond 64 bits": (POST + b"Content-Length: 18446744073709551616\r\n\r\n", [MALFORMED]),
    "a length that is folded": (POST + b"Content-Length: 0\r\n 36\r\n\r\n", [MALFORMED]),
    "a length after a bare CR": (POST + b"A: b\rContent-Length: 36\r\n\r\n", [MALFORMED]),
    "a length after a bare LF": (POST + b"A: b\nContent-Length: 36\r\n\r\n", [MALFORMED]),
    "a space before the colon": (POST + b"Content-Length : 36\r\n\r\n", [MALFORMED]),
    "a length after NUL": (POST + b"A: b\x00\r\nContent-Length: 36\r\n\r\n", [MALFORMED]),
    "NUL in a name": (POST + b"Content-\x00Length: 36\r\n\r\n", [MALFORMED]),
    "a head that ends with bare LF": (GET + b"Host: x\r\n\n", [MALFORMED]),
    "lines that end with bare LF": (b"GET /health HTTP/1.1\nHost: x\n\n", [MALFORMED]),
    "a line without a colon": (GET + b"Host: x\r\nContent-Length\r\n\r\n", [MALFORMED]),
    "a first line that is folded": (GET + b" Host: x\r\n\r\n", [MALFORMED]),
    "an encoding that is unknown": (POST + b"Transfer-Encoding: xchunked\r\n\r\n", [ENCODING]),
    "an encoding that ends otherwise": (
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        [MALFORMED],
    ),
    "an encoding before chunks": (
        POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        [ENCODING],
    ),
    "two encodings": (POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n", [MALFORMED]),
    "chunks twice": (POST + CHUNKED * 2 + b"\r\n0\r\n\r\n", [MALFORMED]),
    "an encoding with a parameter": (POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n", [ENCODING]),
    "an encoding in quotes": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', [ENCODING]),
    "an encoding after a control character": (
        POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        [MALFORMED],
    ),
    "an encoding before white space": (POST + b"Transfer-Encoding: chunked \t\r\n\r\n0\r\n\r\n", [ENCODING]),
    "an empty encoding": (POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n", [MALFORMED]),
    "an encoding in HTTP/1.0": (
        POST.replace(b"1.1", b"1.0", 1) + CHUNKED + b"\r\n0\r\n\r\n",
        [MALFORMED],
    ),
    "a chunk of negative size": (POST + CHUNKED + b"\r\n-1\r\n\r\n", [MALFORMED]),
    "a chunk size with a prefix": (POST + CHUNKED + b"\r\n0x0\r\n\r\n", [MALFORMED]),
    "a chunk size with a space": (POST + CHUNKED + b"\r\n0 \r\n\r\n", [MALFORMED]),
    "a chunk size beyond 64 bits": (POST + CHUNKED + b"\r\n10000000000000000\r\n\r\n", [MALFORMED]),
    "a chunk size of none": (POST + CHUNKED + b"\r\n\r\n\r\n", [MALFORMED]),
    "a chunk longer than its size": (POST + CHUNKED + b"\r\n1\r\nxx\r\n0\r\n\r\n", [MALFORMED]),
    "a chunk extension that ends with bare LF": (POST + CHUNKED + b"\r\n0;\n\r\n\r\n", [MALFORMED]),
    "a chunk extension with a bare CR": (POST + CHUNKED + b"\r\n0;a\rb\r\n\r\n", [MALFORMED]),
    "chunks that end with bare LF": (POST + CHUNKED + b"\r\n0\n\n", [MALFORMED]),
    "a length in a trailer": (POST + CHUNKED + b"\r\n0\r\nContent-Length: 36\r\n\r\n", [MALFORMED]),
    "an encoding in a trailer": (POST + CHUNKED + b"\r\n0\r\n" + CHUNKED + b"\r\n", [MALFORMED]),
    "a trailer that is folded": (POST + CHUNKED + b"\r\n0\r\nA: b\r\n c\r\n\r\n", [MALFORMED]),
    "HTTP/0.9": (b"GET /health\r\n\r\n", [MALFORMED]),
    "HTTP/2 with prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [MALFORMED]),
    "HTTP/2.0": (b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n", [MALFORMED]),
    "HTTP/1.2": (b"GET /health HTTP/1.2\r\nHost: x\r\n\r\n", [MALFORMED]),
    "a space after the version": (b"GET /health HTTP/1.1 \r\nHost: x\r\n\r\n", [MALFORMED]),
    "a method in small letters": (b"get /health HTTP/1.1\r\nHost: x\r\n\r\n", [MALFORMED]),
    "an address with a user": (b"GET http://a@x/health HTTP/1.1\r\nHost: x\r\n\r\n", [MALFORMED]),
    "an address of another scheme": (b"GET ftp://x/health HTTP/1.1\r\nHost: x\r\n\r\n", [MALFORMED]),
    "an address without a host": (b"GET http:///health HTTP/1.1\r\nHost: x\r\n\r\n", [MALFORMED]),
    "no host": (GET + b"\r\n", [HOST]),
    "no host and h2c": (GET + H2C + b"\r\n", [HOST]),
    "two hosts": (GET + b"Host: x\r\nhOST: y\r\n\r\n", [HOST]),
    "the same host twice": (GET + b"Host: x\r\nHost: x\r\n\r\n", [HOST]),
    "two hosts in one": (GET + b"Host: x y\r\n\r\n", [HOST]),
    "a host with a user": (GET + b"Host: a@x\r\n\r\n", [HOST]),
    "a host with a path": (GET + b"Host: x/y\r\n\r\n", [HOST]),
    "a host with a port that is none": (GET + b"Host: x:http\r\n\r\n", [HOST]),
    "a host with two ports": (GET + b"Host: x:80:80\r\n\r\n", [HOST]),
    "a host in half a bracket": (GET + b"Host: [::1\r\n\r\n", [HOST]),
    "a host with a letter beyond ASCII": (GET + b"Host: \xc3\xa9\r\n\r\n", [HOST]),
    "a host with half an escape": (GET + b"Host: a%2\r\n\r\n", [HOST]),
    "a host with a backslash": (GET + b"Host: x\\y\r\n\r\n", [HOST]),
}
CASES = {name: (raw + LAST, [*answers, OK]) for name, (raw, answers) in SERVED.items()}
CASES |= {name: (raw + SMUGGLED, answers) for name, (raw, answers) in REFUSED.items()}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, int]]:
    port = free_port()
    settings = {"BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off", "RATE_LIMIT_ANONYMOUS": "off"}
    with running_service(tmp_path_factory.mktemp("target"), PORT=str(port), **settings) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield service, port
        assert service.process.poll() is None
        assert "Traceback" not in service.logged


@pytest.mark.process
@pytest.mark.parametrize("name", CASES)
async def test_no_second_request_is_smuggled_in(target: tuple[Service, int], name: str) -> None:
    """Sent whole, and in two segments cut at each line ending and around each body."""
    service, port = target
    raw, expected = CASES[name]
    borders = [cut for cut in range(1, len(raw)) if raw[cut - 1] in b"\r\n" or raw[cut] in b"\r\n"]
    assert len(borders) > 5
    limit = asyncio.Semaphore(50)

    async def ask(cut: int) -> list[Answer]:
        async with limit:
            return await answers_to(port, raw[:cut], raw[cut:])

    found = await asyncio.gather(*(ask(cut) for cut in (0, *borders)))

    others = {cut: each for cut, each in zip((0, *borders), found, strict=True) if each != expected}
    assert others == {}
    assert "path=/smuggled" not in service.logged


@pytest.mark.process
async def test_a_message_is_served_byte_by_byte(target: tuple[Service, int]) -> None:
    raw = POST + H2C + CHUNKED + b"\r\n" + CHUNKS + LAST

    found = await answers_to(target[1], *(bytes([byte]) for byte in raw), pause_s=0.0)

    assert found == [READ, OK]


@pytest.mark.process
async def test_a_head_with_too_many_fields_is_431(target: tuple[Service, int]) -> None:
    head = GET + b"Host: x\r\nConnection: close\r\n"

    assert await answers_to(target[1], head + b"A: b\r\n" * (FIELDS_MAX - 2) + b"\r\n") == [OK]
    too_large = await answers_to(target[1], head + b"A: b\r\n" * (FIELDS_MAX - 1) + b"\r\n")
    assert too_large == [(431, "The request's head has over 32 KiB or over 100 fields")]


@pytest.mark.process
@pytest.mark.parametrize(
    ("meant", "named", "status"), [(b"x", b"y", 200), (b"y", b"x", 400), (b"y", b"y", 400)]
)
async def test_the_host_of_an_absolute_request_target_wins_over_the_host_header(
    tmp_path: Path, meant: bytes, named: bytes, status: int
) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port), ALLOWED_HOSTS="x") as service:
        await asyncio.to_thread(service.wait_for, f"http://127.0.0.1:{port}")
        found = await answers_to(
            port,
            b"GET http://%s/openapi.json HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n" % (meant, named),
        )

    assert found == [(status, found[0][1])]


@pytest.mark.process
async def test_head_limits_apply_per_request_not_per_connection(target: tuple[Service, int]) -> None:
    """Fields and bytes of consecutive heads are not added up."""
    head = (
        GET
        + b"Host: x\r\n"
        + b"A: b\r\n" * (FIELDS_MAX // 2)
        + b"A: "
        + b"b" * (HEAD_MAX_BYTES // 2)
        + b"\r\n\r\n"
    )

    assert await answers_to(target[1], head, head, head, LAST) == [OK] * 4


@pytest.mark.process
async def test_a_body_may_be_larger_than_a_head(target: tuple[Service, int]) -> None:
    head = POST + b"Content-Length: %d\r\n\r\n" % (2 * HEAD_MAX_BYTES)

    assert await answers_to(
        target[1], head, *[b"x" * 1024] * (2 * HEAD_MAX_BYTES // 1024), LAST, pause_s=0.0
    ) == [
        NOT_JSON,
        OK,
    ]


@pytest.mark.process
async def test_field_names_count_towards_the_head_limit(target: tuple[Service, int]) -> None:
    head = GET + b"Host: x\r\n" + b"a" * HEAD_MAX_BYTES + b": b\r\n\r\n"

    assert (await answers_to(target[1], head))[0][0] == 431


@pytest.mark.process
async def test_trailers_count_towards_the_head_limit(target: tuple[Service, int]) -> None:
    chunked = POST + CHUNKED + b"\r\n0\r\n"

    assert (await answers_to(target[1], chunked + b"A: b\r\n" * FIELDS_MAX))[-1][0] == 431
    assert (await answers_to(target[1], chunked + b"A: " + b"b" * HEAD_MAX_BYTES + b"\r\n\r\n"))[-1][0] == 431


@pytest.mark.process
async def test_a_token_of_the_largest_size_fits(target: tuple[Service, int]) -> None:
    head = GET + b"Host: x\r\nConnection: close\r\nAuthorization: Bearer " + b"x" * 16 * 1024

    assert await answers_to(target[1], head + b"\r\n\r\n") == [OK]


@pytest.mark.process
@pytest.mark.parametrize(("version", "answer"), [(b"1.1", b"HTTP/1.1 100"), (b"1.0", b"HTTP/1.1 422")])
async def test_only_http_1_1_gets_100_continue(
    target: tuple[Service, int], version: bytes, answer: bytes
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", target[1])
    writer.write(POST.replace(b"1.1", version, 1) + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n")
    await asyncio.sleep(0.2)
    writer.write(BODY)
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(answer)
    writer.close()


async def answers_to(port: int, *pieces: bytes, pause_s: float = 0.01) -> list[Answer]:
    """Return status and detail of each response to *pieces*, until the service closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""

    async def read() -> None:
        nonlocal received
        while data := await reader.read(65536):
            received += data

    async with asyncio.timeout(20):
        reading = asyncio.create_task(read())
        # The service may close before it has read everything, which resets the connection.
        with contextlib.suppress(ConnectionError):
            for piece in filter(None, pieces):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
        with contextlib.suppress(ConnectionError):
            await reading
    writer.close()
    answers = []
    while received:
        head, separator, rest = received.partition(b"\r\n\r\n")
        assert separator
        length = re.search(rb"content-length: (\d+)", head)
        assert length
        # A response to HEAD has a Content-Length but no body.
        size = 0 if rest.startswith(b"HTTP/1.1 ") else int(length[1])
        body, received = rest[:size], rest[size:]
        answers.append((int(head.split()[1]), json.loads(body).get("detail", "") if body else ""))
    return answers
