"""HTTP over real sockets, byte by byte, against the service as its own process."""

import asyncio
import contextlib
import json
import re
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from auth import tokens
from server.heads import HEAD_MAX_BYTES
from server.protocol import OVERLOADED_PAUSE_S, PIPELINED_MAX, WRITE_BUFFER_MAX_BYTES
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import Service, running_service, running_service_on

pytestmark = pytest.mark.process

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
SCRIPT = b"GET /docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
# The real timeouts would make the tests slow.
CODE = """
import main
from server import connections, protocol
protocol.HEAD_TIMEOUT_S = 0.5
protocol.DRAIN_S = 0.5
protocol.STALL_CHECK_S = 0.1
connections.STALL_TIMEOUT_S = 0.5
main.main([])
"""
IDLE = """
import functools, uvicorn
uvicorn.Config = functools.partial(uvicorn.Config, timeout_keep_alive=1)
"""
SPEED = 5
# The service with its real timeouts, on a clock that runs five times as fast.
FAST = f"""
import asyncio, selectors, sys, time
sys.modules["uvloop"] = None  # its clock cannot be set
import main
select = selectors.DefaultSelector.select
selectors.DefaultSelector.select = lambda self, timeout=None: select(self, timeout and timeout / {SPEED})
asyncio.BaseEventLoop.time = lambda self: time.monotonic() * {SPEED}
main.main([])
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = free_port()
    with running_service(tmp_path_factory.mktemp("http"), "-c", CODE, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield port
        assert service.process.poll() is None
        assert "Traceback" not in service.logged


def exchange(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send *pieces* and return everything received until the service closes, within two seconds."""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        received = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
            while data := connection.recv(65536):
                received += data
        except TimeoutError:
            received += b"<not closed>"
        except ConnectionError:  # the connection was reset
            pass
        return received


def problem(answer: bytes) -> tuple[int, str]:
    """Return status and detail of *answer*, which must be a complete problem response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower()
    assert b"connection: close" in head.lower()
    assert b"server:" not in head.lower()
    content = json.loads(body)
    assert f"x-request-id: {content['instance']}".encode() in head.lower()
    return int(head.split()[1]), content["detail"]


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHo st: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nA: b\x00c\r\n\r\n",
        b"GET /health HTTP/1.1\r\n folded: x\r\n\r\n",
        b"GET /h\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n\r\n",
    ],
)
def test_malformed_http_is_400_with_a_problem(port: int, request_: bytes) -> None:
    status, sentence = problem(exchange(port, request_))

    assert (status, sentence) == (400, "This is not an HTTP request that can be understood")


@pytest.mark.parametrize(
    "pieces",
    [
        [HEALTH + b"A: " + b"x" * (HEAD_MAX_BYTES + 1) + b"\r\n\r\n"],
        [HEALTH, *[b"A: x\r\n" * 100] * (HEAD_MAX_BYTES // 200)],
        [b"GET /" + b"x" * HEAD_MAX_BYTES + b" HTTP/1.1\r\n\r\n"],
        [HEALTH + b"A: ", *[b"x" * 1000] * 70],
    ],
    ids=["one header", "many headers", "address", "never ends"],
)
def test_a_head_that_is_too_large_is_431(port: int, pieces: list[bytes]) -> None:
    assert problem(exchange(port, *pieces))[0] == 431


def test_a_head_of_ordinary_size_is_served_byte_by_byte(port: int) -> None:
    head = HEALTH + b"Connection: close\r\n\r\n"

    answer = exchange(port, *(bytes([byte]) for byte in head))

    assert answer.startswith(b"HTTP/1.1 200")


def test_an_incomplete_head_is_408(port: int) -> None:
    assert problem(exchange(port, HEALTH))[0] == 408


def test_head_body_and_read_timeouts_are_as_documented(tmp_path: Path) -> None:
    """10 s for a head, 5 s for a body, 30 s without reading."""
    port, token = free_port(), tokens.issue("alice", SECRET, 900)
    post = f"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n".encode()
    body = b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"

    def seconds(request: bytes) -> float:
        """Return the seconds until the service responds or disconnects, by its own clock."""
        started = time.monotonic()
        with socket.socket() as connection:
            connection.settimeout(20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(request)
            if not request.startswith(SCRIPT):
                assert connection.recv(65536).startswith(b"HTTP/1.1 408")
            while request.startswith(SCRIPT) and "its client does not read" not in service.logged:
                assert time.monotonic() < started + 20
                time.sleep(0.05)
        return (time.monotonic() - started) * SPEED

    with running_service(tmp_path, "-c", FAST, PORT=str(port), BETTER_AUTH_SECRET=SECRET) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        with ThreadPoolExecutor() as pool:
            head_s, body_s, unread_s = pool.map(seconds, (post, post + body, SCRIPT * 20))

    assert 10 <= head_s < 13
    assert 5 <= body_s < 8
    assert 30 <= unread_s < 37  # the service checks every 5 s


def test_a_head_that_comes_too_slowly_is_408(port: int) -> None:
    started = time.monotonic()

    answer = exchange(port, *[b"GET /health HTTP/1.1\r\n", *[b"A: x\r\n"] * 20], pause_s=0.05)

    assert answer == b"" or problem(answer)[0] == 408
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "pieces",
    [[], [HEALTH + b"\r\n", b"\r\n"], [HEALTH + b"Content-Length: 100\r\n\r\n", b"x", b"x", b"x"]],
    ids=["says nothing", "goes on with empty lines", "goes on with a body that nobody reads"],
)
def test_a_connection_without_a_next_request_is_closed(port: int, pieces: list[bytes]) -> None:
    answer = exchange(port, *pieces, pause_s=0.1)

    assert not answer.endswith(b"<not closed>")
    assert answer.count(b"HTTP/1.1 200") == (1 if pieces else 0)


def test_a_silent_connection_is_closed_without_a_response(port: int) -> None:
    assert exchange(port) == b""


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    answer = exchange(port, HEALTH + b"\r\n" + HEALTH + b"Connection: close\r\n\r\n")

    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("asked", [1, 2])
def test_pipelined_requests_before_a_malformed_one_are_answered(port: int, asked: int) -> None:
    answer = exchange(port, (HEALTH + b"\r\n") * asked + b"\0\r\n\r\n")

    *answers, refusal = answer.split(b"HTTP/1.1 ")[1:]
    assert [each[:3] for each in answers] == [b"200"] * asked
    assert problem(b"HTTP/1.1 " + refusal)[0] == 400


@pytest.mark.parametrize("asked", [0, 1])
def test_a_malformed_chunked_body_is_400_after_earlier_responses(port: int, asked: int) -> None:
    chunked = b"PUT /api/x/tasks/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nxno chunk"

    answer = exchange(port, (HEALTH + b"\r\n") * asked + chunked)

    *answers, refusal = answer.split(b"HTTP/1.1 ")[1:]
    assert [each[:3] for each in answers] == [b"200"] * asked
    assert problem(b"HTTP/1.1 " + refusal)[0] == 400


def test_a_trailer_is_not_a_header(port: int) -> None:
    token = tokens.issue("alice", SECRET, 900).encode()
    head = b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    trailer = b"Authorization: Bearer " + token + b"\r\nX-Request-ID: trailed\r\n\r\n"

    answer = exchange(port, head + b"2\r\n{}\r\n0\r\n" + trailer)

    assert problem(answer) == (401, "Not authenticated")
    assert b"trailed" not in answer


def test_a_refusal_is_logged_with_the_id_of_its_answer(tmp_path: Path) -> None:
    port = free_port()
    broken = (
        b"PUT /api/x/tasks/1 HTTP/1.1\r\nHost: x\r\nX-Request-ID: mine\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with running_service(tmp_path, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        head = exchange(port, b"\0\r\n\r\n")
        after_another = exchange(port, HEALTH + b"\r\n", b"\0\r\n\r\n", pause_s=0.1)
        body = exchange(port, broken + b"no chunk")

    lines = [line for line in service.logged.splitlines() if "request refused" in line]
    logged = [re.findall(r"request_id=(\S+)", line) for line in lines]
    answered = [
        [json.loads(each.rpartition(b"\r\n\r\n")[2])["instance"]] for each in (head, after_another, body)
    ]
    assert logged == answered
    assert answered[2] == ["mine"]


def test_a_request_with_a_malformed_chunked_body_is_not_started(tmp_path: Path) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        head = b"GET /broken HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert problem(exchange(port, head + b"no chunk"))[0] == 400

    assert "path=/broken" not in service.logged


def test_a_body_malformed_after_the_response_gets_no_second_response(port: int) -> None:
    """The body turns out malformed later: a proxy would take a second response for the next request's."""
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = exchange(port, head, b"no chunk", pause_s=0.2)

    assert answer.count(b"HTTP/1.1") == 1
    assert not answer.endswith(b"<not closed>")


def test_beyond_twenty_pipelined_requests_the_rest_is_429(port: int) -> None:
    *answers, refusal = exchange(port, (HEALTH + b"\r\n") * 30).split(b"HTTP/1.1 ")[1:]

    assert [each[:3] for each in answers] == [b"200"] * (1 + PIPELINED_MAX)
    assert problem(b"HTTP/1.1 " + refusal)[0] == 429


def test_a_client_that_does_not_read_is_disconnected(port: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        connection.sendall(SCRIPT * 20)
        time.sleep(2)  # four times the stall timeout
        received = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                received += len(data)

    assert received < 15_000_000  # of 30 MB: what the kernel had buffered already


def _read(connection: socket.socket, bytes_: int) -> bytes:
    """Return that many bytes, or fewer at the end."""
    received = b""
    while len(received) < bytes_ and (data := connection.recv(bytes_ - len(received))):
        received += data
    return received


@pytest.mark.parametrize(("bytes_", "pause_s"), [(200_000, 0.02), (1_500_000, 0.15)])
def test_a_client_that_reads_slowly_gets_everything(port: int, bytes_: int, pause_s: float) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        connection.sendall(SCRIPT * 8 + HEALTH + b"Connection: close\r\n\r\n")
        received = b""
        while data := _read(connection, bytes_):
            received += data
            time.sleep(pause_s)

    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert received.count(b"HTTP/1.1 200") == 9
    assert len(received) > 8 * length  # more than the kernel buffers before any of it is read


@contextlib.contextmanager
def narrow_service(folder: Path, code: str, **settings: str) -> Iterator[tuple[Service, socket.socket]]:
    """A service started by *code*, and a connection to it with minimal socket buffers on both sides."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as connection:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(5)
        with running_service_on(listening, folder, sys.executable, "-c", code, **settings) as service:
            service.wait_until_started()
            connection.connect(listening.getsockname())
            yield service, connection


def test_reading_restarts_the_stall_timeout(tmp_path: Path) -> None:
    """Although more is unread than before: new responses have replaced the bytes that were read."""
    code = "import main\nfrom server import connections, protocol\nprotocol.STALL_CHECK_S = 0.1\n"
    code += "connections.STALL_TIMEOUT_S = 2.0\nmain.main([])"
    with narrow_service(tmp_path, code) as (service, connection):
        connection.sendall(HEALTH + b"\r\n")
        size = len(_until(b"}", connection))
        for _ in range((WRITE_BUFFER_MAX_BYTES + 15_000) // size):
            connection.sendall(HEALTH + b"\r\n")
            time.sleep(0.01)
        time.sleep(0.3)
        for bytes_ in (8_000, 6_000):  # half of the unread bytes, and then nearly all
            assert len(_read(connection, bytes_)) == bytes_
            time.sleep(1.4)

        assert "its client does not read" not in service.logged


def test_a_client_that_has_read_everything_is_not_disconnected(tmp_path: Path) -> None:
    with narrow_service(tmp_path, CODE) as (service, connection):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" + HEALTH + b"\r\n")
        assert len(_until(b'"status":"ok"', connection)) > 5 * WRITE_BUFFER_MAX_BYTES
        for _ in range(8):
            time.sleep(0.2)
            connection.sendall(HEALTH + b"\r\n")
            assert _until(b"}", connection).startswith(b"HTTP/1.1 200")

        assert "its client does not read" not in service.logged


def test_a_request_after_an_unread_response_is_not_started(tmp_path: Path) -> None:
    token = tokens.issue("alice", SECRET, 900)
    fields = f"Host: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n".encode()
    post = b"POST /api/alice/tasks HTTP/1.1\r\n" + fields + b'Content-Length: 14\r\n\r\n{"title": "x"}'
    with narrow_service(tmp_path, "import main; main.main([])", BETTER_AUTH_SECRET=SECRET) as (_, connection):
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" + post)
        time.sleep(0.5)
        with socket.create_connection(connection.getpeername(), timeout=5) as another:
            another.sendall(list_request().replace(b"Host", b"Connection: close\r\nHost"))
            assert _until(b"]", another).endswith(b"[]")

        assert b"HTTP/1.1 201" in _until(b'"title":"x"', connection)


def test_a_client_that_does_not_read_gets_a_bounded_number_of_responses(tmp_path: Path) -> None:
    request = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
    with narrow_service(tmp_path, "import main; main.main([])") as (service, connection):
        connection.sendall(request)
        size = len(_until(b"}", connection))
        for _ in range(8 * WRITE_BUFFER_MAX_BYTES // size // 10):
            connection.sendall(request * 10)
            time.sleep(0.05)
        time.sleep(0.5)

        answered = service.logged.count("path=/nothing")
        connection.close()

    assert 5 < answered < 3 * WRITE_BUFFER_MAX_BYTES // size


@pytest.mark.parametrize(
    ("last", "later"),
    [
        (b"", b""),
        (HEALTH + b"Connection: close\r\n\r\n", b""),
        (b"\0\r\n\r\n", b""),
        (b"", b"\0\r\n\r\n"),
        (b"", b"GET"),
    ],
    ids=["idle", "closing", "refused", "refused later", "half a head later"],
)
def test_a_client_that_leaves_a_little_unread_is_disconnected(
    tmp_path: Path, last: bytes, later: bytes
) -> None:
    """The unread bytes are too few to pause the service, but the connection would never close."""
    with narrow_service(tmp_path, IDLE + CODE) as (service, connection):
        connection.sendall((HEALTH + b"\r\n") * 20 + last)
        time.sleep(0.3)
        connection.sendall(later)
        deadline = time.monotonic() + 5
        while "its client does not read" not in service.logged:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                received += data

    assert received.count(b"HTTP/1.1 200") < 20


def test_a_request_sent_during_the_drain_is_answered_with_connection_close(tmp_path: Path) -> None:
    port = free_port()
    with running_service(tmp_path, "-c", CODE, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(HEALTH + b"\r\n")
            assert _until(b"}", connection).startswith(b"HTTP/1.1 200")

            service.process.terminate()
            time.sleep(0.1)  # the service is draining, but this client has not been told
            connection.sendall(HEALTH + b"\r\n")
            answer = _until(b"}", connection)

            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in answer
        assert service.process.wait(5) == 0


def test_the_drain_closes_an_idle_keep_alive_connection(tmp_path: Path) -> None:
    port = free_port()
    with running_service(tmp_path, "-c", CODE, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        with socket.create_connection(("127.0.0.1", port), timeout=3) as connection:  # keep-alive is 5 s
            connection.sendall(HEALTH + b"\r\n")
            assert _until(b"}", connection).startswith(b"HTTP/1.1 200")

            service.process.terminate()

            assert connection.recv(65536) == b""
        assert service.process.wait(5) == 0


@asynccontextmanager
async def locked_out(
    tmp_path: Path, postgres_url: str, *program: str, **settings: str
) -> AsyncIterator[tuple[int, Service, asyncpg.Connection]]:
    """A service with one database connection, and a transaction that locks the task table against reads."""
    port = free_port()
    settings |= {
        "DATABASE_URL": postgres_url,
        "DATABASE_POOL_SIZE": "1",
        "BETTER_AUTH_SECRET": SECRET,
        "MIGRATE_ON_START": "true",
        "PORT": str(port),
    }
    with running_service(tmp_path, *program, **settings) as service:
        await asyncio.to_thread(service.wait_for, f"http://127.0.0.1:{port}")
        locking = await asyncpg.connect(postgres_url)
        await locking.execute("BEGIN; LOCK TABLE task")
        yield port, service, locking
        await locking.close()


def list_request(user: str = "alice") -> bytes:
    token = tokens.issue(user, SECRET, 900)
    return f"GET /api/{user}/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


async def test_a_response_during_the_drain_has_connection_close(tmp_path: Path, postgres_url: str) -> None:
    async with locked_out(tmp_path, postgres_url) as (port, service, locking):
        reader, writer = await _connected(port, list_request())
        await _until_true(5, lambda: _waits_for_a_lock(locking))

        service.process.terminate()
        await asyncio.sleep(0.3)
        await locking.execute("ROLLBACK")

        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close\r\n" in answer
        writer.close()


@pytest.mark.parametrize("proxies", ["", "127.0.0.1"], ids=["a client", "a trusted proxy"])
def test_an_idle_connection_of_a_trusted_proxy_stays_open_longer(tmp_path: Path, proxies: str) -> None:
    port = free_port()
    with running_service(tmp_path, "-c", IDLE + CODE, PORT=str(port), TRUSTED_PROXIES=proxies) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        answer = exchange(port, HEALTH + b"\r\n")

    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"<not closed>") == bool(proxies)


async def test_the_keep_alive_timeout_does_not_end_a_running_request(
    tmp_path: Path, postgres_url: str
) -> None:
    async with locked_out(tmp_path, postgres_url, "-c", IDLE + CODE) as (port, _, locking):
        reader, writer = await _connected(port, HEALTH + b"\r\n")
        await reader.readuntil(b"}")

        writer.write(list_request())
        await asyncio.sleep(1.5)
        await locking.execute("ROLLBACK")

        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_request_that_takes_longer_than_the_drain_is_answered(
    tmp_path: Path, postgres_url: str
) -> None:
    async with locked_out(tmp_path, postgres_url, "-c", CODE) as (port, service, locking):
        reader, writer = await _connected(port, HEALTH + b"\r\n")
        await reader.readuntil(b"}")

        service.process.terminate()
        await asyncio.sleep(0.1)
        writer.write(list_request())
        await _until_true(5, lambda: _waits_for_a_lock(locking))
        await asyncio.sleep(1)  # twice the drain
        await locking.execute("ROLLBACK")

        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("proxies", ["", "127.0.0.1"], ids=["a client", "a trusted proxy"])
async def test_a_connection_answered_with_busy_503_is_read_again_after_a_pause(
    tmp_path: Path, postgres_url: str, proxies: str
) -> None:
    """A trusted proxy's connection is read at once, since it carries requests of other clients."""
    code = "import main\nfrom database import pool\n"
    code += "pool.WAITING_MAX_AT_LEAST = pool.WAITING_MAX_PER_CONNECTION = 0\nmain.main([])"
    locked = locked_out(tmp_path, postgres_url, "-c", code, TRUSTED_PROXIES=proxies)
    async with locked as (port, _, locking):
        _, waiting = await _connected(port, list_request())
        await _until_true(5, lambda: _waits_for_a_lock(locking))  # the only database connection is in use
        started = time.monotonic()
        reader, writer = await _connected(port, list_request("bob"))
        refused, refused_s = await reader.readuntil(b"}"), time.monotonic() - started
        writer.write(HEALTH + b"\r\n")
        answered, answered_s = await reader.read(65536), time.monotonic() - started
        for each in (waiting, writer):
            each.close()

    assert refused.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1\r\n" in refused.lower()
    assert b"The service is busy" in refused
    assert refused_s < 0.5
    assert answered.startswith(b"HTTP/1.1 200")
    assert (answered_s >= OVERLOADED_PAUSE_S) == (not proxies)


async def test_a_client_disconnect_cancels_its_statements(tmp_path: Path, postgres_url: str) -> None:
    async with locked_out(tmp_path, postgres_url) as (port, service, locking):
        hasty = [await _connected(port, list_request()) for _ in range(3)]
        await _until_true(5, lambda: _waits_for_a_lock(locking))
        for _, writer in hasty:
            writer.close()

        # Sooner than the statement timeout of 4 s would end the statement.
        await _until_true(2, lambda: _are_cancelled(service, locking, 3))

        await locking.execute("ROLLBACK")
        reader, writer = await _connected(port, list_request())
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()

    assert "Traceback" not in service.logged


async def _waits_for_a_lock(connection: asyncpg.Connection) -> bool:
    return bool(await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))


async def _are_cancelled(service: Service, locking: asyncpg.Connection, count: int) -> bool:
    return service.logged.count("status=499") == count and not await _waits_for_a_lock(locking)


async def _until_true(timeout_s: float, happened: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(timeout_s):
        while not await happened():  # noqa: ASYNC110 - another process sends no event
            await asyncio.sleep(0.01)


def _until(end: bytes, connection: socket.socket) -> bytes:
    received = b""
    while end not in received:
        data = connection.recv(65536)
        assert data, received[-200:]
        received += data
    return received


async def _connected(port: int, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    return reader, writer


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}], ids=["one connection", "many"])
def test_requests_leave_nothing_to_the_garbage_collector(tmp_path: Path, headers: dict[str, str]) -> None:
    """A reference cycle in each request cost 8 % of its CPU, one in each connection kept its last head."""
    port, metrics_port = free_port(), free_port()
    code = "import main\nfrom server import startup\nstartup.GC_THRESHOLD = 50\nmain.main([])"
    settings = {"PORT": str(port), "METRICS_PORT": str(metrics_port), "BETTER_AUTH_SECRET": SECRET}
    with running_service(tmp_path, "-c", code, **settings) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            client.headers["Authorization"] = f"Bearer {tokens.issue('alice', SECRET, 60)}"

            def request() -> None:
                client.post("/api/alice/tasks", json={"title": "Buy milk"}).raise_for_status()
                for path in ("", "/1", "/0", "/stats"):
                    client.get(f"/api/alice/tasks{path}")
                client.head("/nope")

            for _ in range(10):
                request()
            before = _collected(metrics_port)
            for _ in range(100):
                request()

            assert _collected(metrics_port) - before < 600  # not one for each request


def _collected(port: int) -> float:
    """Return how many objects the garbage collector of the service has freed."""
    shown = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    return sum(map(float, re.findall(r"^python_gc_objects_collected_total\{.*\} (.*)$", shown, re.MULTILINE)))
