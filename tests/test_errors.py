import json
import re

import httpx
import pytest
from fastapi import FastAPI

import refusals
from main import create_app
from refusals import Refusal
from tests.conftest import Person, person, running, settings_for
from web.problems import problem_of

MEMBERS = ["type", "title", "status", "detail", "instance"]
INTERNAL = re.compile(r"Traceback|\.py|sqlalchemy|asyncpg|sqlite|SELECT|[a-z]Error\b|/home|/usr|pydantic")


def assert_problem(answer: httpx.Response, status: int, title: str, detail: str) -> None:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert list(problem)[:5] == MEMBERS
    assert (problem["type"], problem["title"], problem["status"]) == ("about:blank", title, status)
    assert problem["detail"] == detail
    assert problem["instance"] == answer.headers["x-request-id"]
    assert not INTERNAL.search(answer.text)


async def test_an_unknown_path_is_404_with_a_problem(client: httpx.AsyncClient) -> None:
    for path in ("/nope", "/api", "/api/", "/api/x", "/api/x/tasks/1/2/3", "/docs/assets/nope.js"):
        assert_problem(await client.get(path), 404, "Not Found", "There is nothing at this address")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", {"GET", "HEAD"}),
        ("PUT", "/api/x/tasks", {"GET", "HEAD", "POST", "PATCH", "DELETE"}),
        ("POST", "/api/x/tasks/1", {"GET", "HEAD", "PUT", "PATCH", "DELETE"}),
        ("GET", "/api/x/tasks/1/complete", {"PATCH"}),
        ("BREW", "/api/v1/x/tasks", {"GET", "HEAD", "POST", "PATCH", "DELETE"}),
    ],
)
async def test_405_lists_the_allowed_methods(
    client: httpx.AsyncClient, method: str, path: str, allowed: set[str]
) -> None:
    answer = await client.request(method, path)

    assert_problem(answer, 405, "Method Not Allowed", "This method is not allowed at this address")
    assert set(answer.headers["allow"].split(", ")) == allowed


async def test_an_invalid_field_is_422_with_a_json_pointer(alice: Person) -> None:
    answer = await alice.post(json={"title": " "})

    assert_problem(answer, 422, "Unprocessable Content", "title: must be 1 to 200 characters")
    assert answer.json()["errors"] == [{"pointer": "/title", "detail": "must be 1 to 200 characters"}]


async def test_every_invalid_field_is_reported(alice: Person) -> None:
    answer = await alice.post(json={"description": 5, "completed": "x"})

    assert_problem(
        answer,
        422,
        "Unprocessable Content",
        "title: is required; description: must be text; completed: must be true or false",
    )


async def test_a_crash_is_a_500_problem_without_details(app_that_crashes: FastAPI) -> None:
    async with running(app_that_crashes) as client:
        answer = await person("alice", client).get(headers={"Origin": "https://app.example.com"})

    assert_problem(
        answer, 500, "Internal Server Error", "Something went wrong on our side. Please try again."
    )
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"


@pytest.fixture
def app_that_crashes(database_url: str, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    async def all_(*_: object, **__: object) -> None:
        raise RuntimeError("SELECT secret FROM /home/somebody")

    app = create_app(settings_for(database_url))
    monkeypatch.setattr(app.state.services.database, "all", all_)
    return app


@pytest.mark.parametrize("name", ["missing title", "null", "401", "404", "405"])
async def test_the_detail_is_one_string(alice: Person, name: str) -> None:
    answer = {
        "missing title": await alice.post(json={}),
        "null": await alice.post(json=None),
        "401": await alice.client.get(alice.tasks),
        "404": await alice.get("/1"),
        "405": await alice.delete(""),
    }[name]

    assert isinstance(json.loads(answer.content)["detail"], str)
    assert answer.json()["detail"]


def _leaves(kind: type[Refusal]) -> set[type[Refusal]]:
    below = kind.__subclasses__()
    return {each for kind in below for each in _leaves(kind)} if below else {kind}


ONE_OF_EACH = [
    refusals.TaskNotFound(),
    refusals.VersionConflict({"version": 3}),
    refusals.TooManyTasks(10),
    refusals.OperationRefused(2, refusals.TaskNotFound()),
    refusals.KeyInUse(),
    refusals.KeyReused(),
    refusals.TooManyKeys(),
    refusals.ChangesForgotten(),
]


def test_every_refusal_has_a_problem_of_its_own() -> None:
    assert {type(each) for each in ONE_OF_EACH} == _leaves(Refusal)

    problems = [problem_of(each) for each in ONE_OF_EACH]

    assert all(400 <= problem.status < 500 for problem in problems)
    assert len({(problem.detail, str(problem.extensions)) for problem in problems}) == len(problems)


def test_a_refused_operation_has_the_problem_of_its_cause_and_its_index() -> None:
    alone = problem_of(refusals.VersionConflict({"version": 3}))
    problem = problem_of(refusals.OperationRefused(2, refusals.VersionConflict({"version": 3})))

    assert problem.detail == alone.detail
    assert problem.extensions == {"index": 2, "etag": '"3"'}
    assert alone.headers == {"ETag": '"3"'}
    assert not problem.headers  # a bulk response has no ETag
