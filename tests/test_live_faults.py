"""A device that follows events, and catches up by changes after a fault, ends equal to the list."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import SECRET, Person
from tests.postgres import Process, Server, free_port, running_process
from tests.service import UNMEASURED, Service, running_service
from tests.test_events import listening, person_at

pytestmark = [pytest.mark.process, pytest.mark.no_cover]

RUNS = int(os.environ.get("LIVE_FAULT_RUNS", "1"))
WRITERS = 4
BEFORE, AFTER = 40, 40  # acknowledged writes before the fault, and after it
FAULT_S = 1.0
PATIENCE_S = 60.0
UNANSWERED = (httpx.TransportError, TimeoutError)


class Follower:
    """A device that listens, and reads what it has missed whenever a stream breaks."""

    def __init__(self, owner: Person) -> None:
        self.owner = owner
        self.tasks: dict[int, dict[str, Any]] = {}
        self.token: str | None = None
        self.breaks = 0
        self.ready, self.received = asyncio.Event(), asyncio.Event()

    async def follow(self) -> None:
        """Listen until cancelled."""
        while True:
            with contextlib.suppress(EOFError, *UNANSWERED):
                if await self.catch_up():
                    await self._listen()
            self.breaks += 1
            await asyncio.sleep(0.05)

    async def catch_up(self) -> bool:
        """Apply all pages of changes; return False if one was refused."""
        more = True
        while more:
            known = {} if self.token is None else {"since": self.token}
            answer = await self.owner.get("/changes", params={"limit": "7"} | known)
            if not answer.is_success:
                assert answer.status_code == 503
                return False
            page = answer.json()
            for change in page["changes"]:
                self._apply(change)
            self.token, more = page["next"], page["has_more"]
        return True

    async def _listen(self) -> None:
        async with listening(self.owner, **{"Last-Event-ID": str(self.token)}) as stream:
            while True:
                name, data, token = await stream.next(PATIENCE_S)
                if name == "end":
                    return
                if name == "ready":
                    self.ready.set()
                else:
                    self.received.set()
                    self._apply(data)
                self.token = token

    def _apply(self, change: dict[str, Any]) -> None:
        if change["type"] == "deleted":
            self.tasks.pop(change["id"], None)
        else:
            self.tasks[change["task"]["id"]] = change["task"]


class Writers:
    """Clients that create, change and delete tasks, and remember which writes were acknowledged."""

    def __init__(self, owner: Person) -> None:
        self.owner = owner
        self.created: set[int] = set()
        self.deleted: set[int] = set()
        self.uncertain: set[int] = set()  # whose deletion was not answered
        self.count = 0

    async def write(self, number: int) -> None:
        """Write until cancelled; an unanswered request is not repeated."""
        while True:
            try:
                answer = await self.owner.post(json={"title": f"of {number}"})
                if answer.status_code != 201:
                    await asyncio.sleep(0.05)
                    continue
                task_id = answer.json()["id"]
                self.created.add(task_id)
                self.count += 1
                await self.owner.patch(f"/{task_id}/complete")
                if task_id % 3 == 0:
                    self.uncertain.add(task_id)
                    if (await self.owner.delete(f"/{task_id}")).status_code == 204:
                        self.deleted.add(task_id)
            except UNANSWERED:
                await asyncio.sleep(0.05)

    async def more(self, count: int) -> None:
        wanted = self.count + count
        async with asyncio.timeout(PATIENCE_S):
            while self.count < wanted:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.02)


@contextlib.contextmanager
def serving(folder: Path, url: str, port: int) -> Any:
    folder.mkdir(exist_ok=True)
    settings = {"PORT": str(port), "DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off"}
    with running_service(folder, MIGRATE_ON_START="true", **settings, **UNMEASURED) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield service


async def suffer(reader: Person, writer: Person, fault: Callable[[], Any]) -> tuple[Follower, Writers]:
    """Let a device follow while others write and *fault* happens; return both after it has caught up."""
    follower, writers = Follower(reader), Writers(writer)
    tasks = [asyncio.create_task(follower.follow())]
    # Otherwise the device might get every change by catching up, and no event.
    await asyncio.wait_for(follower.ready.wait(), PATIENCE_S)
    tasks += [asyncio.create_task(writers.write(number)) for number in range(WRITERS)]
    await writers.more(BEFORE)
    await asyncio.to_thread(fault)
    await writers.more(AFTER)
    await asyncio.wait_for(follower.received.wait(), PATIENCE_S)
    for task in tasks:
        task.cancel()
    failures = [each for each in await asyncio.gather(*tasks, return_exceptions=True) if each]
    assert all(isinstance(each, asyncio.CancelledError) for each in failures), failures

    assert await follower.catch_up()
    listed = {task["id"]: task for task in (await reader.get()).json()}
    assert follower.tasks == listed
    assert writers.created - writers.uncertain <= listed.keys()
    assert not writers.deleted & listed.keys()
    return follower, writers


@contextlib.asynccontextmanager
async def people(*ports: int) -> AsyncIterator[list[Person]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [
            person_at(
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=httpx.Timeout(15))
                )
            )
            for port in ports
        ]


@pytest.mark.parametrize("run", range(RUNS))
async def test_a_killed_service_lets_no_device_miss_a_change(url: str, tmp_path: Path, run: int) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        services: list[Service] = [stack.enter_context(serving(tmp_path, url, port))]

        def kill() -> None:
            services[-1].process.kill()
            services[-1].process.wait()
            services.append(stack.enter_context(serving(tmp_path, url, port)))

        async with people(port, port) as (reader, writer):
            follower, _ = await suffer(reader, writer, kill)
    assert follower.breaks


@pytest.mark.parametrize("run", range(RUNS))
async def test_changes_of_another_process_are_not_missed(url: str, tmp_path: Path, run: int) -> None:
    ports = free_port(), free_port()
    with serving(tmp_path / "one", url, ports[0]), serving(tmp_path / "two", url, ports[1]):
        async with people(*ports) as (reader, writer):
            await suffer(reader, writer, lambda: None)


def restart(process: Process) -> None:
    process.stop()
    process.start()


def freeze(process: Process) -> None:
    process.freeze()
    try:
        time.sleep(FAULT_S)
    finally:
        process.thaw()


@pytest.fixture(scope="module")
def process() -> Any:
    with running_process(durable=True) as process:
        yield process


@pytest.mark.parametrize("fault", [restart, freeze])
@pytest.mark.parametrize("run", range(RUNS))
async def test_a_fault_of_the_database_lets_no_device_miss_a_change(
    process: Process, tmp_path: Path, fault: Callable[[Process], None], run: int
) -> None:
    port, name = free_port(), f"live_{fault.__name__}_{run}"
    server = Server(process.url)
    await server.execute(f"CREATE DATABASE {name}")
    with serving(tmp_path, server.url_of(name), port):
        async with people(port, port) as (reader, writer):
            await suffer(reader, writer, lambda: fault(process))
