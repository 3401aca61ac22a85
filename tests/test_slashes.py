"""Users whose `sub` has a slash, against the service as its own process, since the server decodes paths."""

from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from auth import tokens
from tests.conftest import SECRET, Log
from tests.postgres import free_port
from tests.service import running_service
from web import paths

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, folder = str(free_port()), tmp_path_factory.mktemp("slash")
    with running_service(folder, PORT=port, BETTER_AUTH_SECRET=SECRET, RATE_LIMIT="off") as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in service.logged


@pytest.fixture
async def served(address: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=address) as client:
        yield client


def _bearer(user_id: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {tokens.issue(user_id, SECRET, 3600)}"}}


@pytest.mark.parametrize(
    ("user_id", "encoded"),
    [
        ("google-oauth2/117", "google-oauth2%2F117"),
        ("https://id.example.com/alice", "https:%2F%2Fid.example.com%2Falice"),
        ("a/b|c é%2F?#", "a%2fb%7Cc%20%C3%A9%252F%3F%23"),
        ("/", "%2F"),
        ("tasks/", "tasks%2F"),
    ],
)
@pytest.mark.parametrize("prefix", ["/api", "/api/v1"])
async def test_a_user_whose_sub_has_a_slash_has_tasks(
    served: httpx.AsyncClient, prefix: str, user_id: str, encoded: str
) -> None:
    tasks, bearer = f"{prefix}/{encoded}/tasks", _bearer(user_id)

    one, two = [(await served.post(tasks, json={"title": title}, **bearer)) for title in ("one", "two")]
    assert [one.status_code, one.json()["user_id"]] == [201, user_id]
    assert one.headers["location"].isascii()
    read = await served.get(one.headers["location"], **bearer)
    first = await served.get(f"{tasks}/?limit=1", **bearer)
    next_page = await served.get(first.links["next"]["url"], **bearer)
    completed = await served.patch(f"{two.headers['location']}/complete", **bearer)
    counted = await served.get(f"{tasks}/stats", **bearer)
    deleted = [await served.delete(f"{tasks}?status={state}", **bearer) for state in ("pending", "completed")]

    assert read.json() == one.json()
    assert [first.json()[0]["title"], next_page.json()[0]["title"]] == ["two", "one"]
    assert [completed.json()["completed"], counted.json()["total"]] == [True, 2]
    assert [answer.json()["count"] for answer in deleted] == [1, 1]


SPELLINGS = [
    "al/ice",
    "al%252Fice",
    "al%25252Fice",
    "al%ED%B0%AFice",  # the internal placeholder for an encoded slash
    "al%C0%AFice",  # an overlong encoding of a slash
    "al%EF%BC%8Fice",  # a full-width slash
    "al%5Cice",
    "al%00ice",
    "al%2F%2Fice",
    "%2Fal%2Fice",
    "al%2Fice%2F",
    "al%2F.%2Fice",
    "x%2F..%2Fal%2Fice",
    "al%2Fice%2520",
    "al%2FICE",
    "al",
    "ice",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_another_spelling_of_a_slash_reaches_no_other_user(
    served: httpx.AsyncClient, spelling: str
) -> None:
    created = await served.post("/api/al%2Fice/tasks", json={"title": "secret"}, **_bearer("al/ice"))
    assert created.status_code == 201

    for user_id in ("al/ice", "al", "ice", "al%2Fice", "bob"):
        answer = await served.get(f"/api/{spelling}/tasks", **_bearer(user_id))
        assert "secret" not in answer.text
        assert answer.status_code in (403, 404) or (user_id, spelling, answer.text) in (
            ("al", "al", "[]"),
            ("ice", "ice", "[]"),
            ("al%2Fice", "al%252Fice", "[]"),
        )


@pytest.mark.parametrize("spelling", ["%FF", "a%FEb", "%ED%B0%AF", "%C3", "%FF%2F%FE"])
async def test_bytes_that_are_not_utf_8_are_no_user(served: httpx.AsyncClient, spelling: str) -> None:
    decoded = unquote(spelling)  # with U+FFFD for each such byte
    answer = await served.get(f"/api/{spelling}/tasks", **_bearer(decoded))
    spelled = await served.get(f"/api/{quote(decoded, safe='')}/tasks", **_bearer(decoded))

    assert (answer.status_code, spelled.status_code) == (404, 200)


@pytest.mark.parametrize(
    "path",
    ["/api%2Falice/tasks", "/api/alice%2Ftasks", "/api/alice/tasks%2F", "/api/alice/tasks%2F1", "/%2Fhealth"],
)
async def test_an_encoded_slash_separates_no_path_segments(served: httpx.AsyncClient, path: str) -> None:
    assert (await served.get(path, **_bearer("alice"))).status_code == 404


async def test_a_task_id_with_an_encoded_slash_is_422(served: httpx.AsyncClient) -> None:
    for task in ("1%2Fcomplete", "stats%2F", "%2F1"):
        answer = await served.get(f"/api/alice/tasks/{task}", **_bearer("alice"))
        assert (answer.status_code, answer.json()["errors"][0]["parameter"]) == (422, "task_id")


async def test_an_encoded_slash_is_logged_as_a_slash(logged: httpx.AsyncClient, log: Log) -> None:
    denied = await logged.get("/api/al%2Fice/tasks", **_bearer("bob"))
    refused = await logged.put("/api/al%2Fice/tasks", **_bearer("al/ice"))

    assert [denied.status_code, refused.status_code] == [403, 405]
    assert log.events("access denied")[0]["user_id"] == "al/ice"
    assert paths._SLASH not in log.getvalue()
