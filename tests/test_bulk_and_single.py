from collections.abc import Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from main import create_app
from tests import task_model
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server
from tests.task_model import Json


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
async def test_the_earliest_and_the_latest_due_date_work_like_others(alice: Person, day: str) -> None:
    create = {"op": "create", "task": {"title": "in bulk", "due_date": day}}
    bulk = (await alice.post("/bulk", json={"operations": [create]})).json()["results"][0]["task"]
    alone = await alice.create("alone", due_date=day)

    listed = await alice.get(f"?due_date_from={day}&due_date_to={day}&sort=due_date&limit=1")
    rest = await alice.get(listed.links["next"]["url"])

    assert [*listed.json(), *rest.json()] == [bulk, alone]
    for task in (bulk, alone):
        assert (await alice.put(f"/{task['id']}", json={"due_date": day})).json() == task


async def test_times_are_utc_whatever_the_time_zone_of_the_database(postgres_url: str) -> None:
    name = urlsplit(postgres_url).path[1:]
    await Server(postgres_url).execute(f"ALTER DATABASE \"{name}\" SET timezone = 'America/New_York'")
    operation = {"op": "create", "task": {"title": "Buy milk", "completed": True}}
    before = datetime.now(UTC)

    async with running(create_app(settings_for(postgres_url))) as client:
        done = await person("alice", client).post("/bulk", json={"operations": [operation]})

    task = done.json()["results"][0]["task"]
    assert task["created_at"] == task["updated_at"] == task["completed_at"]
    assert before <= datetime.fromisoformat(task["created_at"]) <= datetime.now(UTC)


async def complete(person: Person, way: str, task_id: int) -> None:
    one = {"op": "complete", "id": task_id}
    answer = {
        "toggle": lambda: person.patch(f"/{task_id}/complete"),
        "set": lambda: person.patch(f"/{task_id}/complete", json={"completed": True}),
        "put": lambda: person.put(f"/{task_id}", json={"completed": True}),
        "bulk": lambda: person.post("/bulk", json={"operations": [one]}),
        "all": lambda: person.patch("?status=pending", json={"completed": True}),
    }
    (await answer[way]()).raise_for_status()


WAYS = ["toggle", "set", "put", "bulk", "all"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_series_keeps_its_anchor_day_however_it_is_completed(alice: Person, way: str) -> None:
    await alice.create(due_date="2023-12-31", recurring="monthly")

    days = []
    for _ in range(4):
        (task,) = (await alice.get("?status=pending")).json()
        days.append(task["due_date"])
        await complete(alice, way, task["id"])

    assert days == ["2023-12-31", "2024-01-31", "2024-02-29", "2024-03-31"]


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_has_one_successor_until_its_due_date_changes(alice: Person, way: str) -> None:
    task = await alice.create(due_date="2024-01-31", recurring="weekly")

    days = []
    for changes in ({}, {"due_date": "2024-01-31"}, {"due_date": "2024-02-01"}):
        await alice.put(f"/{task['id']}", json={"completed": False, **changes})
        await complete(alice, way, task["id"])
        successors = (await alice.get("?status=pending")).json()
        days.append([successor["due_date"] for successor in successors])
        for successor in successors:
            await alice.delete(f"/{successor['id']}")

    assert days == [["2024-02-07"], [], ["2024-02-08"]]


async def test_a_new_due_date_in_bulk_allows_another_successor(alice: Person) -> None:
    task = await alice.create(due_date="2024-01-31", recurring="weekly", completed=False)
    day = {"due_date": "2024-02-01", "completed": False}
    operations = [
        {"op": "complete", "id": task["id"]},
        {"op": "update", "id": task["id"], "changes": day},
        {"op": "complete", "id": task["id"]},
    ]

    await alice.post("/bulk", json={"operations": operations})

    pending = (await alice.get("?status=pending&sort=due_date")).json()
    assert [successor["due_date"] for successor in pending] == ["2024-02-07", "2024-02-08"]


operations = st.one_of(
    task_model.creates,
    st.builds(
        lambda operation, version: operation | {"version": version},
        task_model.updates | task_model.completions | task_model.deletions,
        st.sampled_from([None, None, 1, 2, 3]),
    ),
)
NOBODYS = 2**40


async def fill(person: Person, tasks: Sequence[Json]) -> list[int]:
    """Create *tasks* and return their ids."""
    return [(await person.create(**task))["id"] for task in tasks]


async def tasks_of(person: Person) -> list[Json]:
    """Return the tasks, oldest first, without ids and timestamps, which differ between users."""
    return [kept(task) for task in (await person.get("?order=asc")).json()]


def kept(task: Json) -> Json:
    dated = {"completed_at": task["completed_at"] is not None}
    return {
        name: value
        for name, value in (task | dated).items()
        if name not in ("id", "user_id", "created_at", "updated_at")
    }


def among(ids: Sequence[int], operation: Json) -> int:
    """Return the id in *ids* that *operation* refers to, or an unknown id."""
    return ids[operation["which"]] if operation.get("which", 9) < len(ids) else NOBODYS


def in_bulk(ids: Sequence[int], done: Sequence[Json]) -> Json:
    return {"operations": [operation | {"id": among(ids, operation)} for operation in done]}


def outcome(answer: httpx.Response) -> Json:
    """Return the response of a single request in the format of a bulk result."""
    found = answer.json() if answer.content else {}
    if answer.is_success:
        return {"status": answer.status_code} | ({"task": kept(found)} if found else {})
    return {"status": answer.status_code} | ({"etag": found["etag"]} if "etag" in found else {})


first = st.lists(st.fixed_dictionaries(task_model.fields), min_size=2, max_size=5)


@pytest.mark.no_cover  # coverage of the same lines many times is slow
@settings(derandomize=True, deadline=None, max_examples=40)
@given(first, st.lists(operations, min_size=3, max_size=12))
async def test_operations_leave_in_bulk_what_they_leave_one_by_one(
    client: httpx.AsyncClient, tasks: list[Json], done: list[Json]
) -> None:
    alice, bob = person("alice", client), person("bob", client)
    ids = await fill(alice, tasks)

    alone = [
        outcome(await task_model.send_alone(alice, operation, among(ids, operation))) for operation in done
    ]
    together = await bob.post("/bulk?atomic=false", json=in_bulk(await fill(bob, tasks), done))

    results = [
        result | ({"task": kept(result["task"])} if "task" in result else {})
        for result in together.json()["results"]
    ]
    assert [{name: result[name] for name in result if name != "detail"} for result in results] == alone
    assert await tasks_of(bob) == await tasks_of(alice)
    # The hidden state of a series shows in its successors.
    for someone in (alice, bob):
        for task in (await someone.get("?order=asc")).json():
            await someone.patch(f"/{task['id']}/complete")
    assert await tasks_of(bob) == await tasks_of(alice)


@pytest.mark.no_cover  # coverage of the same lines many times is slow
@settings(derandomize=True, deadline=None, max_examples=40)
@given(first, st.lists(operations, min_size=1, max_size=5))
async def test_operations_are_done_all_or_none(
    client: httpx.AsyncClient, tasks: list[Json], done: list[Json]
) -> None:
    alice, bob = person("alice", client), person("bob", client)
    each = await alice.post("/bulk?atomic=false", json=in_bulk(await fill(alice, tasks), done))
    statuses = [result["status"] for result in each.json()["results"]]
    failed = [index for index, status in enumerate(statuses) if status >= 400]
    ids = await fill(bob, tasks)
    before = (await bob.get()).json()

    answer = await bob.post("/bulk", json=in_bulk(ids, done))

    if failed:
        assert (answer.status_code, answer.json()["index"]) == (statuses[failed[0]], failed[0])
        assert (await bob.get()).json() == before
    else:
        assert [result["status"] for result in answer.json()["results"]] == statuses
        assert await tasks_of(bob) == await tasks_of(alice)
