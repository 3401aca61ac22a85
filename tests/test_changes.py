import asyncio
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

from queries.changes import list_changes
from queries.owner import Owner
from schemas import ID_MAX, SyncPosition
from tests.conftest import Person, person
from tests.test_revisions import DAILY, churn

Json = dict[str, Any]


async def page(someone: Person, since: str | None = None, **parameters: Any) -> Json:
    known = {} if since is None else {"since": since}
    answer = await someone.get("/changes", params=known | parameters)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


class Device:
    """A client that keeps a copy of the tasks by applying pages."""

    def __init__(self, owner: Person) -> None:
        self.owner = owner
        self.tasks: dict[int, Json] = {}
        self.token: str | None = None

    async def read(self, limit: int = 500, *, arrives: bool = True) -> bool:
        """Apply a page, unless it does not arrive, and return whether there is more."""
        found = await page(self.owner, self.token, limit=limit)
        if not arrives:
            return True
        ids = [change.get("task", change)["id"] for change in found["changes"]]
        assert len(ids) == len(set(ids)) <= limit
        for change in found["changes"]:
            if change["type"] == "deleted":
                self.tasks.pop(change["id"], None)
            else:
                self.tasks[change["task"]["id"]] = change["task"]
        self.token = found["next"]
        return bool(found["has_more"])

    async def assert_catches_up(self) -> None:
        while await self.read(7):
            pass
        assert self.tasks == {task["id"]: task for task in (await self.owner.get()).json()}


async def test_the_first_page_has_the_live_tasks_and_the_next_what_changed(alice: Person) -> None:
    one, two, three = [await alice.create(title) for title in ("one", "two", "three")]
    await alice.delete(f"/{two['id']}")

    first = await page(alice)
    assert first["changes"] == [{"type": "changed", "task": task} for task in (one, three)]
    assert first["has_more"] is False
    assert await page(alice, first["next"]) == {"changes": [], "next": first["next"], "has_more": False}

    one = (await alice.put(f"/{one['id']}", json={"title": "changed"})).json()
    await alice.delete(f"/{three['id']}")
    four = await alice.create("four")
    four = (await alice.patch(f"/{four['id']}/complete")).json()

    *changed, last = (await page(alice, first["next"]))["changes"]
    assert changed[0] == {"type": "changed", "task": one}
    assert {name: changed[1][name] for name in ("type", "id")} == {"type": "deleted", "id": three["id"]}
    assert changed[1]["deleted_at"].endswith("Z")
    assert last == {"type": "changed", "task": four}


async def test_pages_end_at_the_limit(alice: Person) -> None:
    tasks = [await alice.create(str(number)) for number in range(5)]

    seen, token = [], None
    for size in (2, 2, 1):
        found = await page(alice, token, limit=2)
        assert len(found["changes"]) == size
        assert found["has_more"] is (size == 2)
        seen += [change["task"]["id"] for change in found["changes"]]
        token = found["next"]
    assert seen == [task["id"] for task in tasks]


async def test_a_page_is_at_most_a_mebibyte(alice: Person) -> None:
    create = {"op": "create", "task": {"title": "x", "description": "\U0001f33b" * 1000}}
    for _ in range(60):
        assert (await alice.post("/bulk", json={"operations": [create] * 5})).status_code == 200

    answer = await alice.get("/changes?limit=1000")
    device = Device(alice)

    assert 900_000 < len(answer.content) < 1_050_000
    assert answer.json()["has_more"] is True
    while await device.read(1000):
        pass
    assert len(device.tasks) == 300


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1_0", "2" * 30])
async def test_a_limit_beyond_1_to_1000_is_422(alice: Person, limit: str) -> None:
    assert (await alice.get("/changes", params={"limit": limit})).status_code == 422


async def test_a_token_is_for_its_user_and_for_changes_only(alice: Person, bob: Person) -> None:
    await alice.create()
    await alice.create()
    token = (await page(alice))["next"]
    cursor = (await alice.get("?limit=1")).links["next"]["url"].partition("cursor=")[2]

    for someone, since in (
        (bob, token),
        (alice, cursor),
        (alice, token[:-4]),
        (alice, ""),
        (alice, "x" * 4000),
    ):
        answer = await someone.get("/changes", params={"since": since})
        assert answer.status_code == 422
        assert answer.json()["errors"] == [
            {"parameter": "since", "detail": "was not given for these changes"}
        ]
    assert (await alice.get("", params={"cursor": token})).status_code == 422


async def test_changes_of_one_user_are_not_those_of_another(alice: Person, bob: Person) -> None:
    await alice.create()

    assert (await page(bob))["changes"] == []
    assert (await bob.get(f"{alice.tasks}/changes")).status_code == 403


def seal(app: FastAPI, someone: Person, position: SyncPosition) -> str:
    token: str = app.state.services.cursors.write(position, f"{someone.user_id}\nchanges")
    return token


async def run(app: FastAPI, statement: str) -> None:
    engine = app.state.services.database.engine()
    async with engine.begin() as connection:
        await connection.exec_driver_sql(statement)
    await engine.dispose()


async def forget(app: FastAPI, someone: Person, revision: int) -> None:
    """Say that the tombstones up to *revision* have been dropped."""
    own = f"WHERE user_id = '{someone.user_id}'"
    await run(app, f"UPDATE task_owner SET forgotten_revision = {revision} {own}")


async def test_a_token_from_before_a_forgotten_tombstone_is_410(app: FastAPI, alice: Person) -> None:
    one, _ = await alice.create(), await alice.create()
    old = (await page(alice))["next"]
    within = (await page(alice, limit=1))["next"]
    await alice.delete(f"/{one['id']}")
    young = (await page(alice, old))["next"]
    await forget(app, alice, 3)

    for token in (old, within):
        answer = await alice.get("/changes", params={"since": token})
        assert answer.status_code == 410
        assert answer.json()["type"] == "urn:problem:sync-token-expired"
        assert (await alice.get("/events", params={"since": token})).status_code == 410
    assert (await page(alice, young))["changes"] == []
    assert len((await page(alice))["changes"]) == 1


async def test_a_revision_of_which_only_a_part_was_read_may_be_forgotten(app: FastAPI, alice: Person) -> None:
    await alice.create()
    await forget(app, alice, 1)

    for position, status in (
        (SyncPosition(1, 5, 0), 410),
        (SyncPosition(1, ID_MAX, 0), 200),
        (SyncPosition(0, 5, 1), 200),  # it needs no tombstone of revision 1
    ):
        answer = await alice.get("/changes", params={"since": seal(app, alice, position)})
        assert answer.status_code == status


async def test_a_token_at_a_dropped_tombstone_is_still_good(app: FastAPI, alice: Person) -> None:
    """It says that the tombstone was read, so nothing is missing."""
    task = await alice.create()
    await alice.delete(f"/{task['id']}")
    owner = Owner(alice.user_id, app.state.services.database)
    found = await list_changes(owner, SyncPosition(1, ID_MAX, 0), 10)
    await forget(app, alice, 2)

    (position,) = found.positions
    answer = await alice.get("/changes", params={"since": seal(app, alice, position)})
    assert (answer.status_code, answer.json()["changes"]) == (200, [])


GUIDE = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
SKIP_AHEAD = GUIDE.partition("Skip ahead")[2].split("```")[1].removeprefix("sql")


async def test_after_a_restored_backup_the_guides_statement_makes_devices_start_again(
    app: FastAPI, alice: Person
) -> None:
    tokens = []
    for _ in range(3):
        await alice.create()
        tokens.append((await page(alice))["next"])
    statement = SKIP_AHEAD.replace(";", f" WHERE user_id = '{alice.user_id}'")
    # The backup is from the time of the second token.
    await run(app, f"UPDATE task_owner SET revision = 2 WHERE user_id = '{alice.user_id}'")
    await run(app, statement)

    for token in tokens:
        assert (await alice.get("/changes", params={"since": token})).status_code == 410
    assert len((await page(alice))["changes"]) == 3


async def test_a_user_who_deleted_nothing_may_have_the_oldest_token(app: FastAPI, alice: Person) -> None:
    oldest = (await page(alice))["next"]
    for _ in range(3):
        await alice.create()

    assert len((await page(alice, oldest))["changes"]) == 3


async def test_a_token_from_the_future_is_410(app: FastAPI, alice: Person) -> None:
    """The database was restored from a backup."""
    await alice.create()

    answer = await alice.get("/changes", params={"since": seal(app, alice, SyncPosition(2, ID_MAX, 0))})

    assert answer.status_code == 410


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("create"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["put", "toggle", "delete", "complete in series"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["bulk", "delete all", "complete all", "reopen all"]), st.just(0)),
        st.tuples(st.sampled_from(["restore", "erase", "restore all", "empty trash"]), st.integers(0, 9)),
        st.tuples(st.sampled_from(["page", "lost page"]), st.integers(1, 4)),
    ),
    max_size=25,
)


@pytest.mark.no_cover  # coverage of the same lines many times is slow
@settings(max_examples=40, deadline=None)
@given(steps=STEPS)
@example(steps=[("page", 4), ("delete", 0), ("page", 4), ("restore", 0)])
@example(steps=[("page", 4), ("delete", 0), ("page", 4), ("restore all", 0)])
@example(steps=[("page", 4), ("delete", 0), ("empty trash", 0)])
async def test_a_device_ends_equal_to_the_list(client: Any, steps: list[tuple[str, int]]) -> None:
    owner = person("alice", client)
    device, late = Device(owner), Device(owner)
    await owner.create("first")
    for kind, number in steps:
        tasks = (await owner.get()).json()
        which = f"/{tasks[number % len(tasks)]['id']}" if tasks else "/7000000"
        match kind:
            case "create":
                await owner.create(str(number), **(DAILY if number else {}))
            case "put":
                await owner.put(which, json={"title": str(number)})
            case "toggle" | "complete in series":
                await owner.patch(f"{which}/complete")
            case "delete":
                await owner.delete(which)
            case "bulk":
                create = {"op": "create", "task": {"title": "x"}}
                change = [{"op": "delete", "id": task["id"]} for task in tasks[:2]]
                await owner.post("/bulk?atomic=false", json={"operations": [create, create, *change]})
            case "delete all":
                await owner.delete("?status=completed")
            case "complete all" | "reopen all":
                completed = kind == "complete all"
                await owner.patch(f"?completed={not completed}", json={"completed": completed})
            case "restore" | "erase" | "restore all" | "empty trash":
                await _use_trash(owner, kind, number)
            case "page" | "lost page":
                await device.read(number, arrives=kind == "page")

    await device.assert_catches_up()
    await late.assert_catches_up()


async def _use_trash(owner: Person, kind: str, number: int) -> None:
    ids = [task["id"] for task in (await owner.get("/trash")).json()] or [7_000_000]
    match kind:
        case "restore":
            await owner.post(f"/{ids[number % len(ids)]}/restore")
        case "erase":
            await owner.delete(f"/trash/{ids[number % len(ids)]}")
        case "restore all":
            await owner.post("/restore", json={"ids": ids})
        case "empty trash":
            await owner.delete("/trash")


@pytest.mark.no_cover
async def test_a_device_that_reads_while_many_write_misses_nothing(alice: Person) -> None:
    device = Device(alice)
    writing = asyncio.create_task(_churn(alice))
    while not writing.done():
        await device.read(3)
    await writing

    await device.assert_catches_up()


async def _churn(someone: Person) -> None:
    for number in range(5):
        await asyncio.gather(*(churn(someone, 10 * number + each) for each in range(4)))


async def test_v1_has_the_same_changes(alice: Person) -> None:
    await alice.create()

    answer = await alice.get(f"/api/v1/{alice.user_id}/tasks/changes")

    assert answer.json()["changes"] == (await page(alice))["changes"]


async def test_changes_are_not_kept_by_the_browser(alice: Person) -> None:
    assert (await alice.get("/changes")).headers["cache-control"] == "no-store"
