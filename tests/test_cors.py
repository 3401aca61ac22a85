import json
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import sync_playwright

from main import create_app
from middleware.cors import EXPOSED_HEADERS, METHODS, REQUEST_HEADERS
from tests.conftest import Person, running, settings_for
from tests.postgres import free_port
from tests.service import printed_token, running_service
from tests.test_docs import BROWSER_OPTIONS

ORIGIN = "https://app.example.com"

# The default of Better Auth's browser client.
FETCH = """async ({url, method, body, token}) => (await fetch(url, {
    method, body, credentials: "include",
    headers: {Authorization: `Bearer ${token}`, "Content-Type": "application/json"},
})).json()"""


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
    assert answer.headers["access-control-allow-credentials"] == "true"
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
async def test_a_preflight_that_is_not_allowed_is_400_with_a_problem(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await client.options("/api/alice/tasks", headers=headers)

    assert answer.status_code == 400
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["instance"] == answer.headers["x-request-id"]
    if headers["Origin"] != ORIGIN:
        assert "access-control-allow-credentials" not in answer.headers


async def test_responses_and_errors_have_cors_headers(client: httpx.AsyncClient, alice: Person) -> None:
    origin = {"Origin": ORIGIN}
    answers = [
        await alice.post(json={"title": "Buy milk"}, headers=origin),
        await alice.post(json={}, headers=origin),
        await alice.get(f"/{2**53}", headers=origin),
        await client.get(alice.tasks, headers=origin),
        await client.get("/nope", headers=origin),
        await client.delete("/health", headers=origin),
        await alice.post(content=b"x" * 70_000, headers=origin | {"Content-Type": "application/json"}),
    ]

    assert [answer.status_code for answer in answers] == [201, 422, 404, 401, 404, 405, 413]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert set(answer.headers["access-control-expose-headers"].split(", ")) == set(EXPOSED_HEADERS)
        assert "Origin" in answer.headers["vary"]


async def test_another_origin_gets_no_cors_headers(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health", headers={"Origin": "https://evil.example"})

    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("allowed", ["*", f"{ORIGIN},*"])
@pytest.mark.parametrize("origin", ["https://anywhere.example", ORIGIN])
async def test_a_star_origin_never_allows_credentials(database_url: str, allowed: str, origin: str) -> None:
    async with running(create_app(settings_for(database_url, allowed_origins=allowed))) as client:
        answers = [
            await client.get("/health", headers={"Origin": origin}),
            await client.options("/health", headers=preflight(origin=origin)),
        ]

    for answer in answers:
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.process
def test_a_page_that_includes_credentials_reads_the_responses(
    chromium: str,
    tmp_path: Path,
) -> None:
    port, front = free_port(), free_port()
    origin = f"http://127.0.0.1:{front}"
    (tmp_path / "front").mkdir()
    token = printed_token(tmp_path)
    with (
        running_service(tmp_path, PORT=str(port), ALLOWED_ORIGINS=origin) as service,
        running_service(tmp_path / "front", PORT=str(front)) as page_server,  # any page of another origin
        sync_playwright() as playwright,
    ):
        service.wait_for(f"http://127.0.0.1:{port}")
        page_server.wait_for(origin)
        browser = playwright.chromium.launch(executable_path=chromium, args=BROWSER_OPTIONS)
        page = browser.new_page(bypass_csp=True)  # our CSP forbids fetch(); a front end's own page would not
        page.goto(f"{origin}/health")
        created, listed = (
            page.evaluate(
                FETCH, {"url": f"http://127.0.0.1:{port}/api/alice/tasks", "token": token} | request
            )
            for request in ({"method": "POST", "body": json.dumps({"title": "Buy milk"})}, {"method": "GET"})
        )
        browser.close()

    assert created["title"] == "Buy milk"
    assert listed == [created]


async def test_options_without_a_preflight_is_405(client: httpx.AsyncClient) -> None:
    assert (await client.options("/health")).status_code == 405
