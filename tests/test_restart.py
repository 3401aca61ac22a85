"""Stopping and starting services under load, as separate processes over real sockets."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from auth import tokens
from tests.conftest import SECRET, pages
from tests.postgres import free_port
from tests.service import UNMEASURED, Service, running_service, running_service_on

# Other tests cover these lines; coverage would only slow the load.
pytestmark = [pytest.mark.no_cover, pytest.mark.process]

CLIENTS = 16


@dataclass
class Load:
    """Responses to and failures of clients that send requests without pause."""

    address: str
    acknowledged: set[str] = field(default_factory=set)
    statuses: set[int] = field(default_factory=set)
    refused: int = 0
    broken: list[str] = field(default_factory=list)

    async def client(self, number: int, stopping: asyncio.Event) -> None:
        async with client_of(self.address) as client:
            for count in itertools.count():
                if stopping.is_set():
                    return
                await self._ask(client, f"{number}-{count}")

    async def _ask(self, client: httpx.AsyncClient, title: str) -> None:
        try:
            answer = await client.post("/api/alice/tasks", json={"title": title})
        except httpx.ConnectError:
            self.refused += 1
            await asyncio.sleep(0.05)
            return
        except httpx.TransportError as error:
            self.broken.append(repr(error))
            return
        self.statuses.add(answer.status_code)
        if answer.status_code == 201:
            self.acknowledged.add(title)


def client_of(address: str) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {tokens.issue('alice', SECRET, 3600)}"}
    return httpx.AsyncClient(base_url=address, headers=headers, timeout=15)


@asynccontextmanager
async def loading(address: str) -> AsyncIterator[Load]:
    load, stopping = Load(address), asyncio.Event()
    clients = [asyncio.create_task(load.client(number, stopping)) for number in range(CLIENTS)]
    try:
        yield load
    finally:
        stopping.set()
        await asyncio.gather(*clients)


async def titles(address: str) -> list[str]:
    async with client_of(address) as client:
        return [task["title"] for page in await pages(client, "/api/alice/tasks?limit=1000") for task in page]


def settings_of(url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": url,
        "BETTER_AUTH_SECRET": SECRET,
        "MIGRATE_ON_START": "true",
        "MAX_TASKS_PER_USER": "0",
        "RATE_LIMIT": "off",
    } | UNMEASURED


async def test_a_service_stopped_under_load_drops_no_request(url: str, tmp_path: Path) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with running_service(tmp_path, PORT=str(port), **settings_of(url)) as service:
        await asyncio.to_thread(service.wait_for, address)
        async with loading(address) as load:
            async with asyncio.timeout(20):
                while len(load.acknowledged) <= CLIENTS:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(0.05)

            code = await asyncio.to_thread(service.stop)

    with running_service(tmp_path, PORT=str(port), **settings_of(url)) as service:
        await asyncio.to_thread(service.wait_for, address)
        kept = await titles(address)

    assert code == 0
    assert load.broken == []
    assert load.statuses == {201}
    assert load.refused
    assert sorted(kept) == sorted(load.acknowledged)


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        yield listening


async def _start(stack: ExitStack, folder: Path, listening: socket.socket, url: str) -> Service:
    await asyncio.to_thread(folder.mkdir)
    service = stack.enter_context(running_service_on(listening, folder, **settings_of(url)))
    await asyncio.to_thread(service.wait_until_started)
    return service


async def test_two_processes_on_one_socket_are_replaced_without_a_failed_request(
    url: str, tmp_path: Path, listening: socket.socket
) -> None:
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with ExitStack() as stack:
        running = [await _start(stack, tmp_path / f"first-{number}", listening, url) for number in range(2)]
        async with loading(address) as load:
            await asyncio.sleep(0.5)
            for number, old in enumerate(running):
                assert await asyncio.to_thread(old.stop) == 0
                await _start(stack, tmp_path / f"second-{number}", listening, url)
            await asyncio.sleep(0.5)
        kept = await titles(address)

    assert (load.broken, load.refused, load.statuses) == ([], 0, {201})
    assert sorted(kept) == sorted(load.acknowledged)


async def test_four_processes_on_one_socket_act_as_one(
    url: str, tmp_path: Path, listening: socket.socket
) -> None:
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with ExitStack() as stack:
        services = [await _start(stack, tmp_path / str(number), listening, url) for number in range(4)]
        async with loading(address) as load:
            await asyncio.sleep(2)
        kept = await titles(address)  # with cursors that another process may have sealed
        # The kernel assigns connections to processes: enough connections reach more than one process.
        for _ in range(200):
            answered = [service for service in services if "path=/api/alice/tasks" in service.logged]
            if len(answered) > 1:
                break
            await asyncio.gather(*(titles(address) for _ in range(8)))

    assert sorted(kept) == sorted(load.acknowledged)
    assert load.statuses == {201}
    assert len(answered) > 1


async def test_a_request_that_outlasts_the_shutdown_grace_is_ended(url: str, tmp_path: Path) -> None:
    port = free_port()
    settings = settings_of(url) | {"SHUTDOWN_GRACE_S": "1", "PORT": str(port)}
    with running_service(tmp_path, **settings) as service:
        await asyncio.to_thread(service.wait_for, f"http://127.0.0.1:{port}")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        token = tokens.issue("alice", SECRET, 3600)
        head = f"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n".encode())
        await writer.drain()
        await asyncio.sleep(0.2)

        async with asyncio.timeout(4):
            code = await asyncio.to_thread(service.stop)
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    assert code == 0
