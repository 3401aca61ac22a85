import httpx
import pytest

from main import create_app
from middleware.cors import EXPOSED_HEADERS, METHODS, REQUEST_HEADERS
from tests.conftest import Person, running, settings_for

ORIGIN = "https://app.example.com"


def preflight(method: str = "PATCH", headers: str = "authorization", origin: str = ORIGIN) -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": headers,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("header", REQUEST_HEADERS)
async def test_a_preflight_allows_what_the_contract_lists(
    client: httpx.AsyncClient, method: str, header: str
) -> None:
    answer = await client.options("/api/alice/tasks", headers=preflight(method, header.lower()))

    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert method in answer.headers["access-control-allow-methods"].split(", ")
    assert header in answer.headers["access-control-allow-headers"].split(", ")
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "headers",
    [
        preflight(origin="https://evil.example"),
        preflight(origin="https://app.example.com.evil.example"),
        preflight(origin="http://app.example.com"),
        preflight(origin="null"),
        preflight(method="TRACE"),
        preflight(headers="x-forwarded-for"),
    ],
)
async def test_another_preflight_is_refused_with_a_problem(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await client.options("/api/alice/tasks", headers=headers)

    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"] == answer.headers["x-request-id"]


async def test_answers_and_errors_carry_the_headers(client: httpx.AsyncClient, alice: Person) -> None:
    origin = {"Origin": ORIGIN}
    answers = [
        await alice.post(json={"title": "Buy milk"}, headers=origin),
        await alice.post(json={}, headers=origin),
        await alice.get("/987654321", headers=origin),
        await client.get(alice.tasks, headers=origin),
        await client.get("/nope", headers=origin),
        await client.delete("/health", headers=origin),
        await alice.post(content=b"x" * 70_000, headers=origin | {"Content-Type": "application/json"}),
    ]

    assert [answer.status_code for answer in answers] == [201, 422, 404, 401, 404, 405, 413]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert set(answer.headers["access-control-expose-headers"].split(", ")) == set(EXPOSED_HEADERS)
        assert "Origin" in answer.headers["vary"]


async def test_another_origin_gets_no_headers(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"Origin": "https://evil.example"})

    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


async def test_every_origin_may_be_allowed_because_there_are_no_credentials(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, allowed_origins="*"))) as client:
        answer = await client.get("/health", headers={"Origin": "https://anywhere.example"})

    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


async def test_options_without_a_preflight_is_just_not_a_method(client: httpx.AsyncClient) -> None:
    assert (await client.options("/health")).status_code == 405
