"""A load that records every response, and the faults that a database can suffer meanwhile."""

import asyncio
import contextlib
import itertools
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import asyncpg
import httpx

from config import Settings
from database import pool
from database import postgres as postgres_database
from main import create_app
from tests.conftest import Person, pages, person, running, settings_for
from tests.postgres import Process, Server
from tests.postgres_proxy import Proxy, running_proxy

CLIENTS = 32
ROLE = "service"
CALM_ANSWERS = 6 * CLIENTS  # successes awaited before the fault and again after it
CALM_TIMEOUT_S = 30
AFTER_S = 2.0  # the load goes on this long after the fault and records failures
# The service's timeouts, which are scaled like the faults.
SETTINGS = (
    "database_connect_timeout_s",
    "database_statement_timeout_s",
    "database_wait_s",
    "request_deadline_s",
)
CONSTANTS = (
    (pool, "END_TIMEOUT_S"),
    (pool, "CHECK_TIMEOUT_S"),
    (pool, "PATIENCE_S"),
    (pool, "RECONNECT_S"),
    (postgres_database, "CANCEL_S"),
)


@dataclass
class Account:
    """The requests sent and the responses received."""

    requests: int = 0
    successes: int = 0
    failures: list[float] = field(default_factory=list)  # times of the failures
    longest_s: float = 0.0
    longest_failure_s: float = 0.0
    odd: list[str] = field(default_factory=list)
    acknowledged: set[str] = field(default_factory=set)
    ended: float = math.inf  # time at which the fault ended
    served_again: dict[str, float] = field(default_factory=dict)  # first success after that, per user
    late_s: float = 0.0  # the longest oversleep of this process

    def note(self, someone: Person, answer: httpx.Response, started: float) -> None:
        took_s = time.monotonic() - started
        self.requests += 1
        self.longest_s = max(self.longest_s, took_s)
        if answer.is_success:
            self.successes += 1
            if started >= self.ended:
                self.served_again.setdefault(someone.user_id, time.monotonic())
            return
        self.failures.append(time.monotonic())
        self.longest_failure_s = max(self.longest_failure_s, took_s)
        is_problem = answer.headers.get("content-type") == "application/problem+json"
        if answer.status_code != 503 or not is_problem or "retry-after" not in answer.headers:
            self.odd.append(f"{answer.status_code} {answer.text}")


@dataclass(frozen=True)
class Outcome:
    account: Account
    began: float
    recovery_s: float  # from the end of the fault to the last failure or until every user is served, if later
    calm_s: float  # time of `CALM_ANSWERS` successes without a fault, which depends on the machine's load
    lost: int
    doubled: int


@dataclass(frozen=True)
class Scene:
    """The target of a fault: the server, the proxy in front of it, and the loaded database."""

    process: Process
    proxy: Proxy
    database: str
    scale: float

    async def last(self, seconds: float) -> None:
        """Keep the fault up for *seconds* times the scale."""
        await asyncio.sleep(seconds * self.scale)

    async def alter(self, change: str) -> None:
        """Alter the database and terminate its connections, since only new ones get the change."""
        await Server(self.process.url).execute(f'ALTER DATABASE "{self.database}" {change}')
        await self.terminate()

    async def terminate(self) -> None:
        await Server(self.process.url).execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self.database}'"
        )


Fault = Callable[[Scene], Awaitable[None]]


async def suffer(process: Process, fault: Fault, scale: float = 1.0) -> Outcome:
    """Run *fault* under a load of `CLIENTS` users, and return once all are served again.

    *scale* multiplies the fault's durations and the service's timeouts, which keeps their ratios.
    """
    server = Server(process.url)
    account = Account()
    async with _database_of_an_ordinary_role(server) as name:
        with _scaled(scale) as settings:
            async with running_proxy(server.url_of(name).replace("postgres@", f"{ROLE}@")) as proxy:
                app = create_app(settings_for(proxy.url, **settings))
                async with running(app) as client:
                    people = [person("alice", client) for _ in range(CLIENTS)]
                    async with _load(people, account):
                        before_s = await _calm(account)
                        began = time.monotonic()
                        await fault(Scene(process, proxy, name, scale))
                        account.ended = time.monotonic()
                        await asyncio.sleep(AFTER_S * scale)
                        await _calm(account)
                    listed = [page for each in people for page in await pages(each, "?limit=1000")]
    titles = [task["title"] for page in listed for task in page]
    return Outcome(
        account,
        began,
        max(*account.failures, *account.served_again.values()) - account.ended
        if len(account.served_again) == CLIENTS
        else math.inf,
        before_s,
        len(account.acknowledged - set(titles)),
        len(titles) - len(set(titles)),
    )


@contextlib.contextmanager
def _scaled(scale: float) -> Iterator[dict[str, float]]:
    """Scale the service's constants, and yield the scaled settings."""
    with contextlib.ExitStack() as stack:
        for module, name in CONSTANTS:
            stack.enter_context(mock.patch.object(module, name, getattr(module, name) * scale))
        yield {name: Settings.model_fields[name].default * scale for name in SETTINGS}


@contextlib.asynccontextmanager
async def _database_of_an_ordinary_role(server: Server) -> AsyncIterator[str]:
    """Yield a database owned by an ordinary role: limits do not apply to a superuser."""
    with contextlib.suppress(asyncpg.DuplicateObjectError):
        await server.execute(f"CREATE ROLE {ROLE} LOGIN")
    name = await server.create_database()
    try:
        await server.execute(f'ALTER DATABASE "{name}" OWNER TO {ROLE}')
        yield name
    finally:
        await server.drop_database(name)


@contextlib.asynccontextmanager
async def _load(people: list[Person], account: Account) -> AsyncIterator[None]:
    stopping = asyncio.Event()
    clients = [asyncio.create_task(_use(someone, account, stopping)) for someone in people]
    clients.append(asyncio.create_task(_watch(account, stopping)))
    try:
        yield
    finally:
        stopping.set()
        await asyncio.gather(*clients)


async def _calm(account: Account) -> float:
    """Wait for `CALM_ANSWERS` more successes, and return the seconds that they took."""
    began, enough = time.monotonic(), account.successes + CALM_ANSWERS
    async with asyncio.timeout(CALM_TIMEOUT_S):
        while account.successes < enough:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.01)
    return time.monotonic() - began


async def _watch(account: Account, stopping: asyncio.Event) -> None:
    """Record by how much the event loop oversleeps; the load and the service share this delay."""
    while not stopping.is_set():
        due = time.monotonic() + 0.01
        await asyncio.sleep(0.01)
        account.late_s = max(account.late_s, time.monotonic() - due)


async def _use(someone: Person, account: Account, stopping: asyncio.Event) -> None:
    """Read and write; retry failed writes by their Idempotency-Key, as a front end would."""
    for number in itertools.count():
        if stopping.is_set():
            return
        await _write(someone, account, f"{someone.user_id} {number}")
        await _write_until_done(someone, account, f"{someone.user_id} {number} with a key", stopping)
        started = time.monotonic()
        account.note(someone, await someone.get("?limit=5"), started)
        await asyncio.sleep(0.01)


async def _write(someone: Person, account: Account, title: str) -> None:
    started = time.monotonic()
    answer = await someone.post(json={"title": title})
    account.note(someone, answer, started)
    if answer.status_code == 201:
        account.acknowledged.add(title)


async def _write_until_done(someone: Person, account: Account, title: str, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        started = time.monotonic()
        answer = await someone.post(json={"title": title}, headers={"Idempotency-Key": title})
        if answer.status_code == 409:  # the first request with this key is still running
            await asyncio.sleep(0.1)
            continue
        account.note(someone, answer, started)
        if answer.status_code == 201:
            account.acknowledged.add(title)
            return
        await asyncio.sleep(0.1)


async def terminated(scene: Scene) -> None:
    for _ in range(5):
        await scene.terminate()
        await scene.last(0.2)


async def restarted(scene: Scene) -> None:
    await asyncio.to_thread(scene.process.stop)
    await asyncio.to_thread(scene.process.start)


async def crashed(scene: Scene) -> None:
    await asyncio.to_thread(scene.process.stop, signal.SIGQUIT)
    await asyncio.to_thread(scene.process.start)


async def asleep(scene: Scene) -> None:
    """Unreachable, but for less time than a suspended database may take to wake."""
    await asyncio.to_thread(scene.process.stop)
    await scene.last(4)
    await asyncio.to_thread(scene.process.start)


async def away(scene: Scene) -> None:
    await asyncio.to_thread(scene.process.stop)
    await scene.last(8)
    await asyncio.to_thread(scene.process.start)


async def read_only(scene: Scene) -> None:
    await scene.alter("SET default_transaction_read_only = on")
    await scene.last(1.5)
    await scene.alter("RESET default_transaction_read_only")


async def out_of_connections(scene: Scene) -> None:
    await scene.alter("CONNECTION LIMIT 2")
    await scene.last(2)
    await scene.alter("CONNECTION LIMIT -1")


async def without_connections(scene: Scene) -> None:
    await scene.alter("CONNECTION LIMIT 0")
    await scene.last(2)
    await scene.alter("CONNECTION LIMIT -1")


async def frozen(scene: Scene) -> None:
    scene.process.freeze()
    await scene.last(6)
    scene.process.thaw()


async def cut_off(scene: Scene) -> None:
    """Packets of old and new connections are lost; later, new connections work again."""
    scene.proxy.swallow(new_ones_too=True)
    await scene.last(6)
    scene.proxy.release()


async def forgotten(scene: Scene) -> None:
    """Packets of existing connections are lost; new connections work."""
    scene.proxy.swallow()
    await scene.last(5)  # until the last statement on one of them has timed out


async def slow_to_wake(scene: Scene) -> None:
    """All connections are closed; new ones are accepted but get no response for a while."""
    scene.proxy.hold()
    await scene.terminate()
    await scene.last(3.5)
    scene.proxy.release()
