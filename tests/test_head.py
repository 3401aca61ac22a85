import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import Message

from tests.conftest import SCOPE, Person, front


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/health",
        "/nope",
        "/docs/assets/index.css",
        "/api/",
        "/api%2Falice%2Ftasks",
    ],
)
async def test_head_answers_as_get_without_the_body(client: httpx.AsyncClient, path: str) -> None:
    got, headed = await client.get(path), await client.head(path)

    _assert_same(got, headed)


async def test_head_of_tasks_answers_as_get_without_the_body(alice: Person) -> None:
    task = await alice.create()
    for path in ("", "?limit=1&count=true", f"/{task['id']}", "/stats", "/0", "?limit=0"):
        got, headed = await alice.get(path), await alice.send("HEAD", path)
        _assert_same(got, headed)


async def test_head_needs_a_token_where_get_does(alice: Person, bob: Person) -> None:
    assert (await alice.client.head(alice.tasks)).status_code == 401
    assert (await bob.send("HEAD", alice.tasks)).status_code == 403


async def test_head_with_a_matching_if_none_match_is_304(alice: Person) -> None:
    task = await alice.create()
    etag = (await alice.get(f"/{task['id']}")).headers["etag"]

    answer = await alice.send("HEAD", f"/{task['id']}", headers={"If-None-Match": etag})

    assert (answer.status_code, answer.headers["etag"]) == (304, etag)


async def test_head_is_405_where_get_is_405(alice: Person) -> None:
    answer = await alice.send("HEAD", "/1/complete")

    assert (answer.status_code, answer.headers["allow"], answer.content) == (405, "PATCH", b"")


async def test_no_byte_of_a_body_is_sent_for_head() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {**SCOPE, "method": "HEAD"}
    await front(Response("a body"))(scope, receive, send)  # httpx would drop a body too

    assert [message.get("body", b"") for message in sent] == [b"", b""]
    assert (b"content-length", b"6") in sent[0]["headers"]


def test_the_openapi_document_does_not_list_head(app: FastAPI) -> None:
    operations = {method for path in app.openapi()["paths"].values() for method in path}

    assert "get" in operations
    assert "head" not in operations


def _assert_same(got: httpx.Response, headed: httpx.Response) -> None:
    changing = ("x-request-id",)
    assert headed.status_code == got.status_code
    assert [item for item in headed.headers.items() if item[0] not in changing] == [
        item for item in got.headers.items() if item[0] not in changing
    ]
    assert headed.content == b""
