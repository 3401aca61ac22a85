"""The real app on both databases, and its users."""

import asyncio
import io
import json
import logging
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import httpx
import pytest
import structlog
from fastapi import FastAPI

import db
import middleware.auth
import routes.accounts
from auth import tokens
from config import Settings
from main import create_app
from middleware.front import FrontMiddleware
from observability import logs
from queries import idempotency, purge
from server.startup import migrate
from tests import service
from tests.citus import Cluster
from tests.postgres import Server, running_server
from web.counters import LocalStorage
from web.rate_limits import RateLimits

logging.getLogger("httpx").setLevel(logging.WARNING)  # httpx's lines would mix with the service's log

NEVER_S = 1e9
SECRET = "a-secret-that-only-the-tests-know-0001"


@dataclass(frozen=True)
class Person:
    """A user with a token, and a client whose relative paths are below that user's tasks."""

    user_id: str
    client: httpx.AsyncClient
    token: str

    @property
    def tasks(self) -> str:
        return f"/api/{self.user_id}/tasks"

    async def send(self, method: str, path: str = "", **options: Any) -> httpx.Response:
        """Send a request to *path*: below the user's tasks, or an absolute path."""
        url = path if path.startswith("/api/") else f"{self.tasks}{path}"
        headers = {"Authorization": f"Bearer {self.token}"}
        if "json" in options:  # httpx's encoder cannot send null or an unpaired surrogate
            options["content"] = json.dumps(options.pop("json"))
            headers["Content-Type"] = "application/json"
        headers |= options.pop("headers", {})
        return await self.client.request(method, url, headers=headers, **options)

    async def get(self, path: str = "", **options: Any) -> httpx.Response:
        return await self.send("GET", path, **options)

    async def post(self, path: str = "", **options: Any) -> httpx.Response:
        return await self.send("POST", path, **options)

    async def put(self, path: str, **options: Any) -> httpx.Response:
        return await self.send("PUT", path, **options)

    async def patch(self, path: str, **options: Any) -> httpx.Response:
        return await self.send("PATCH", path, **options)

    async def delete(self, path: str, **options: Any) -> httpx.Response:
        return await self.send("DELETE", path, **options)

    async def create(self, title: str = "Buy milk", **fields: Any) -> dict[str, Any]:
        answer = await self.post(json={"title": title, **fields})
        assert answer.status_code == 201, answer.text
        task: dict[str, Any] = answer.json()
        return task


def reset_log() -> None:
    """Reset structlog to its defaults, but with plain tracebacks.

    By default Rich, a dependency of Schemathesis, prints all local variables: 5 s, with coverage 16 s.
    """
    structlog.reset_defaults()
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure([*structlog.get_config()["processors"][:-1], renderer])


reset_log()


class Log(io.StringIO):
    def events(self, name: str) -> list[dict[str, Any]]:
        for handler in logging.getLogger().handlers:
            handler.flush()
        lines = [json.loads(line) for line in self.getvalue().splitlines()]
        return [line for line in lines if line["event"] == name]


@pytest.fixture
def log_format() -> str:
    return "json"


@pytest.fixture
def log(log_format: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """The log of services started from now on, in the format that they write to standard error."""
    for module in (middleware.auth, routes.accounts):  # an earlier test may have used up this second's lines
        monkeypatch.setattr(module, "_log", logs.BoundedLog("security"))
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    log = Log()
    logs.configure("info", log_format, log)
    yield log
    reset_log()
    root.handlers = handlers
    root.setLevel(level)


class Clock:
    """Replaces the module `time`; tests advance `now`."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the whole suite in several processes, since many tests wait; run named tests in this process."""
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS or config.option.keyword:
        return 0
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run files that measure time first, then files that start processes, which take longest.

    All tests of a file run in one process (`--dist=loadfile`), so that shared fixtures are set up once.
    xdist 3.8's groups are finer than files, but have no effect with pytest 9.2.
    """
    if not hasattr(config, "workerinput"):
        return
    ranks: dict[Path, int] = {}
    for item in items:
        ranks[item.path] = min(ranks.get(item.path, len(RANKS)), _rank(item))
    items.sort(key=lambda item: ranks[item.path])


RANKS = ("timing", "process")


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, mark in enumerate(RANKS) if item.get_closest_marker(mark)), len(RANKS))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Measure coverage once per worker, and not in tests marked `no_cover`.

    pytest-cov 7.1 starts a second measurement in each worker, as if it were the main process, and coverage's
    subprocess patch starts a third. Their results are discarded, but they slow down every test.
    """
    if hasattr(session.config, "workerinput") and session.config.pluginmanager.has_plugin("_cov"):
        while (measurement := coverage.Coverage.current()) is not None:
            measurement.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    service.may_be_started = item.get_closest_marker("process") is not None


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The Citus cluster in `TEST_CITUS_URL`."""
    if not (url := os.environ.get("TEST_CITUS_URL")):
        pytest.skip("There is no Citus: start a cluster and name it by TEST_CITUS_URL, as in docs/citus.md.")
    return Cluster.at(url)


DATABASES = ["sqlite", "postgres", *(["citus"] if "TEST_CITUS_URL" in os.environ else [])]


@pytest.fixture(scope="session")
async def migrated_sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite database, to be copied."""
    file = tmp_path_factory.mktemp("migrated") / "tasks.db"
    await asyncio.to_thread(migrate, db.connect(f"sqlite:///{file}", pool_size=1))
    return file


@pytest.fixture(scope="session", params=DATABASES)
async def database_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, migrated_sqlite_file: Path
) -> AsyncIterator[str]:
    """A migrated database shared by the whole run: a test that needs an empty list uses a new user."""
    if request.param == "citus":
        cluster: Cluster = request.getfixturevalue("cluster")
        await cluster.make_database()
        yield f"{cluster.url_as('tasks_service')}?sslmode=disable"  # tests read what is sent
        return
    if request.param == "sqlite":
        yield f"sqlite:///{shutil.copy(migrated_sqlite_file, tmp_path_factory.mktemp('data'))}"
        return
    server: Server = request.getfixturevalue("postgres")
    async with server.migrated_database() as url:
        yield url


# For properties of requests that are refused before any statement runs.
on_one_database = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
def sqlite_url(tmp_path: Path, migrated_sqlite_file: Path) -> str:
    """A migrated SQLite database of its own for one test."""
    return f"sqlite:///{shutil.copy(migrated_sqlite_file, tmp_path)}"


@pytest.fixture
async def postgres_url(postgres: Server) -> AsyncIterator[str]:
    """A migrated PostgreSQL database of its own for one test."""
    async with postgres.migrated_database() as url:
        yield url


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """A SQLite file that does not exist yet, for one test."""
    return f"sqlite:///{tmp_path / 'tasks.db'}"


@pytest.fixture
async def empty_postgres_url(postgres: Server) -> AsyncIterator[str]:
    """A PostgreSQL database without tables, for one test."""
    async with postgres.database() as url:
        yield url


@pytest.fixture(params=["sqlite_url", "postgres_url"], ids=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str:
    """A migrated database of its own for one test.

    Migrated already, because a service opens its port before a slow migration has ended.
    """
    return str(request.getfixturevalue(request.param))


@pytest.fixture(params=["empty_sqlite_url", "empty_postgres_url"], ids=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """A database without tables, for one test."""
    return str(request.getfixturevalue(request.param))


def settings_for(database_url: str, **changes: Any) -> Settings:
    return Settings.model_validate(
        {
            "database_url": database_url,
            "better_auth_secret": SECRET,
            "migrate_on_start": True,
            "allowed_origins": "https://app.example.com/",
            # All test users share one client address.
            "rate_limit": "off",
            "rate_limit_anonymous": "off",
        }
        | changes
    )


SCOPE = {
    "type": "http",
    "scheme": "http",
    "path": "/",
    "raw_path": b"/",
    "headers": [],
    "client": ("127.0.0.1", 1),
}


def front(app: Any, *, deadline_s: float = 10, origins: Sequence[str] = ()) -> Any:
    """Wrap an ASGI application in `FrontMiddleware`."""
    limits = RateLimits(LocalStorage(), user="off", anonymous="off")
    return FrontMiddleware(app, rate_limits=limits, deadline_s=deadline_s, origins=origins)


@asynccontextmanager
async def running(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Start *app* and yield a client that receives the 500 after a crash, as a real client does."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://testserver") as client,
    ):
        yield client


async def raw_status(
    app: FastAPI, method: str, path: str, query: bytes = b"", *headers: tuple[bytes, bytes]
) -> int:
    """Return the response status of a raw request, which may contain bytes that httpx would not send."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [(b"host", b"testserver"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    (status,) = statuses
    return status


@pytest.fixture(scope="session")
async def app(database_url: str) -> FastAPI:
    return create_app(settings_for(database_url))


@pytest.fixture(scope="session")
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app) as client:
        yield client


@pytest.fixture
async def logged(log: Log, database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that writes to `log`."""
    async with running(create_app(settings_for(database_url))) as client:
        yield client


def person(name: str, client: httpx.AsyncClient) -> Person:
    user_id = f"{name}{secrets.token_hex(8)}"
    return Person(user_id, client, tokens.issue(user_id, SECRET, 3600))


@pytest.fixture(scope="module")
def without_background_statements() -> Iterator[None]:
    """Put off the purge and the sweep, whose statements tests that count statements would count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(purge, "FIRST_S", NEVER_S)
        patch.setattr(idempotency, "SWEEP_S", NEVER_S)
        yield


@pytest.fixture
def alice(client: httpx.AsyncClient) -> Person:
    return person("alice", client)


@pytest.fixture
def bob(client: httpx.AsyncClient) -> Person:
    return person("bob", client)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def chromium() -> str:
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    sentence = "There is no Chromium: install Debian's package `chromium`."
    if os.environ.get("CI"):
        pytest.fail(f"{sentence} CI must not go without this test.")
    pytest.skip(reason=sentence)  # a browser is optional outside CI


PAGES_MAX = 1_000


async def pages(someone: Person | httpx.AsyncClient, path: str) -> list[list[Any]]:
    """Return each page from *path* on, following the `Link` headers."""
    found: list[list[Any]] = []
    while path:
        assert len(found) < PAGES_MAX
        answer = await someone.get(path)
        assert answer.status_code == 200, answer.text
        found.append(answer.json())
        path = answer.links.get("next", {}).get("url", "")
    return found
