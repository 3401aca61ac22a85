import httpx
import pytest
from fastapi import FastAPI

from main import create_app
from tests.conftest import Person, person, running, settings_for

ORIGIN = {"Origin": "https://app.example.com"}
NOTHING = "default-src 'none'; frame-ancestors 'none'"


def assert_secure(answer: httpx.Response) -> None:
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    assert answer.headers.get_list("x-frame-options") == ["DENY"]
    assert answer.headers.get_list("referrer-policy") == ["no-referrer"]
    (policy,) = answer.headers.get_list("content-security-policy")
    assert policy.startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "server" not in answer.headers


async def test_every_response_has_the_security_headers(client: httpx.AsyncClient, alice: Person) -> None:
    answers = [
        await client.get("/"),
        await client.get("/docs"),
        await client.get("/openapi.json"),
        await client.get("/docs/assets/swagger-ui.css"),
        await client.get("/health"),
        await client.get("/nope"),
        await client.delete("/health", headers=ORIGIN),
        await client.get(alice.tasks),
        await alice.post(json={"title": "Buy milk"}, headers=ORIGIN),
        await alice.post(json={}),
    ]

    assert [answer.status_code for answer in answers] == [307, 200, 200, 200, 200, 404, 405, 401, 201, 422]
    for answer in answers:
        assert_secure(answer)


async def test_only_the_docs_may_load_anything(client: httpx.AsyncClient) -> None:
    paths = ("/docs", "/docs/", "/openapi.json", "/health", "/nope", "/docs/assets/swagger-ui.css")
    policies = {path: (await client.get(path)).headers["content-security-policy"] for path in paths}

    assert policies.pop("/docs") == policies.pop("/docs/") != NOTHING
    assert set(policies.values()) == {NOTHING}


async def test_tasks_and_accounts_are_cache_control_no_store(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, local_accounts=True))) as client:
        alice = person("alice", client)
        private = [
            await alice.post(json={"title": "Buy milk"}),
            await alice.get("/7000000"),
            await client.get(alice.tasks),
            await client.get("/api/auth/get-session"),
            await client.post("/api/auth/sign-in/email", json={}),
        ]
        public = [await client.get("/docs"), await client.get("/docs/assets/swagger-ui.css")]

    assert [answer.headers.get_list("cache-control") for answer in private] == [["no-store"]] * 5
    assert [answer for answer in public if "cache-control" in answer.headers] == []


async def test_tasks_are_kept_by_the_browser_of_their_user_only(alice: Person) -> None:
    task = await alice.create()
    for path in ("", "/stats", f"/{task['id']}"):
        answer = await alice.get(path)
        again = await alice.get(path, headers={"If-None-Match": answer.headers["etag"]})

        assert (answer.status_code, again.status_code) == (200, 304)
        for each in (answer, again):
            assert each.headers.get_list("cache-control") == ["private, no-cache"]
            assert set(", ".join(each.headers.get_list("vary")).split(", ")) == {"Authorization", "Origin"}


async def test_crashes_have_the_security_headers_too(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **values: object) -> None:
        raise RuntimeError("the cause")

    app = create_app(settings_for(database_url))
    monkeypatch.setattr(app.state.services.database, "all", fail)
    async with running(app) as client:
        answer = await person("alice", client).get("/1")

    assert answer.status_code == 500
    assert answer.headers["cache-control"] == "no-store"
    assert_secure(answer)


@pytest.mark.parametrize(("scheme", "told"), [("http", []), ("https", ["max-age=31536000"])])
async def test_only_https_responses_have_strict_transport_security(
    app: FastAPI, scheme: str, told: list[str]
) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"{scheme}://testserver") as it:
        answer = await it.get("/health", headers={"X-Forwarded-Proto": "https"})

    assert answer.headers.get_list("strict-transport-security") == told


@pytest.mark.parametrize("path", ["/api/", "/api/nope", "/api%2Falice%2Ftasks"])
async def test_every_answer_below_api_is_no_store(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).headers["cache-control"] == "no-store"
