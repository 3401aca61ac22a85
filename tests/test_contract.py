"""Schemathesis checks that the service conforms to its OpenAPI document, whatever a client sends."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from tests.conftest import SECRET, Person
from tests.postgres import free_port
from tests.service import PROJECT, UNMEASURED, run, running_service

SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
CONFIG = str(PROJECT / "tests" / "contract.toml")


@pytest.mark.process
@pytest.mark.no_cover  # coverage of the same lines many times is slow
async def test_every_response_conforms_to_the_openapi_document(
    app: FastAPI, alice: Person, database_url: str, tmp_path: Path
) -> None:
    port = str(free_port())
    settings = {
        "DATABASE_URL": database_url,
        "BETTER_AUTH_SECRET": SECRET,
        "ACCESS_LOG": "false",
        "RATE_LIMIT": "off",
        "RATE_LIMIT_ANONYMOUS": "off",
        "PORT": port,
    } | UNMEASURED
    with running_service(tmp_path, MIGRATE_ON_START="true", **settings) as service:
        address = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(service.wait_for, address)
        command = (SCHEMATHESIS, f"--config-file={CONFIG}", "run", f"{address}/openapi.json")
        person = {"TOKEN": alice.token, "USER_ID": alice.user_id} | UNMEASURED

        tried = await asyncio.to_thread(run, tmp_path, *command, **person)

        if tried.returncode:
            pytest.fail(f"{tried.stdout}\n{tried.stderr}\n{service.logged}", pytrace=False)
    # A run without any request would pass, too.
    assert f"Tested: {len(operations(app)) - 1}\n" in tried.stdout  # without the stream of events
    links = re.search(r"API Links: +(\d+) covered / (\d+) selected", tried.stdout)
    assert links
    assert int(links[1]) > int(links[2]) / 2 > 0  # the links are chosen at random


def operations(app: FastAPI) -> list[tuple[str, str, bool]]:
    """Return method and path of each operation, and whether it requires a token."""
    return [
        (method.upper(), path, bool(operation["security"]))
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]


async def test_every_operation_on_another_users_path_is_403(app: FastAPI, alice: Person, bob: Person) -> None:
    task = await alice.create()
    guarded = [(method, path) for method, path, is_guarded in operations(app) if is_guarded]
    assert len(guarded) > 10

    for method, path in guarded:
        address = path.format(user_id=alice.user_id, task_id=task["id"])
        answer = await bob.send(method, address)
        assert (answer.status_code, answer.json()["detail"]) == (403, "Access denied"), (method, path)
    assert (await alice.get()).json() == [task]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/stats", "GET, HEAD"),
        ("/bulk", "POST"),
        ("/1", "DELETE, GET, HEAD, PATCH, PUT"),
        ("/trash", "DELETE, GET, HEAD"),
        ("/trash/1", "DELETE"),
        ("/restore", "POST"),
        ("/1/restore", "POST"),
    ],
)
async def test_an_undeclared_method_is_405_with_allow(alice: Person, path: str, allowed: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(allowed.split(", ")):
        answer = await alice.send(method, path, json={"title": "x"})

        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/stats/complete", "/bulk/complete"])
async def test_stats_and_bulk_are_not_task_ids(alice: Person, path: str) -> None:
    assert (await alice.patch(path)).status_code == 404
    assert (await alice.patch("/statistics")).status_code == 422


async def test_an_entity_tag_may_have_a_comma_in_it(alice: Person) -> None:
    task = await alice.create()
    path = f"/{task['id']}"

    read = await alice.get(path, headers={"If-None-Match": '"a,b", "1"'})
    changed = await alice.put(path, json={"title": "y"}, headers={"If-Match": '"a,b"'})

    assert (read.status_code, changed.status_code) == (304, 412)


async def test_an_integer_may_be_written_with_a_zero_fraction(alice: Person) -> None:
    task = await alice.create()
    change: dict[str, Any] = {"op": "complete", "id": float(task["id"]), "version": 1.0}

    answer = await alice.post("/bulk", json={"operations": [change]})
    refused = await alice.post("/bulk", json={"operations": [change | {"id": task["id"] + 0.5}]})

    assert answer.json()["results"][0]["task"]["completed"] is True
    assert refused.json()["detail"] == "operations/0/id: must be a whole number"


async def test_a_sixth_tag_is_422_even_if_it_is_a_duplicate(alice: Person) -> None:
    five = await alice.create(tags=["a", "a", "b", "b", "b"])
    six = await alice.post(json={"title": "x", "tags": ["a"] * 6})

    assert five["tags"] == ["a", "b"]
    assert (six.status_code, six.json()["detail"]) == (422, "tags: must have at most 5 elements")
