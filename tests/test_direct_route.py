import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect

from config import Settings
from tests.conftest import Person
from web import direct_route
from web.direct_route import BODY_MAX_BYTES

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"{", "is not valid JSON at character 1"),
        (b"title=x", "is not valid JSON at character 0"),
        (b'{"title": "x"} {}', "is not valid JSON at character 15"),
        (b'{"title": "x",}', None),
        (b"\xef\xbb\xbf{}", None),
        ('{"title": "é"}'.encode("latin-1"), "is not valid UTF-8"),
        ('{"title": "x"}'.encode("utf-16"), "is not valid UTF-8"),
        (b'{"title": "a", "title": "b"}', "has a member twice"),
        (b'{"title": "a", "other": {"x": 1, "x": 2}}', "has a member twice"),
        (b'{"title": "a", "other": NaN}', "has the number NaN, which JSON does not know"),
        (b'{"title": "a", "other": -Infinity}', "has the number -Infinity, which JSON does not know"),
        (b'{"title": "a", "other": 1e999}', "has a number that is too large"),
        (b'{"title": "a", "other": ' + b"9" * 5000 + b"}", "has a number that is too long"),
        (b'{"title": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "is nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "is nested too deeply"),
    ],
)
async def test_a_body_that_is_not_strict_json_is_422(
    alice: Person, content: bytes, detail: str | None
) -> None:
    answer = await alice.post(content=content, headers=JSON)

    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert error["pointer"] == ""
    assert error["detail"] == detail or (detail is None and "is not valid JSON" in error["detail"])
    assert (await alice.get()).json() == []


async def test_a_missing_body_is_422(alice: Person) -> None:
    answer = await alice.post(headers=JSON)

    assert (answer.status_code, answer.json()["detail"]) == (422, "body: is required")


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "image/json",
        "text/x+json",
        "json",
        None,
    ],
)
async def test_a_body_without_a_json_content_type_is_415(alice: Person, media_type: str | None) -> None:
    headers = {"Content-Type": media_type} if media_type else {}

    answer = await alice.post(content=b'{"title": "x"}', headers=headers)

    assert answer.status_code == 415
    assert answer.json()["detail"] == "The request body must be JSON: send Content-Type: application/json"


@pytest.mark.parametrize(
    "media_type",
    ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"],
)
async def test_every_json_media_type_is_read(alice: Person, media_type: str) -> None:
    answer = await alice.post(content=b'{"title": "x"}', headers={"Content-Type": media_type})

    assert answer.status_code == 201


@pytest.mark.parametrize(("encoding", "status"), [("identity", 201), (" Identity ", 201), ("gzip", 415)])
async def test_content_encoding_may_be_identity_only(alice: Person, encoding: str, status: int) -> None:
    headers = JSON | {"Content-Encoding": encoding}

    assert (await alice.post(content=b'{"title": "x"}', headers=headers)).status_code == status


async def test_errors_in_query_and_body_are_reported_together(alice: Person) -> None:
    answer = await alice.patch("?status=lost&due_date_from=x", json={"completed": "perhaps"})

    named = [error.get("parameter") or error["pointer"] for error in answer.json()["errors"]]
    assert (answer.status_code, named) == (422, ["status", "due_date_from", "/completed"])


async def test_a_repeated_if_none_match_header_is_one_list(alice: Person) -> None:
    task = await alice.create()
    headers = [
        ("Authorization", f"Bearer {alice.token}"),
        ("If-None-Match", '"7"'),
        ("If-None-Match", f'"{task["version"]}"'),
    ]

    answer = await alice.client.get(f"{alice.tasks}/{task['id']}", headers=headers)

    assert answer.status_code == 304


async def test_a_body_cut_off_by_a_disconnect_creates_no_task(app: FastAPI, alice: Person) -> None:
    messages: Iterator[dict[str, Any]] = iter(
        [
            {"type": "http.request", "body": b'{"title": "x"}', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": alice.tasks,
        "raw_path": alice.tasks.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"testserver"),
            (b"authorization", f"Bearer {alice.token}".encode()),
            (b"content-type", b"application/json"),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
    }
    with contextlib.suppress(ClientDisconnect):
        await app(scope, receive, send)

    assert (await alice.get()).json() == []


def _padded(size_bytes: int) -> bytes:
    start = b'{"title": "x", "other": "'
    return start + b"x" * (size_bytes - len(start) - 2) + b'"}'


async def test_a_body_of_64_kib_is_read_and_one_byte_more_is_413(alice: Person) -> None:
    assert (await alice.post(content=_padded(BODY_MAX_BYTES), headers=JSON)).status_code == 201

    answer = await alice.post(content=_padded(BODY_MAX_BYTES + 1), headers=JSON)

    assert (answer.status_code, answer.json()["title"]) == (413, "Content Too Large")
    assert len((await alice.get()).json()) == 1


@pytest.mark.parametrize(("chunks", "status"), [(64, 422), (65, 413), (10_000, 413)])
async def test_a_streamed_body_over_64_kib_is_413(alice: Person, chunks: int, status: int) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(chunks):
            yield b" " * 1024

    answer = await alice.post(content=stream(), headers=JSON)

    assert answer.status_code == status


@pytest.mark.parametrize("length", ["999999999999999999999", "65537"])
async def test_a_content_length_over_64_kib_is_413(alice: Person, length: str) -> None:
    answer = await alice.post(content=b"{}", headers=JSON | {"Content-Length": length})

    assert answer.status_code == 413


async def test_an_incomplete_body_is_408(alice: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_route, "BODY_TIMEOUT_S", 0.1)

    async def stall() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    answer = await alice.post(content=stall(), headers=JSON)

    assert (answer.status_code, answer.json()["detail"]) == (408, "The request body did not arrive in time")


def test_the_body_timeout_is_shorter_than_the_request_deadline() -> None:
    assert 4 <= direct_route.BODY_TIMEOUT_S < Settings.model_fields["request_deadline_s"].default
