"""The guide's cells: two databases, four processes, and HAProxy or nginx before them."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import os
import re
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx
import pytest

from auth import tokens
from server.heads import HEAD_MAX_BYTES
from tests import postgres, test_tasks
from tests.conftest import SECRET, Person, person
from tests.guides import block, execute
from tests.postgres import free_port, running_process
from tests.proxies import PROXIES, Proxy, running_proxy
from tests.service import UNMEASURED, Service, run, running_service
from tests.test_contract import CONFIG, SCHEMATHESIS
from tests.test_deploy import every_operation
from tests.test_events import POLLED_S, listening

pytestmark = [pytest.mark.process, pytest.mark.no_cover]

ORIGIN = "https://app.example.com"
BROWSER = {"Origin": ORIGIN}
ANONYMOUS_LIMIT = 100_000
METRICS_TOKEN = "a-token-that-only-the-tests-know-00001"
CONNECTIONS_MAX = 256  # of one address, in both configurations
SETTINGS = {
    "BETTER_AUTH_SECRET": SECRET,
    "MIGRATE_ON_START": "true",
    "TRUSTED_PROXIES": "127.0.0.1",
    "ALLOWED_ORIGINS": ORIGIN,
    "RATE_LIMIT": "off",
    "RATE_LIMIT_ANONYMOUS": f"{ANONYMOUS_LIMIT}/hour",
    "METRICS_TOKEN": METRICS_TOKEN,
    "LOG_FORMAT": "json",
} | UNMEASURED
UNFELT_S = 3.0  # 0.1 on an idle machine; waiting for a killed database takes 5.5 s
QUICK_S = 2.0  # HAProxy waits 0.5 s before it tries the last process again
OUTAGE_S = 7.0  # a process waits 5.5 s for its database before it refuses at once
RECOVERY_S = 15.0

# In the map from the start; each test takes its own.
OF_TWO = [f"listed{number}-{secrets.token_hex(6)}" for number in range(1_000)]
_unused = iter(OF_TWO)


@dataclass
class Cell:
    """A database and its two processes."""

    name: str
    database: postgres.Process
    folder: Path
    ports: list[int] = field(default_factory=lambda: [free_port(), free_port()])

    def __post_init__(self) -> None:
        self._ends = contextlib.ExitStack()
        self.services: dict[int, Service] = {}

    def start(self, *numbers: int) -> None:
        for number in numbers:
            folder = self.folder / f"{self.name}{number}"
            folder.mkdir(exist_ok=True)
            settings = SETTINGS | {
                "DATABASE_URL": self.database.url,
                "PORT": str(self.ports[number]),
                "LOCAL_ACCOUNTS": str(self.name == "one"),
            }
            self.services[number] = self._ends.enter_context(running_service(folder, **settings))
        for number in numbers:
            self.services[number].wait_for(f"http://127.0.0.1:{self.ports[number]}")

    def kill(self, *numbers: int) -> None:
        for number in numbers:
            self.services[number].process.kill()
            self.services[number].process.wait()

    def stop(self) -> None:
        for service in self.services.values():
            service.process.terminate()  # all at once
        self._ends.close()

    async def owners(self) -> set[str]:
        """Return the users who have rows in this cell, by table and all together."""
        connection = await asyncpg.connect(self.database.url)
        rows = await connection.fetch(
            "SELECT user_id FROM task UNION SELECT user_id FROM task_owner "
            "UNION SELECT user_id FROM idempotency_key"
        )
        await connection.close()
        return {row["user_id"] for row in rows}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cell, Cell]]:
    for kind in PROXIES:
        kind.program()  # before the rest is started for nothing
    folder = tmp_path_factory.mktemp("cells")
    with running_process() as first, running_process() as second:
        one, two = Cell("one", first, folder), Cell("two", second, folder)
        try:
            with ThreadPoolExecutor() as threads:
                list(threads.map(lambda cell: cell.start(0, 1), (one, two)))
            asyncio.run(execute(second.url, block("ids of the second cell")))
            yield one, two
        finally:
            one.stop()
            two.stop()


@pytest.fixture(scope="module")
def proxies(cells: tuple[Cell, Cell], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Proxy]]:
    ports = [cell.ports for cell in cells]
    with contextlib.ExitStack() as ends:
        yield [
            ends.enter_context(running_proxy(kind, tmp_path_factory.mktemp(kind.name), ports, users()))
            for kind in PROXIES
        ]


def users() -> dict[str, str]:
    return dict.fromkeys(OF_TWO, "two")


@pytest.fixture
def settled(proxies: list[Proxy]) -> list[Proxy]:
    """The proxies, started anew: workers from before a reload still close idle connections."""
    for proxy in proxies:
        proxy.stop()
        proxy.start()
    return proxies


@pytest.fixture(scope="module", params=[kind.name for kind in PROXIES])
def proxy(request: pytest.FixtureRequest, proxies: list[Proxy]) -> Proxy:
    return next(proxy for proxy in proxies if proxy.name == request.param)


@pytest.fixture(scope="module")
async def client(proxy: Proxy) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=proxy.address, timeout=30) as client:
        yield client


def person_of_two(client: httpx.AsyncClient) -> Person:
    user_id = next(_unused)
    return Person(user_id, client, tokens.issue(user_id, SECRET, 3600))


@pytest.fixture
def alice(client: httpx.AsyncClient) -> Person:
    return person_of_two(client)


@pytest.fixture
def bob(client: httpx.AsyncClient) -> Person:
    return person("bob", client)


ELSEWHERE = {"test_an_invalid_task_id_is_422"}  # one of the ids is %00, which a proxy refuses itself


def of_tasks() -> dict[str, Callable[..., Awaitable[None]]]:
    """Return the tests of `test_tasks.py` that only talk to the service."""
    return {
        name: test
        for name, test in vars(test_tasks).items()
        if name.startswith("test_")
        and name not in ELSEWHERE
        and not {"database_url", "tmp_path"} & set(inspect.signature(test).parameters)
    }


globals().update(of_tasks())


def test_the_tests_of_tasks_run_here_too() -> None:
    assert len(of_tasks()) > 50
    assert of_tasks().items() <= globals().items()


async def test_every_operation_works_through_the_proxy(client: httpx.AsyncClient, alice: Person) -> None:
    document = (await client.get("/openapi.json")).json()
    documented = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}

    assert await every_operation(client, alice) == documented


async def test_every_response_conforms_to_the_openapi_document(proxies: list[Proxy], tmp_path: Path) -> None:
    # The other phases take long, and find what the service does rather than what a proxy changes.
    options = [
        f"--config-file={CONFIG}",
        "run",
        "--phases=examples,stateful",
        "--exclude-path-regex=^/api/auth/",
    ]

    async def conforms(proxy: Proxy) -> str:
        user_id = next(_unused)
        settings = {"TOKEN": tokens.issue(user_id, SECRET, 3600), "USER_ID": user_id} | UNMEASURED
        document = f"{proxy.address}/openapi.json"
        tried = await asyncio.to_thread(run, tmp_path, SCHEMATHESIS, *options, document, **settings)
        return (
            tried.stdout + tried.stderr if tried.returncode else re.findall(r"Selected: \d+", tried.stdout)[0]
        )

    assert await asyncio.gather(*map(conforms, proxies)) == ["Selected: 19"] * 2


PLAIN = ["a b", "auth0|1", "ü@example.com", 'say "hi"; \\ $uri #x', "~^.*", "default", "A-z", "50%", "%zz"]
HIDDEN = ["a/b", "v1/x", "a/tasks"]


def spellings(user_id: str) -> list[str]:
    """Return paths of the same user's tasks."""
    plain = quote(user_id, safe="").replace(".", "%2E")
    encoded = "".join(f"%{byte:02x}" for byte in user_id.encode())
    last = f"%{ord(user_id[-1]):02X}"
    tails = itertools.cycle(["tasks", "tasks/", "t%61sks", "tasks?search=%2F&x=/../api/bob/tasks"])
    return [
        f"{prefix}/{spelled}/{next(tails)}"
        for prefix in ("/api", "/api/v1", "/%61pi/v1", "/api/%76%31")
        for spelled in (plain, encoded, quote(user_id[:-1], safe="").replace(".", "%2E") + last)
    ]


async def test_a_user_is_in_one_cell_however_their_id_is_spelled(
    proxy: Proxy, cells: tuple[Cell, Cell]
) -> None:
    ending = f"{secrets.token_hex(4)}{proxy.name}"
    of_one, of_two = ([f"{user_id}{mark}{ending}" for user_id in PLAIN] for mark in ("", "x"))
    hidden = [*(f"{user_id}{ending}" for user_id in HIDDEN), "." if proxy.name == "nginx" else ".."]
    # nginx finds these in the first cell, although they are not in the map.
    listed = of_one if proxy.name == "nginx" else of_one + hidden
    await change(proxy, dict.fromkeys(listed, "one"), default="two")

    async with connected(proxy) as client:
        for user_id in of_one + of_two + hidden:
            bearer = {"Authorization": f"Bearer {tokens.issue(user_id, SECRET, 60)}"}
            paths = spellings(user_id)
            for path in paths:
                answer = await client.post(path, headers=bearer, json={"title": "/"})
                assert answer.status_code == 201, (path, answer.text)
                assert answer.json()["user_id"] == user_id
            lists = [(await client.get(path, headers=bearer)).json() for path in paths[:4]]
            assert [len(found) for found in lists] == [len(paths)] * 4

    in_one, in_two = [await cell.owners() for cell in cells]
    assert set(of_one + hidden) <= in_one
    assert set(of_two) <= in_two
    assert in_one & in_two == set()
    await change(proxy, users())


@contextlib.asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client with connections of its own: a reload closes those that are idle."""
    async with httpx.AsyncClient(base_url=proxy.address, timeout=30) as client:
        yield client


async def change(proxy: Proxy, users: dict[str, str], default: str = "one") -> None:
    """Give *proxy* another map, and return once every connection is answered by it."""
    mark = f"mark{secrets.token_hex(6)}"
    proxy.write(users | {mark: "moving"}, default)
    await reloaded(proxy, mark)


async def reloaded(proxy: Proxy, mark: str) -> None:
    """Reload *proxy*, whose new map has the user *mark* as one who is moving."""
    proxy.reload()
    async with asyncio.timeout(RECOVERY_S):
        seen = 0
        while seen < 5:
            async with connected(proxy) as client:
                seen = seen + 1 if (await client.get(f"/api/{mark}/tasks")).status_code == 503 else 0
            await asyncio.sleep(0.02)


async def test_local_accounts_are_in_the_first_cell(
    client: httpx.AsyncClient, cells: tuple[Cell, Cell]
) -> None:
    account = {"name": "Alice", "email": f"{secrets.token_hex(8)}@example.com", "password": "correct horse"}
    created = await client.post("/api/auth/sign-up/email", json=account)
    again = await client.post("/api/auth/sign-up/email", json=account)
    alice = Person(created.json()["user"]["id"], client, created.json()["token"])
    await alice.create()

    assert [created.status_code, again.status_code] == [200, 422]
    assert alice.user_id in await cells[0].owners()


async def test_probes_and_documents_are_answered_and_metrics_are_not(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/health/ready", "/docs", "/openapi.json"):
        assert (await client.get(path)).status_code == 200
    for path in ("/metrics", "/metrics/", "/%6Detrics", "/metrics?x", "/nothing"):
        answer = await client.get(path, headers={"Authorization": f"Bearer {METRICS_TOKEN}"})
        assert (answer.status_code, answer.json()["detail"]) == (404, "There is nothing at this address")


async def test_events_arrive_as_they_happen(alice: Person, bob: Person) -> None:
    for someone in (alice, bob):
        async with listening(someone) as stream:
            await stream.next()
            began = time.monotonic()
            task = await someone.create()
            assert (await stream.next()).data == {"type": "changed", "task": task}
            assert time.monotonic() - began < POLLED_S


@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.3"])
async def test_the_service_learns_the_clients_address_from_the_proxy_alone(
    proxy: Proxy, client: httpx.AsyncClient, address: str
) -> None:
    forged = {"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https"}
    transport = httpx.AsyncHTTPTransport(local_address=f"{address}{5 + (proxy.name == 'nginx')}")
    async with httpx.AsyncClient(base_url=proxy.address, transport=transport) as elsewhere:
        answers = [
            await elsewhere.get("/api/alice/tasks", headers=forged | {"X-Forwarded-For": f"192.0.2.{number}"})
            for number in range(6)
        ]

    left = [int(re.findall(r"r=(\d+)", answer.headers["RateLimit"])[0]) for answer in answers]
    assert max(left) == ANONYMOUS_LIMIT - 1  # the first of this address
    assert min(left) <= ANONYMOUS_LIMIT - 3  # each process counts for itself
    assert not any("strict-transport-security" in answer.headers for answer in answers)


async def test_an_id_of_a_request_reaches_the_service(alice: Person) -> None:
    kept = await alice.get(headers={"X-Request-ID": "abc-1"})
    made = await alice.get(headers={"X-Request-ID": "not plain!"})

    assert kept.headers["X-Request-ID"] == "abc-1"
    assert re.fullmatch(r"[0-9a-f-]{32,36}", made.headers["X-Request-ID"])


@pytest.mark.parametrize(
    ("content", "fields", "status"),
    [
        (b"x" * 70_000, {}, 413),
        (b"x" * 2_000_000, {}, 413),
        (b"", {"X": "x" * (HEAD_MAX_BYTES - 2_000)}, 200),
        (b"", {"X": "x" * HEAD_MAX_BYTES}, 431),
        (b"", dict.fromkeys(map("X-{}".format, range(120)), "x"), 431),
    ],
    ids=["body", "larger body", "long head", "longer head", "many fields"],
)
async def test_what_is_too_large_is_refused_as_by_the_service(
    alice: Person, content: bytes, fields: dict[str, str], status: int
) -> None:
    answer = await alice.send("POST" if content else "GET", content=content, headers=fields)

    assert answer.status_code == status, answer.text
    assert is_problem(answer) == (status != 200)


async def test_one_address_may_have_so_many_connections(proxy: Proxy, bob: Person) -> None:
    port = int(proxy.address.rpartition(":")[2])
    head = f"POST {bob.tasks} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bob.token}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 13\r\n\r\n"
    connect = functools.partial(asyncio.open_connection, "127.0.0.1", port, local_addr=("127.0.0.4", 0))
    opened = [await connect() for _ in range(CONNECTIONS_MAX)]
    for _, writer in opened:
        writer.write(head.encode())  # and the body later
    elsewhere = await bob.get()
    async with asyncio.timeout(5):
        refused = b""
        while b" 429 " not in refused:
            reader, writer = await connect()
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            refused = await reader.read()
            writer.close()
    for _, writer in opened:
        writer.write(b'{"title":"x"}')
    answers = [await reader.readuntil(b"\r\n") for reader, _ in opened]
    for _, writer in opened:
        writer.close()

    assert elsewhere.status_code == 200
    assert b"application/problem+json" in refused
    assert b"retry-after: 1" in refused.lower()
    assert all(b" 201 " in answer or b" 429 " in answer for answer in answers)


def is_problem(answer: httpx.Response) -> bool:
    if answer.headers["Content-Type"] != "application/problem+json":
        return False
    found = answer.json()
    assert found["status"] == answer.status_code
    assert found["title"]
    assert found["detail"]
    assert found["instance"] == answer.headers["X-Request-ID"]
    return True


def is_away(answer: httpx.Response) -> bool:
    """Return whether *answer* is a 503 that a browser's page can read, with a time to come again."""
    assert answer.headers.get("Access-Control-Allow-Origin") == answer.request.headers.get("Origin")
    return answer.status_code == 503 and is_problem(answer) and int(answer.headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /%zz HTTP/1.1\r\nHost: x\r\n",
        b"GET /api/alice%00/tasks HTTP/1.1\r\nHost: x\r\n",
        b"GET /api/\xc3\xa9/tasks HTTP/1.1\r\nHost: x\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n",
        b"NONSENSE\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nNo Name: x\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n",
        b"TRACE / HTTP/1.1\r\nHost: x\r\n",
        b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n",
    ],
)
async def test_no_answer_is_html(proxy: Proxy, request_: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
    writer.write(request_ + b"Connection: close\r\n\r\n")
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()

    if answer or proxy.name == "nginx":  # HAProxy closes the connection on what is not HTTP
        assert re.match(rb"HTTP/1.1 [45]\d\d ", answer)
        assert b"content-type: application/problem+json" in answer.lower()


@pytest.mark.parametrize("cell", ["moving", "nowhere"])
async def test_a_user_who_is_being_moved_is_503_and_others_are_not(
    proxy: Proxy, cells: tuple[Cell, Cell], cell: str
) -> None:
    user_id = next(_unused)
    await change(proxy, users() | {user_id: cell})

    async with connected(proxy) as client:
        alice = Person(user_id, client, tokens.issue(user_id, SECRET, 60))
        for method in ("GET", "POST", "PATCH", "DELETE"):
            for headers in ({}, BROWSER):
                answer = await alice.send(method, headers=headers)
                assert is_away(answer)
        stranger = await alice.get(headers={"Origin": "https://example.net"})
        preflight = await client.options(
            alice.tasks, headers=BROWSER | {"Access-Control-Request-Method": "GET"}
        )
        bob = await person_of_two(client).get()

    assert "Access-Control-Allow-Origin" not in stranger.headers
    assert [preflight.status_code, bob.status_code] == [200, 200]
    assert user_id not in await cells[1].owners()
    await change(proxy, users())


async def test_the_end_of_a_process_is_not_felt(settled: list[Proxy], cells: tuple[Cell, Cell]) -> None:
    async with contextlib.AsyncExitStack() as ends:
        people = [person_of_two(await ends.enter_async_context(connected(proxy))) for proxy in settled]
        for each in people:
            await each.create()
        cells[1].kill(0)
        for alice in people:
            for _ in range(5):
                path = f"/{(await alice.create())['id']}"
                answers = [
                    await alice.get(path),
                    await alice.put(path, json={"title": "x"}),
                    await alice.patch(f"{path}/complete"),
                    await alice.delete(path),
                ]
                assert [answer.status_code for answer in answers] == [200, 200, 200, 204]
    cells[1].start(0)


BODY = b'{"title": "x"}'


async def after_a_moment(body: bytes) -> AsyncIterator[bytes]:
    """Yield a body that comes after its head: nginx repeats a PUT that comes in one piece."""
    await asyncio.sleep(0.02)
    yield body


async def test_a_write_is_never_sent_twice(settled: list[Proxy], cells: tuple[Cell, Cell]) -> None:
    """One process of the cell breaks off every request after it has read it."""
    received: Counter[str] = Counter()

    async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                if not head.startswith("GET /health/ready "):
                    (identifier,) = re.findall(r"(?i)^x-request-id: (.*)\r$", head, re.MULTILINE)
                    received[identifier] += 1
                    break
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async def tried(proxy: Proxy, method: str) -> None:
        async with connected(proxy) as client:
            alice = person_of_two(client)
            while not (created := await alice.post(json={"title": "x"})).is_success:
                pass
            path = "" if method in ("POST", "GET") else f"/{created.json()['id']}"
            path += "/complete" if method == "PATCH" else ""
            sent: list[tuple[str, httpx.Response]] = []
            async with asyncio.timeout(RECOVERY_S):
                while not any(received[identifier] for identifier, _ in sent):
                    identifier = f"{proxy.name}-{method}-{len(sent)}"
                    headers = {"X-Request-ID": identifier}
                    options: dict[str, Any] = {}
                    if method == "PUT":
                        headers |= {"Content-Type": "application/json", "Content-Length": str(len(BODY))}
                        options = {"content": after_a_moment(BODY)}
                    elif method == "POST":
                        options = {"json": {"title": "x"}}
                    answer = await alice.send(method, path, headers=headers, **options)
                    sent.append((identifier, answer))
            for identifier, answer in sent:
                is_broken_off = method != "GET" and received[identifier] > 0
                assert is_away(answer) == is_broken_off, (identifier, answer)
                assert answer.is_success != is_broken_off, (identifier, answer)
                assert received[identifier] <= 1
            if method == "POST":
                accepted = sum(answer.is_success for _, answer in sent)
                assert len((await alice.get()).json()) == accepted + 1

    cells[1].kill(0)
    async with await asyncio.start_server(break_off, "127.0.0.1", cells[1].ports[0]):
        for method in ("POST", "PUT", "PATCH", "GET"):
            await asyncio.gather(*(tried(proxy, method) for proxy in settled))
    cells[1].start(0)


@dataclass
class Load:
    """Requests of one user through one proxy, one after another, until they succeed after `is_ending`."""

    proxy: Proxy
    user_id: str
    is_ending: bool = False
    answers: list[tuple[float, float, httpx.Response]] = field(default_factory=list)

    async def run(self) -> None:
        async with connected(self.proxy) as client:
            someone = Person(self.user_id, client, tokens.issue(self.user_id, SECRET, 3600))
            while not self.is_ending or any(answer.is_error for _, _, answer in self.answers[-10:]):
                began = time.monotonic()
                if len(self.answers) % 2:
                    answer = await someone.post(json={"title": "x"}, headers=BROWSER)
                else:
                    answer = await someone.get(headers=BROWSER)
                self.answers.append((began, time.monotonic() - began, answer))
                await asyncio.sleep(0.02)

    def since(self, moment: float) -> list[tuple[float, httpx.Response]]:
        """Return duration and answer of the requests that began after *moment*."""
        return [(duration, answer) for began, duration, answer in self.answers if began > moment]


@contextlib.asynccontextmanager
async def under_load(proxies: list[Proxy]) -> AsyncIterator[list[Load]]:
    """Yield loads of users of the second cell, which recovers after the block by itself.

    No request of users of the first cell fails or is slow meanwhile.
    """
    in_one = [Load(proxy, f"bob{secrets.token_hex(6)}") for proxy in proxies]
    in_two = [Load(proxy, next(_unused)) for proxy in proxies]
    running = [asyncio.create_task(load.run()) for load in (*in_one, *in_two)]
    await asyncio.sleep(0.5)
    yield in_two
    for load in (*in_one, *in_two):
        load.is_ending = True
    async with asyncio.timeout(RECOVERY_S):
        await asyncio.gather(*running)
    for load in in_one:
        assert len(load.answers) > 50
        assert {answer.status_code for _, _, answer in load.answers} == {200, 201}
        assert max(duration for _, duration, _ in load.answers) < UNFELT_S


async def test_a_cell_whose_database_is_killed_is_not_felt_in_the_other(
    settled: list[Proxy], cells: tuple[Cell, Cell]
) -> None:
    database = cells[1].database
    async with under_load(settled) as in_two:
        await asyncio.to_thread(database.stop, signal.SIGQUIT)
        await asyncio.sleep(OUTAGE_S)
        late = time.monotonic()
        await asyncio.sleep(1)
        outage = [load.since(late) for load in in_two]
        await asyncio.to_thread(database.start)

    for answers in outage:
        assert len(answers) > 5
        assert all(is_away(answer) for _, answer in answers)
        assert max(duration for duration, _ in answers) < QUICK_S


async def test_a_cell_whose_processes_are_killed_is_not_felt_in_the_other(
    settled: list[Proxy], cells: tuple[Cell, Cell]
) -> None:
    async with under_load(settled) as in_two:
        await asyncio.to_thread(cells[1].kill, 0, 1)
        killed = time.monotonic()
        await asyncio.sleep(2.5)
        outage = [load.since(killed) for load in in_two]
        await asyncio.to_thread(cells[1].start, 0, 1)

    for answers in outage:
        assert len(answers) > 5
        assert all(is_away(answer) for _, answer in answers)
        assert max(duration for duration, _ in answers) < QUICK_S


def shell(title: str, folder: Path, **variables: str) -> None:
    """Run a block of the page in *folder*, with the programs of the tests' PostgreSQL."""
    path = f"{postgres.programs_folder()}:{os.environ['PATH']}"
    subprocess.run(["bash", "-euc", block(title)], cwd=folder, env={"PATH": path} | variables, check=True)


async def test_a_user_can_be_moved(proxy: Proxy, cells: tuple[Cell, Cell], tmp_path: Path) -> None:
    user_id = f"alice's \\.{secrets.token_hex(6)}"
    path = quote(user_id, safe="")
    token = tokens.issue(user_id, SECRET, 3600)
    keyed: dict[str, Any] = {
        "headers": {"Idempotency-Key": "once"},
        "json": {"title": "Once\n\\.\ttab", "tags": ["a", "b"]},
    }
    old, new = (cell.database.url for cell in cells)
    async with connected(proxy) as client, connected(proxy) as later:
        alice = Person(path, client, token)
        other = person("bob", client)
        kept = await other.create()
        once = (await alice.post(**keyed)).json()
        deleted = await alice.create("deleted")
        since = (await alice.get("/changes")).json()["next"]
        await alice.delete(f"/{deleted['id']}")
        listed = await alice.get()
        async with listening(alice) as stream:
            ready = await stream.next()

            await change(proxy, users() | {user_id: "moving"})
            shell("copy a user", tmp_path, OLD=old, NEW=new, ID=user_id)
            await change(proxy, users() | {user_id: "two"})
            shell("remove the old rows", tmp_path, OLD=old, ID=user_id)

            with pytest.raises(EOFError):
                await stream.next(POLLED_S)

        alice = Person(path, later, token)
        unchanged = await alice.get(headers={"If-None-Match": listed.headers["ETag"]})
        changes = (await alice.get("/changes", params={"since": since})).json()["changes"]
        again = await alice.post(**keyed)
        created = await alice.create()
        trash = (await alice.get("/trash")).json()
        async with listening(alice, **{"Last-Event-ID": ready.token or ""}) as stream:
            events = [(await stream.next()).data for _ in range(2)]
        assert (await Person(other.user_id, later, other.token).get()).json() == [kept]

    assert unchanged.status_code == 304
    assert [(each["type"], each["id"]) for each in changes] == [("deleted", deleted["id"])]
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (once, "true")
    assert once["id"] < 10**12 <= created["id"] < 2**53
    assert [each["id"] for each in trash] == [deleted["id"]]
    assert events[1] == {"type": "changed", "task": created}
    assert [user_id in await cell.owners() for cell in cells] == [False, True]
    await change(proxy, users())


async def test_a_new_cell_takes_new_users_only(proxy: Proxy, cells: tuple[Cell, Cell]) -> None:
    ending = f"{proxy.name}{secrets.token_hex(4)}"
    names = [f"{user_id}{ending}" for user_id in PLAIN]
    await change(proxy, users())
    async with connected(proxy) as client:
        of_one = [Person(quote(each, safe=""), client, tokens.issue(each, SECRET, 60)) for each in names]
        tasks = [await someone.create() for someone in of_one]
        (of_two := person_of_two(client)), (task_of_two := await of_two.create())

    shell(f"list for {proxy.title.split('/')[2]}", proxy.users.parent, ONE=cells[0].database.url)
    proxy.set_default("moving")
    await reloaded(proxy, "unknown")
    async with connected(proxy) as client:
        found = [await Person(each.user_id, client, each.token).get() for each in (*of_one, of_two)]
        assert [answer.json() for answer in found] == [[task] for task in (*tasks, task_of_two)]
        assert is_away(await person("carol", client).get())

    proxy.set_default("two")
    proxy.reload()
    async with asyncio.timeout(RECOVERY_S):
        while True:
            async with connected(proxy) as client:
                carol = person("carol", client)
                if (await carol.get()).is_success:
                    break
    async with connected(proxy) as client:
        carol = Person(carol.user_id, client, carol.token)
        while not (created := await carol.post(json={"title": "x"})).is_success:
            pass
    assert created.json()["id"] >= 10**12
    owners = [await cell.owners() for cell in cells]
    assert set(names) <= owners[0]
    assert owners[0] & owners[1] == set()
    await change(proxy, users())
