"""Many concurrent connections from many addresses to the service as its own process."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from auth import tokens
from server.connections import REFUSED_MAX
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import UNMEASURED, Service, running_service

pytestmark = pytest.mark.process

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
MEMORY_MAX_MB = 256  # the limit in docs/deploy.md
SETTINGS = {"BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off", **UNMEASURED}
TOKEN = tokens.issue("alice", SECRET, 3600)


def connect(port: int, address: str = "127.0.0.1") -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(5)
    connection.bind((address, 0))
    connection.connect(("127.0.0.1", port))
    return connection


def answer(connection: socket.socket) -> tuple[int, str]:
    """Return status and detail of the response, or (0, "") if the service has reset the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while b"}" not in received and (data := connection.recv(65536)):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body).get("detail", "")) if received else (0, "")


def resident_mb(service: Service) -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def highest_mb(service: Service, seconds: float) -> float:
    """Return the peak memory of the service within *seconds*."""
    end, highest = time.monotonic() + seconds, 0.0
    while time.monotonic() < end:
        highest = max(highest, resident_mb(service))
        time.sleep(0.05)
    return highest


@pytest.fixture
def connections() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def test_connections_beyond_the_limit_per_address_are_429(
    tmp_path: Path, connections: contextlib.ExitStack
) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port), MAX_CONNECTIONS_PER_ADDRESS="3", **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        held = [connections.enter_context(connect(port, "127.0.0.2")) for _ in range(3)]
        with connect(port, "127.0.0.2") as refused, connect(port, "127.0.0.3") as another:
            another.sendall(HEALTH)
            assert answer(another)[0] == 200
            refused.sendall(HEALTH)
            assert answer(refused) == (429, "Too many connections are open from your address")
        for connection in held:  # earlier connections are still served
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
        held[0].close()
        time.sleep(0.2)
        with connect(port, "127.0.0.2") as admitted:
            admitted.sendall(HEALTH)
            assert answer(admitted)[0] == 200


def test_a_trusted_proxy_is_exempt_from_the_limit_per_address(
    tmp_path: Path, connections: contextlib.ExitStack
) -> None:
    port = free_port()
    settings = SETTINGS | {"MAX_CONNECTIONS_PER_ADDRESS": "3", "TRUSTED_PROXIES": "127.0.0.0/30"}
    with running_service(tmp_path, PORT=str(port), **settings) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        for _ in range(10):
            connection = connections.enter_context(connect(port, "127.0.0.2"))
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200


def test_connections_beyond_the_limit_per_process_are_503(
    tmp_path: Path, connections: contextlib.ExitStack
) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port), MAX_CONNECTIONS="3", **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        time.sleep(0.2)  # that request's connection has closed
        held = [connections.enter_context(connect(port, f"127.0.0.{number}")) for number in (2, 3, 4)]
        for connection in held:
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
        refused = [connections.enter_context(connect(port)) for _ in range(60)]
        found = [answer(connection) for connection in refused]

        # The first ones get a 429; the next are reset, since each open connection holds a file descriptor.
        assert found.count((503, "The service is busy. Please try again.")) >= 50
        assert {status for status, _ in found} <= {503, 0}
        for connection in held:
            connection.close()
        time.sleep(0.2)
        with connect(port) as admitted:
            admitted.sendall(HEALTH)
            assert answer(admitted)[0] == 200


def test_only_a_bounded_number_of_refused_connections_gets_429_at_once(
    tmp_path: Path, connections: contextlib.ExitStack
) -> None:
    """The other connections are reset; closed connections make room for new 429s."""
    port = free_port()
    with running_service(tmp_path, PORT=str(port), MAX_CONNECTIONS_PER_ADDRESS="1", **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        held = connections.enter_context(connect(port, "127.0.0.2"))
        held.sendall(HEALTH)
        assert answer(held)[0] == 200

        refused = [connections.enter_context(connect(port, "127.0.0.2")) for _ in range(3 * REFUSED_MAX)]
        found = [answer(connection)[0] for connection in refused]
        assert set(found) == {429, 0}
        for connection in refused:
            connection.close()

        time.sleep(0.5)
        with connect(port, "127.0.0.2") as later:
            assert answer(later)[0] == 429
        held.close()


@pytest.mark.parametrize("field", [b"A: x\r\n", b"A: " + b"x" * 50_000], ids=["many fields", "a long one"])
@pytest.mark.parametrize("count", [350, 800])
def test_incomplete_heads_hold_little_memory(
    tmp_path: Path, connections: contextlib.ExitStack, count: int, field: bytes
) -> None:
    port = free_port()
    head = (b"GET /health HTTP/1.1\r\nHost: x\r\n" + field * 9_000)[:50_000]
    with running_service(tmp_path, PORT=str(port), **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        for number in range(count):
            connection = connections.enter_context(connect(port, f"127.0.{number // 200}.2"))
            with contextlib.suppress(ConnectionError):
                connection.sendall(head[: 30_000 if number % 2 else 50_000])

        assert highest_mb(service, 2) < MEMORY_MAX_MB * 0.6


def test_pipelined_requests_hold_little_memory(tmp_path: Path, connections: contextlib.ExitStack) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port), **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        for _ in range(80):
            connection = connections.enter_context(connect(port))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 9_000)

        assert highest_mb(service, 3) < MEMORY_MAX_MB / 2


def test_bodies_that_no_handler_reads_hold_little_memory(
    tmp_path: Path, connections: contextlib.ExitStack
) -> None:
    port = free_port()
    post = b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 250_000
    with running_service(tmp_path, PORT=str(port), **SETTINGS) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        for _ in range(250):
            connection = connections.enter_context(connect(port))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                connection.sendall(post)

        assert highest_mb(service, 3) < MEMORY_MAX_MB / 2


def test_unread_responses_hold_little_memory(tmp_path: Path, connections: contextlib.ExitStack) -> None:
    """80 connections from each of two addresses request pages of 1 MiB and read nothing."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with running_service(tmp_path, PORT=str(port), **SETTINGS) as service:
        service.wait_for(address)
        people = {"127.0.0.1": "alice", "127.0.0.2": "bob"}  # requests of one user would wait for one another
        heads = {}
        for client_address, user_id in people.items():
            bearer = f"Bearer {tokens.issue(user_id, SECRET, 3600)}"
            path = f"/api/{user_id}/tasks"
            heads[client_address] = f"GET {path}?limit=1000 HTTP/1.1\r\nHost: x\r\nAuthorization: {bearer}"
            with httpx.Client(base_url=address, headers={"Authorization": bearer}) as client:
                operation = {"op": "create", "task": {"title": "x", "description": "x" * 640}}
                for _ in range(20):
                    created = client.post(f"{path}/bulk", json={"operations": [operation] * 50})
                    assert created.is_success, created.text
                page = len(client.get(f"{path}?limit=1000").content)
                assert 900_000 < page < 1_100_000
        before = resident_mb(service)
        for client_address, head in heads.items():
            for _ in range(80):
                connection = connections.enter_context(connect(port, client_address))
                connection.sendall(f"{head}\r\n\r\n".encode() * 6)

        highest = highest_mb(service, 10)
        assert httpx.get(f"{address}/health").status_code == 200

    assert before < highest < MEMORY_MAX_MB
    assert "too many bytes are unread" in service.logged
