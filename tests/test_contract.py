"""What running Schemathesis by the OpenAPI document has found."""

from typing import Any

import pytest

from tests.conftest import Person


@pytest.mark.parametrize(
    ("path", "allowed"), [("/stats", "GET"), ("/bulk", "POST"), ("/1", "DELETE, GET, PATCH, PUT")]
)
async def test_a_method_that_an_address_does_not_have_is_405(alice: Person, path: str, allowed: str) -> None:
    for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - set(allowed.split(", ")):
        answer = await alice.send(method, path, json={"title": "x"})

        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/stats/complete", "/bulk/complete"])
async def test_the_names_of_other_things_are_no_ids(alice: Person, path: str) -> None:
    assert (await alice.patch(path)).status_code == 404
    assert (await alice.patch("/statistics")).status_code == 422


async def test_an_entity_tag_may_have_a_comma_in_it(alice: Person) -> None:
    task = await alice.create()
    path = f"/{task['id']}"

    read = await alice.get(path, headers={"If-None-Match": '"a,b", "1"'})
    changed = await alice.put(path, json={"title": "y"}, headers={"If-Match": '"a,b"'})

    assert (read.status_code, changed.status_code) == (304, 412)


async def test_seven_may_be_written_with_a_fraction_of_nothing(alice: Person) -> None:
    task = await alice.create()
    change: dict[str, Any] = {"op": "complete", "id": float(task["id"]), "version": 1.0}

    answer = await alice.post("/bulk", json={"operations": [change]})
    refused = await alice.post("/bulk", json={"operations": [change | {"id": task["id"] + 0.5}]})

    assert answer.json()["results"][0]["task"]["completed"] is True
    assert refused.json()["detail"] == "operations/0/id: must be a whole number"


async def test_a_sixth_tag_is_too_many_even_if_it_is_there_already(alice: Person) -> None:
    five = await alice.create(tags=["a", "a", "b", "b", "b"])
    six = await alice.post(json={"title": "x", "tags": ["a"] * 6})

    assert five["tags"] == ["a", "b"]
    assert (six.status_code, six.json()["detail"]) == (422, "tags: must be at most 5 tags")
