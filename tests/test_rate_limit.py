import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from auth.sign_in_throttle import FAILURES_MAX
from main import create_app
from tests.conftest import person, running, settings_for
from tests.postgres import free_port
from tests.redis_server import running_redis
from tests.service import printed_token, running_service
from web import rate_limits
from web.client_addresses import client_address
from web.counters import TIMEOUT_S

QUOTA_EXCEEDED = "https://iana.org/assignments/http-problem-types#quota-exceeded"
ALICE = {"name": "Alice", "email": "alice@example.com", "password": "correct horse battery"}


@pytest.fixture(autouse=True)
def _noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Align the rate limit windows of all keys, so that none ends during a test."""
    started = time.time()
    monkeypatch.setattr(rate_limits, "crc32", lambda _: 30 - int(started) % 60)


@asynccontextmanager
async def limited(database_url: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that admits three requests of each kind."""
    defaults = {"rate_limit": "3/minute", "rate_limit_anonymous": "3/minute", "local_accounts": True}
    async with running(create_app(settings_for(database_url, **defaults | settings))) as client:
        moved(client, "192.0.2.1")
        yield client


def moved(client: httpx.AsyncClient, address: str) -> None:
    client._transport.client = (address, 1)  # type: ignore[attr-defined] # the peer that ASGITransport passes


def left(answer: httpx.Response) -> int:
    found = re.fullmatch(r'"(user|anonymous)";r=(\d+);t=([1-9]\d?)', answer.headers["ratelimit"])
    assert found, answer.headers
    assert answer.headers["ratelimit-policy"] == f'"{found[1]}";q=3;w=60'
    assert len(answer.headers.get_list("ratelimit")) == 1
    return int(found[2])


def assert_refused(answer: httpx.Response, policy: str) -> None:
    problem = answer.json()
    assert answer.status_code == problem["status"] == 429
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["violated-policies"]) == (QUOTA_EXCEEDED, [policy])
    assert problem["instance"] == answer.headers["x-request-id"]
    assert answer.headers["ratelimit"] == f'"{policy}";r=0;t={answer.headers["retry-after"]}'
    assert 1 <= int(answer.headers["retry-after"]) <= 60


async def test_the_ratelimit_header_counts_down_and_the_next_request_is_429(database_url: str) -> None:
    async with limited(database_url) as client:
        alice, bob = person("alice", client), person("bob", client)

        answers = [await alice.post(json={"title": "Buy milk"}), await alice.get(), await alice.get("/0")]
        refused = [await alice.get(), await alice.post(json={"title": "Buy more"})]
        moved(client, "198.51.100.1")

        assert [answer.status_code for answer in answers] == [201, 200, 422]
        assert [left(answer) for answer in answers] == [2, 1, 0]
        for answer in refused:
            assert_refused(answer, "user")
        assert_refused(await alice.get(), "user")  # from any address
        assert left(await bob.get()) == 2
        assert (await bob.get(f"{alice.tasks}/1")).status_code == 403


async def test_a_limit_is_used_up_until_its_window_ends(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(database_url) as client:
        alice = person("alice", client)
        now = time.time() // 60 * 60 + 59
        monkeypatch.setattr(rate_limits, "crc32", lambda _: 0)
        monkeypatch.setattr(time, "time", lambda: now)
        for _ in range(4):
            answer = await alice.get()
        assert_refused(answer, "user")
        assert answer.headers["retry-after"] == "1"

        monkeypatch.setattr(time, "time", lambda: now + 1.5)

        assert left(await alice.get()) == 2


async def test_a_clock_that_is_set_back_uses_up_no_limit(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with limited(database_url) as client:
        alice, now = person("alice", client), time.time()
        monkeypatch.setattr(time, "time", lambda: now + 600)
        for _ in range(4):
            answer = await alice.get()
        assert_refused(answer, "user")

        monkeypatch.setattr(time, "time", lambda: now)

        assert left(await alice.get()) == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/api/alice/tasks"), ("GET", "/docs"), ("GET", "/nope"), ("DELETE", "/"), ("HEAD", "/docs")],
)
@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer x.y.z"}])
async def test_without_a_valid_token_the_address_is_limited(
    database_url: str, method: str, path: str, header: dict[str, str]
) -> None:
    async with limited(database_url) as client:
        admitted = [await client.request(method, path, headers=header) for _ in range(3)]
        refused = await client.request(method, path, headers=header)
        moved(client, "192.0.2.2")
        elsewhere = await client.request(method, path, headers=header)

        assert [left(answer) for answer in admitted] == [2, 1, 0]
        assert 429 not in [answer.status_code for answer in admitted]
        if method == "HEAD":
            assert (refused.status_code, refused.content) == (429, b"")
        else:
            assert_refused(refused, "anonymous")
        assert left(elsewhere) == 2


async def test_anonymous_requests_do_not_use_up_a_users_rate_limit(database_url: str) -> None:
    async with limited(database_url) as client:
        for _ in range(5):
            await client.get("/nope")

        assert left(await person("alice", client).get()) == 2


async def test_a_rate_limited_request_has_no_effect(database_url: str) -> None:
    bob = person("bob", httpx.AsyncClient())
    async with limited(database_url) as client:
        for _ in range(3):
            await client.get("/nope")
        headers = {"Authorization": f"Bearer {bob.token}"}  # a token does not select another limit here
        signed_up = await client.post("/api/auth/sign-up/email", json=ALICE, headers=headers)
        signed_in = await client.post("/api/auth/sign-in/email", json=ALICE, headers=headers)
        form = {"grant_type": "password", "username": ALICE["email"], "password": ALICE["password"]}
        granted = await client.post("/api/auth/token", data=form)
        moved(client, "192.0.2.2")
        afterwards = await client.post("/api/auth/sign-in/email", json=ALICE)

    for answer in (signed_up, signed_in, granted):
        assert_refused(answer, "anonymous")
    assert signed_up.json()["code"] == "TOO_MANY_REQUESTS"
    assert granted.json()["error"] == "temporarily_unavailable"
    assert afterwards.status_code == 401  # the account was not created


async def test_a_request_is_counted_once(database_url: str) -> None:
    async with limited(database_url, rate_limit_anonymous="100/minute") as client:
        answers = [
            await client.post("/api/auth/sign-in/email", json=ALICE),
            await client.post("/api/auth/sign-in/email", json={}),
            await client.get("/api/auth/get-session"),
            await client.get("/docs/"),
        ]

    assert [answer.headers["ratelimit"].split(";")[1] for answer in answers] == [
        f"r={number}" for number in (99, 98, 97, 96)
    ]


async def test_crashes_have_the_ratelimit_headers_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **values: object) -> None:
        raise RuntimeError("the cause")

    app = create_app(settings_for(database_url, rate_limit="3/minute"))
    monkeypatch.setattr(app.state.services.database, "all", fail)
    async with running(app) as client:
        answer = await person("alice", client).get("/1")

    assert answer.status_code == 500
    assert left(answer) == 2


async def test_health_and_preflights_are_never_limited(database_url: str) -> None:
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "GET"}
    async with limited(database_url) as client:
        probes = ("/health", "/health/", "/health/ready", "/health/ready/")
        answers = [await client.get(path) for path in probes * 3]
        answers += [await client.options("/api/alice/tasks", headers=asked) for _ in range(10)]

    assert {answer.status_code for answer in answers} == {200}
    assert [answer for answer in answers if "ratelimit" in answer.headers] == []


@pytest.mark.parametrize("path", ["/health%2F", "/health%2Fready", "/%68ealth", "//health"])
async def test_a_path_that_only_resembles_a_health_probe_is_rate_limited(
    database_url: str, path: str
) -> None:
    async with limited(database_url) as client:
        answers = [await client.get(path) for _ in range(4)]

    assert answers[-1].status_code == 429


@pytest.mark.parametrize("off", ["rate_limit", "rate_limit_anonymous"])
async def test_either_limit_can_be_switched_off(database_url: str, off: str) -> None:
    async with limited(database_url, **{off: "off"}) as client:
        alice = person("alice", client)
        users = [await alice.get() for _ in range(5)]
        anonymous = [await client.get("/nope") for _ in range(5)]

    free, refused = (users, anonymous) if off == "rate_limit" else (anonymous, users)
    assert [answer for answer in free if answer.status_code == 429 or "ratelimit" in answer.headers] == []
    assert [answer.status_code == 429 for answer in refused] == [False] * 3 + [True] * 2


async def test_x_forwarded_for_is_ignored_without_a_trusted_proxy(database_url: str) -> None:
    async with limited(database_url) as client:
        answers = [
            await client.get("/nope", headers={"X-Forwarded-For": f"198.51.100.{number}"})
            for number in range(4)
        ]

    assert_refused(answers[-1], "anonymous")


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_network_is_one_client(host: str, client: str) -> None:
    assert client_address({"client": (host, 1)}) == client


def test_clients_without_an_address_share_one_key() -> None:
    assert client_address({"client": None}) == client_address({}) == ""


@pytest.mark.process
@pytest.mark.parametrize(
    ("trusted", "forwarded", "other"),
    [
        (None, "198.51.100.1", "198.51.100.2"),  # no proxy is trusted: one client
        ("127.0.0.1", "198.51.100.7, 198.51.100.1", "198.51.100.8, 198.51.100.1"),  # forged by the client
        ("127.0.0.0/8", "198.51.100.1, 127.0.0.9", "198.51.100.1"),  # a second proxy
        ("10.0.0.0/8", "198.51.100.1", "198.51.100.2"),  # this peer is not trusted
    ],
)
def test_only_a_trusted_proxy_sets_the_client_address(
    tmp_path: Path, trusted: str | None, forwarded: str, other: str
) -> None:
    port = str(free_port())
    settings = {"TRUSTED_PROXIES": trusted} if trusted else {}
    with running_service(tmp_path, PORT=port, RATE_LIMIT_ANONYMOUS="2/day", **settings) as service:
        address = f"http://127.0.0.1:{port}"
        service.wait_for(address)
        statuses = [
            httpx.get(f"{address}/nope", headers={"X-Forwarded-For": sent}).status_code
            for sent in (forwarded, other, forwarded)
        ]
        fresh = httpx.get(f"{address}/nope", headers={"X-Forwarded-For": "203.0.113.1"}).status_code

    assert statuses == [404, 404, 429]
    assert fresh == (404 if trusted and trusted.startswith("127") else 429)


@pytest.mark.process
async def test_two_processes_share_one_limit_and_do_without_redis(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis, contextlib.ExitStack() as stack:
        settings = {
            "DATA_DIR": str(tmp_path / "data"),
            "RATE_LIMIT": "6/day",
            "RATE_LIMIT_STORAGE_URL": redis.url,
            "LOCAL_ACCOUNTS": "true",
        }
        services, clients = [], []
        token = printed_token(tmp_path, **settings)
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            port = str(free_port())
            service = stack.enter_context(running_service(tmp_path / name, PORT=port, **settings))
            await asyncio.to_thread(service.wait_for, f"http://127.0.0.1:{port}")
            headers = {"Authorization": f"Bearer {token}"}
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers)
            clients.append(client)
            services.append(service)

        together = [await clients[number % 2].get("/api/alice/tasks") for number in range(7)]
        account = {"email": "bob@example.com", "password": "not the right one"}
        failed = [
            await clients[number % 2].post("/api/auth/sign-in/email", json=account)
            for number in range(FAILURES_MAX + 1)
        ]
        redis.freeze()
        started = time.monotonic()
        alone = [await client.get("/api/alice/tasks") for client in clients]
        frozen_s = time.monotonic() - started
        redis.kill()
        alone += [await client.get("/api/alice/tasks") for client in clients]

        for client in clients:
            await client.aclose()
        assert [service.stop() for service in services] == [0, 0]
        logs = [service.logged for service in services]

    assert [answer.status_code for answer in together] == [200] * 6 + [429]
    assert [answer.status_code for answer in failed] == [401] * FAILURES_MAX + [429]
    assert [answer.headers["ratelimit"].split(";")[1] for answer in alone] == ["r=5", "r=5", "r=4", "r=4"]
    assert frozen_s < 2 * (TIMEOUT_S + 0.5)
    assert [log.count("redis is gone") for log in logs] == [1, 1]
    assert all("Traceback" not in log for log in logs)
