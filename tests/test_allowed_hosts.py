import tracemalloc

import httpx
import pytest

from main import create_app
from middleware.allowed_hosts import AllowedHosts
from tests.conftest import raw_status, running, settings_for
from tests.test_errors import assert_problem

HOSTS = "API.example.com, *.internal.example, 192.0.2.1, [2001:db8::1]"


@pytest.mark.parametrize(
    "host",
    [
        "api.example.com",
        "API.Example.Com",
        "api.example.com:8000",
        "api.example.com:",
        "tasks.internal.example",
        "a.b.internal.example:443",
        "192.0.2.1:80",
        "[2001:db8::1]",
        "[2001:DB8:0::1]:8000",
    ],
)
async def test_an_allowed_host_is_served(database_url: str, host: str) -> None:
    async with running(create_app(settings_for(database_url, allowed_hosts=HOSTS))) as client:
        assert (await client.get("/docs", headers={"Host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "example.com",
        "internal.example",
        "evilinternal.example",
        "api.example.com.evil.example",
        "evil.example:api.example.com",
        "user@api.example.com",
        "evil.example/api.example.com",
        "evil.example#.internal.example",
        "api.example.com, evil.example",
        "api.example.com:80:80",
        "2001:db8::1",
        "[2001:db8::2]",
        "[2001:db8::1",
        "[::]]",
        "[:::]",
        "*.internal.example\xe9",
    ],
)
async def test_a_host_that_is_not_allowed_is_400(database_url: str, host: str) -> None:
    async with running(create_app(settings_for(database_url, allowed_hosts=HOSTS))) as client:
        sent = {b"Host": host.encode("latin-1"), b"X-Forwarded-Host": b"api.example.com"}
        answer = await client.get("/docs", headers=sent)

    assert_problem(answer, 400, "Bad Request", "The Host header must name this service, once")
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_repeated_host_header_is_400(database_url: str) -> None:
    app = create_app(settings_for(database_url, allowed_hosts="testserver"))
    async with running(app):
        assert await raw_status(app, "GET", "/docs") == 200
        for other in (b"testserver", b"evil.example"):
            assert await raw_status(app, "GET", "/docs", b"", (b"host", other)) == 400


@pytest.mark.parametrize("path", ["/health", "/health/", "/health/ready", "/health/ready/"])
async def test_health_checks_may_send_any_host(database_url: str, path: str) -> None:
    async with running(create_app(settings_for(database_url, allowed_hosts=HOSTS))) as client:
        assert (await client.get(path, headers={"Host": "10.1.2.3:8000"})).status_code == 200


def test_checking_many_hosts_holds_little_memory() -> None:
    hosts = AllowedHosts(["*.internal.example"])
    tracemalloc.start()
    try:
        for number in range(2_000):
            for host in (
                f"{number}{'x' * 30_000}",
                f"{number}.internal.example:{'0' * 30_000}",
                f"{number}.x",
            ):
                hosts.admit({"headers": [(b"host", host.encode())]})
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert held < 1_000_000


async def test_any_host_is_served_by_default(client: httpx.AsyncClient) -> None:
    assert (await client.get("/docs", headers={"Host": "anything.example"})).status_code == 200
