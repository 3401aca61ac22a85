import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from sqlalchemy import delete

import db
from auth import tokens
from queries.owner import TASKS
from queries.revisions import OWNERS
from tests.conftest import SECRET, Person
from tests.postgres import free_port, running_process
from tests.service import Service, running_service

pytestmark = [pytest.mark.process, pytest.mark.no_cover]

Served = tuple[httpx.AsyncClient, Service]
SOON_S = 0.5  # of this process; 0.2 on an idle machine
POLLED_S = 3.0  # of another process; 1.5 on an idle machine


class Event(NamedTuple):
    name: str
    data: dict[str, Any]
    token: str | None


class Stream:
    """An open event stream."""

    def __init__(self, answer: httpx.Response) -> None:
        self.answer = answer
        self._lines = answer.aiter_lines()

    async def next(self, within_s: float = 10.0) -> Event:
        """Return the next event."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(within_s):
            async for line in self._lines:
                if not line and "event" in fields:
                    return Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
                name, _, value = line.partition(": ")
                fields[name] = value
        raise EOFError


@contextlib.asynccontextmanager
async def listening(someone: Person, query: str = "", **headers: str) -> AsyncIterator[Stream]:
    path = f"{someone.tasks}/events{query}"
    headers |= {"Authorization": f"Bearer {someone.token}"}
    async with someone.client.stream("GET", path, headers=headers, timeout=30) as answer:
        yield Stream(answer)


def person_at(client: httpx.AsyncClient, user_id: str = "alice", lifetime_s: float = 3600) -> Person:
    return Person(user_id, client, tokens.issue(user_id, SECRET, lifetime_s))


@contextlib.asynccontextmanager
async def serving(folder: Path, url: str, **settings: str) -> AsyncIterator[Served]:
    port = free_port()
    options = {"PORT": str(port), "DATABASE_URL": url, "BETTER_AUTH_SECRET": SECRET, "RATE_LIMIT": "off"}
    options |= {"MIGRATE_ON_START": "true", "LOG_FORMAT": "json"} | settings
    address = f"http://127.0.0.1:{port}"
    with running_service(folder, **options) as service:
        await asyncio.to_thread(service.wait_for, address)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, limits=limits) as client:
            yield client, service


@pytest.fixture(scope="module")
async def served(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One service for all tests that need no settings of their own; each has users of its own."""
    async with serving(tmp_path_factory.mktemp("served"), database_url) as found:
        yield found


def new_person(client: httpx.AsyncClient) -> Person:
    return person_at(client, f"alice{secrets.token_hex(6)}")


async def test_changes_arrive_as_they_happen(served: Served) -> None:
    client, _ = served
    alice, bob = new_person(client), new_person(client)
    old = await alice.create("old")
    async with listening(alice) as stream:
        assert stream.answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert stream.answer.headers["cache-control"] == "no-store"
        ready = await stream.next()
        assert (ready.name, ready.data) == ("ready", {})

        await bob.create("of another user")
        began = time.monotonic()
        new = await alice.create("new")
        event = await stream.next()
        assert time.monotonic() - began < SOON_S
        assert (event.name, event.data) == ("changed", {"type": "changed", "task": new})

        await alice.delete(f"/{old['id']}")
        gone = await stream.next()
        assert (gone.name, gone.data["type"], gone.data["id"]) == ("deleted", "deleted", old["id"])

        await alice.post("/bulk", json={"operations": [{"op": "create", "task": {"title": "x"}}] * 3})
        several = [await stream.next() for _ in range(3)]
        assert [each.data["task"]["title"] for each in several] == ["x"] * 3
        assert len({each.token for each in (ready, event, gone, *several)}) == 6

    since = (await alice.get("/changes", params={"since": several[0].token})).json()["changes"]
    assert since == [each.data for each in several[1:]]


async def titles(stream: Stream, count: int) -> list[str]:
    events = [await stream.next() for _ in range(count)]
    return [event.data["task"]["title"] if "task" in event.data else event.name for event in events]


async def test_a_stream_resumes_after_the_last_event_that_arrived(served: Served) -> None:
    client, _ = served
    alice = new_person(client)
    async with listening(alice) as stream:
        ready = await stream.next()
        await alice.create("first")
        first = await stream.next()
    await alice.create("second")

    async with listening(alice, **{"Last-Event-ID": str(first.token)}) as stream:
        assert await titles(stream, 2) == ["ready", "second"]
    # Last-Event-ID, which a reconnecting browser sends, wins over the query of the first connection.
    async with listening(alice, f"?since={ready.token}", **{"Last-Event-ID": str(first.token)}) as stream:
        assert await titles(stream, 2) == ["ready", "second"]
    async with listening(alice, f"?since={ready.token}") as stream:
        assert await titles(stream, 3) == ["ready", "first", "second"]


async def test_changes_of_another_process_arrive_too(url: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with serving(folders[0], url) as (client, _), serving(folders[1], url) as (other, _):
        async with listening(person_at(client)) as stream:
            await stream.next()
            began = time.monotonic()
            task = await person_at(other).create()
            event = await stream.next()
            assert time.monotonic() - began < POLLED_S
            assert event.data["task"] == task

        async with listening(person_at(other), f"?since={event.token}") as stream:  # its token holds there
            await stream.next()
            await person_at(client).delete(f"/{task['id']}")
            assert (await stream.next()).name == "deleted"


async def test_a_second_stream_takes_no_change_from_the_first(url: str, tmp_path: Path) -> None:
    """Each stream knows up to where it has read: the poll must not take one's reading for the other's."""
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    async with serving(folders[0], url) as (client, _), serving(folders[1], url) as (other, _):
        alice, elsewhere = person_at(client), person_at(other)
        async with listening(alice) as first:
            await first.next()
            await asyncio.sleep(1.2)  # a poll has passed
            for number in range(3):
                task = await elsewhere.create(str(number))
                async with listening(alice) as second:
                    await second.next()
                    event = await first.next(POLLED_S)
                assert event.data["task"] == task


async def test_a_stream_ends_when_its_user_is_moved_to_another_database(
    served: Served, database_url: str
) -> None:
    alice = new_person(served[0])
    await alice.create()
    engine = db.connect(database_url, pool_size=1).engine()
    async with listening(alice) as stream:
        await stream.next()
        async with engine.begin() as connection:
            for table in (TASKS, OWNERS):
                await connection.execute(delete(table).where(table.c.user_id == alice.user_id))

        with pytest.raises(EOFError):
            await stream.next(POLLED_S)
    await engine.dispose()


async def test_a_burst_of_the_same_user_ends_no_stream(served: Served) -> None:
    """The user's share of the database is taken by the requests, so reading has to wait for its turn."""
    shared, service = served
    # A client of its own: the server closes the idle connections of a burst while the next test begins.
    async with httpx.AsyncClient(base_url=shared.base_url, timeout=shared.timeout) as client:
        alice = new_person(client)
        async with listening(alice) as stream:
            await stream.next()
            answers = await asyncio.gather(*(alice.post(json={"title": "x"}) for _ in range(300)))
            created = [answer for answer in answers if answer.status_code == 201]
            assert created
            for _ in created:
                assert (await stream.next()).name == "changed"
    assert '"crash"' not in service.logged


async def test_http_1_0_cannot_have_a_stream(served: Served) -> None:
    client, _ = served
    alice = new_person(client)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    head = f"GET {alice.tasks}/events HTTP/1.0\r\nAuthorization: Bearer {alice.token}\r\n\r\n"
    writer.write(head.encode())
    answer = (await reader.read()).decode()
    writer.close()

    assert answer.startswith("HTTP/1.1 426 ")
    assert "upgrade: HTTP/1.1" in answer
    assert "Event streams need HTTP/1.1" in answer


async def test_streams_end_at_once_although_the_database_is_frozen(tmp_path: Path) -> None:
    with running_process() as database:
        async with (
            serving(tmp_path, database.url) as (client, service),
            listening(person_at(client)) as stream,
        ):
            await stream.next()
            await person_at(client).create()
            await stream.next()
            database.freeze()
            try:
                writing = asyncio.create_task(person_at(client).post(json={"title": "x"}, timeout=20))
                await asyncio.sleep(1.5)  # the poll waits, too
                stopping = asyncio.create_task(asyncio.to_thread(service.stop))
                assert await stream.next(2) == Event("end", {"reason": "shutting-down"}, None)
            finally:
                database.thaw()
            await stopping
            await asyncio.gather(writing, return_exceptions=True)


async def test_a_stream_ends_at_once_when_the_service_stops(url: str, tmp_path: Path) -> None:
    async with serving(tmp_path, url) as (client, service), listening(person_at(client)) as stream:
        await stream.next()
        began = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(service.stop))
        assert await stream.next() == Event("end", {"reason": "shutting-down"}, None)
        assert await stopping == 0
        assert time.monotonic() - began < 3
        lines = [json.loads(line) for line in service.logged.splitlines()]
        (line,) = [line for line in lines if str(line.get("route")).endswith("/events")]
        assert (line["status"], line["user_id"]) == (200, "alice")


async def test_a_stream_ends_with_its_token(url: str, tmp_path: Path) -> None:
    async with (
        serving(tmp_path, url, JWT_LEEWAY_S="0") as (client, _),
        listening(person_at(client, lifetime_s=4)) as stream,
    ):
        assert (await stream.next()).name == "ready"
        assert await stream.next() == Event("end", {"reason": "token-expired"}, None)
        with pytest.raises(EOFError):
            await stream.next()


async def eventually_open(client: httpx.AsyncClient, count: int, within_s: float = 5.0) -> None:
    """Wait until the metrics say that *count* streams are open."""
    async with asyncio.timeout(within_s):
        while f"\nevent_streams_open {count}.0\n" not in (await client.get("/metrics")).text:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.1)


async def test_streams_are_limited_by_user_and_process(url: str, tmp_path: Path) -> None:
    settings = {"MAX_STREAMS_PER_USER": "2", "MAX_STREAMS": "3"}
    async with serving(tmp_path, url, **settings) as (client, _), contextlib.AsyncExitStack() as stack:
        streams = []
        for user_id in ("alice", "alice", "bob"):
            streams.append(await stack.enter_async_context(listening(person_at(client, user_id))))
            assert (await streams[-1].next()).name == "ready"

        refused = await person_at(client).get("/events")
        full = await person_at(client, "carol").get("/events")
        assert (refused.status_code, full.status_code) == (429, 503)
        assert refused.headers["retry-after"] == full.headers["retry-after"] == "5"

        await eventually_open(client, 3)
        assert "\nhttp_requests_in_flight 1.0\n" in (await client.get("/metrics")).text
        await stack.pop_all().aclose()
        await eventually_open(client, 0)


async def test_a_stream_needs_a_token_and_obeys_the_rules_of_others(
    served: Served,
) -> None:
    client, _ = served
    alice = new_person(client)
    assert (await client.get(f"{alice.tasks}/events")).status_code == 401
    assert (await alice.get("/api/bob/tasks/events")).status_code == 403
    assert (await alice.get("/events?since=x")).status_code == 422
    wrong = await alice.get("/events", headers={"Last-Event-ID": "x"})
    assert wrong.json()["errors"][0]["parameter"] == "Last-Event-ID"

    head = await alice.send("HEAD", "/events")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")


async def test_a_client_that_reads_nothing_is_cut_off_and_can_resume(tmp_path: Path) -> None:
    """It holds neither memory nor the others up."""
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    long = {"op": "create", "task": {"title": "x", "description": "y" * 1000}}
    async with serving(tmp_path, url) as (client, service):
        alice = person_at(client)
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port, limit=1024)
        head = f"GET {alice.tasks}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {alice.token}"
        writer.write(f"{head}\r\n\r\n".encode())
        async with listening(alice) as other:
            await other.next()
            for _ in range(160):  # 8 MB, more than the sockets hold
                await alice.post("/bulk", json={"operations": [long] * 40})
            seen = [await other.next() for _ in range(160 * 40)]
            assert len({each.data["task"]["id"] for each in seen}) == 160 * 40
            await eventually_open(client, 1, within_s=60)
        received = await asyncio.wait_for(reader.read(-1), 10)
        assert received.endswith(b'event: end\ndata: {"reason":"too-slow"}\n\n\r\n0\r\n\r\n'), received[-300:]
        writer.close()
        assert service.process.poll() is None


async def test_a_stream_that_says_nothing_sends_a_comment(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    async with serving(tmp_path, url) as (client, _), listening(person_at(client)) as stream:
        assert (await stream.next()).name == "ready"
        assert await asyncio.wait_for(anext(stream._lines), 20) == ":"
