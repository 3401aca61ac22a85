import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import bindparam, select, update
from structlog.testing import capture_logs

from database.statements import named
from errors import Unavailable
from main import create_app
from models import BIG_ID, TIMESTAMP
from queries import purge
from queries.owner import OWNED, TASKS, Owner
from queries.purge import Deleters, Purge
from queries.revisions import OWNERS
from tests.conftest import Person, person, running, settings_for
from tests.test_metrics import risen
from tests.test_trash import EVERY_FIELD, ROWS, in_trash, owner_of

__all__ = ("risen",)  # a fixture

SET_AGE = named(
    "set_age",
    update(TASKS)
    .where(OWNED, TASKS.c.id == bindparam("task_id", type_=BIG_ID))
    .values(deleted_at=bindparam("at", type_=TIMESTAMP))
    .returning(TASKS.c.id),
)
FORGOTTEN = named("forgotten", select(OWNERS.c.forgotten_revision).where(OWNERS.c.user_id == OWNED.right))


@pytest.fixture
async def app(url: str) -> FastAPI:
    """A service with a database of its own, because a purge is of all users."""
    return create_app(settings_for(url))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app) as client:
        yield client


def purge_of(app: FastAPI, trash_days: int = 30, sync_days: int = 30, **options: Any) -> Purge:
    return Purge(app.state.services.database, trash_days, sync_days, **options)


async def deleted(app: FastAPI, someone: Person, *, days_ago: float = 0, erased: bool = False) -> int:
    """Return the id of a task that was deleted *days_ago*."""
    task_id: int = (await someone.create(**EVERY_FIELD))["id"]
    await someone.delete(f"/{task_id}")
    if erased:
        await someone.delete(f"/trash/{task_id}")
    at = datetime.now(UTC) - timedelta(days=days_ago)
    assert await owner_of(app, someone).one(SET_AGE, task_id=task_id, at=at)
    return task_id


async def rows_of(app: FastAPI, someone: Person) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in await owner_of(app, someone).all(ROWS)}


async def forgotten(app: FastAPI, someone: Person) -> int:
    row = await owner_of(app, someone).one(FORGOTTEN)
    assert row
    return int(row["forgotten_revision"])


async def test_old_trash_is_erased_and_newer_is_not(
    app: FastAPI, alice: Person, risen: Callable[..., float]
) -> None:
    bob = person("bob", alice.client)
    old, new = await deleted(app, alice, days_ago=31), await deleted(app, alice, days_ago=29)
    of_bob, live = await deleted(app, bob, days_ago=400), await alice.create(**EVERY_FIELD)

    await purge_of(app, sync_days=1000).once()

    rows = await rows_of(app, alice)
    assert (rows[old]["erased"], rows[old]["title"], rows[old]["tags"]) == (True, "", [])
    assert await in_trash(alice) == [new]
    assert (await rows_of(app, bob))[of_bob]["erased"]
    assert (await alice.get()).json() == [live]
    assert await forgotten(app, alice) == 0
    assert risen("tasks_purged_total", outcome="erased") == 2
    assert risen("tasks_purged_total", outcome="dropped") == 0


@pytest.mark.parametrize(("trash_days", "sync_days"), [(30, 60), (60, 30), (60, 0)])
async def test_tombstones_are_dropped_after_the_longer_of_both_times(
    app: FastAPI, alice: Person, trash_days: int, sync_days: int, risen: Callable[..., float]
) -> None:
    older, old = [await deleted(app, alice, days_ago=days, erased=True) for days in (62, 61)]
    kept = [await deleted(app, alice, days_ago=59, erased=True)]
    revisions = {row["id"]: row["revision"] for row in (await rows_of(app, alice)).values()}

    await purge_of(app, trash_days, sync_days).once()

    assert list(await rows_of(app, alice)) == kept
    assert await forgotten(app, alice) == max(revisions[older], revisions[old])
    assert risen("tasks_purged_total", outcome="dropped") == 2


async def test_old_trash_becomes_a_tombstone_and_is_dropped_in_one_purge(app: FastAPI, alice: Person) -> None:
    await deleted(app, alice, days_ago=31)

    await purge_of(app).once()

    assert await rows_of(app, alice) == {}
    assert await forgotten(app, alice) == 2


async def test_the_forgotten_revision_never_falls(app: FastAPI, alice: Person) -> None:
    older, newer = [await deleted(app, alice, days_ago=days, erased=True) for days in (35, 40)]
    await purge_of(app, sync_days=38).once()
    assert list(await rows_of(app, alice)) == [older]

    await purge_of(app).once()

    assert newer > older
    assert await forgotten(app, alice) == 4


async def test_a_device_learns_of_restored_and_erased_tasks_until_tombstones_are_dropped(
    app: FastAPI, alice: Person
) -> None:
    bob = person("bob", alice.client)
    await bob.create()
    since, of_bob = [(await someone.get("/changes")).json()["next"] for someone in (alice, bob)]
    restored, erased = await deleted(app, alice), await deleted(app, alice, days_ago=31, erased=True)
    await alice.post(f"/{restored}/restore")

    seen = (await alice.get(f"/changes?since={since}")).json()["changes"]
    await purge_of(app, sync_days=32).once()
    still = (await alice.get(f"/changes?since={since}")).json()["changes"]
    await purge_of(app).once()
    statuses = [
        (await someone.get(f"/changes?since={token}")).status_code
        for someone, token in ((alice, since), (bob, of_bob))
    ]

    told = [(each["type"], each["id"] if "id" in each else each["task"]["id"]) for each in seen]
    assert told == [("deleted", erased), ("changed", restored)]
    assert still == seen
    assert statuses == [410, 200]


async def test_without_trash_days_what_is_still_in_the_trash_is_erased(app: FastAPI, alice: Person) -> None:
    task_id = await deleted(app, alice)

    await purge_of(app, trash_days=0).once()

    assert await in_trash(alice) == []
    assert list(await rows_of(app, alice)) == [task_id]


async def test_the_oldest_beyond_the_limit_are_purged(app: FastAPI, alice: Person) -> None:
    bob = person("bob", alice.client)
    trash = [await deleted(app, alice, days_ago=days) for days in (1, 5, 2, 4, 3)]
    tombstones = [await deleted(app, alice, days_ago=days, erased=True) for days in (11, 15, 12)]
    of_bob = [await deleted(app, bob) for _ in range(3)]
    purging = purge_of(app, tasks_max=2)
    purging.deleters.add(alice.user_id)

    await purging.once()

    rows = await rows_of(app, alice)
    assert await in_trash(alice) == [trash[0], trash[2]]
    # The oldest of the trash are now the newest tombstones.
    assert {task_id for task_id, row in rows.items() if row["erased"]} == {trash[3], trash[4]}
    assert await forgotten(app, alice) > 0
    assert not {*tombstones} & rows.keys()
    assert len(await in_trash(bob)) == len(of_bob)  # has not deleted anything through this process
    assert len(purging.deleters) == 0


@pytest.mark.parametrize("how", ["one", "filter", "bulk", "for good", "empty"])
async def test_every_way_to_delete_is_remembered(app: FastAPI, alice: Person, how: str) -> None:
    task = await alice.create()
    deleters: Deleters = app.state.services.purge.deleters
    if how in ("for good", "empty"):
        await alice.delete(f"/{task['id']}")
        assert deleters.pop() == alice.user_id
    assert len(deleters) == 0

    match how:
        case "one":
            await alice.delete(f"/{task['id']}")
        case "filter":
            await alice.delete("?status=pending")
        case "bulk":
            await alice.post("/bulk", json={"operations": [{"op": "delete", "id": task["id"]}]})
        case "for good":
            await alice.delete(f"/trash/{task['id']}")
        case "empty":
            await alice.delete("/trash")

    assert deleters.pop() == alice.user_id


def test_at_most_10000_users_are_remembered() -> None:
    deleters = Deleters()

    for number in range(10_005):
        deleters.add(str(number))
        deleters.add("0")

    assert len(deleters) == 10_000


@pytest.mark.parametrize(("portion", "owners_max"), [(2, 50), (500, 2)])
async def test_a_purge_works_in_portions_until_all_is_done(
    app: FastAPI, alice: Person, monkeypatch: pytest.MonkeyPatch, portion: int, owners_max: int
) -> None:
    monkeypatch.setattr(purge, "PORTION", portion)
    monkeypatch.setattr(purge, "OWNERS_MAX", owners_max)
    people = [person(f"p{number}", alice.client) for number in range(5)]
    for someone in [*people, people[0], people[0], people[0], people[0]]:
        await deleted(app, someone, days_ago=31)
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def noting(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noting)
    await purge_of(app).once()

    assert [await rows_of(app, someone) for someone in people] == [{}] * 5
    assert pauses.count(purge.PAUSE_S) >= 4


async def test_two_purges_and_requests_at_once_lose_nothing(
    app: FastAPI, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "PORTION", 4)
    monkeypatch.setattr(purge, "PAUSE_S", 0.001)
    old = [await deleted(app, alice, days_ago=31) for _ in range(20)]
    new = [await deleted(app, alice) for _ in range(10)]

    purging = asyncio.gather(*(purge_of(app).once() for _ in range(3)))
    answers = await asyncio.gather(
        *(alice.post("/restore", json={"ids": ids}) for ids in (old[::-1], new[::-1], old[5:9])),
        *(alice.delete(f"/{task_id}") for task_id in old),
    )
    await purging

    assert {answer.status_code for answer in answers} <= {200, 204, 404}
    await purge_of(app).once()
    rows = await rows_of(app, alice)
    assert set(new) <= rows.keys()
    assert not [row for row in rows.values() if row["erased"]]
    kept = {task["id"] for task in (await alice.get()).json()} | {*await in_trash(alice)}
    assert kept == rows.keys()


async def test_a_task_deleted_again_since_it_was_found_is_not_erased(app: FastAPI, alice: Person) -> None:
    task_id = await deleted(app, alice, days_ago=31)
    found = await app.state.services.database.all(
        purge._FIND_OLD_TRASH, expiry=datetime.now(UTC) - timedelta(days=30), limit=10
    )
    await alice.post(f"/{task_id}/restore")
    await alice.delete(f"/{task_id}")

    erased = await purge_of(app)._purge_portion(purge._ERASE, [(alice.user_id, found)])

    assert ([row["id"] for row in found], erased) == ([task_id], 0)
    assert await in_trash(alice) == [task_id]


@pytest.mark.parametrize("days_ago", [31, 1])  # too old, and beyond the limit
async def test_a_purge_ends_when_another_process_purges(postgres_url: str, days_ago: int) -> None:
    app = create_app(settings_for(postgres_url))
    async with running(app) as client:
        alice = person("alice", client)
        await deleted(app, alice, days_ago=days_ago)
        other = await asyncpg.connect(postgres_url)
        await other.execute("BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('purge', 0))")
        purging = purge_of(app, tasks_max=0)
        purging.deleters.add(alice.user_id)

        await purging.once()
        during, remembered = len(await in_trash(alice)), len(purging.deleters)
        await other.close()
        await purging.once()

        assert (during, remembered) == (1, 1)
        assert await rows_of(app, alice) == {}


async def test_a_failed_purge_is_retried_and_ends_with_the_service(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([Unavailable(), RuntimeError("a bug of ours")])
    purged = asyncio.Event()

    async def once(_: Purge) -> None:
        if outcome := next(outcomes, None):
            raise outcome
        purged.set()

    monkeypatch.setattr(Purge, "once", once)
    monkeypatch.setattr(purge, "FIRST_S", 0.001)
    monkeypatch.setattr(purge, "PURGE_S", 0.001)
    before = asyncio.all_tasks()
    with capture_logs() as lines:
        async with running(create_app(settings_for(url))):
            await asyncio.wait_for(purged.wait(), 5)

    assert [line["event"] for line in lines].count("trash is not purged") == 1  # for RuntimeError
    assert not {task for task in asyncio.all_tasks() - before if "Purge" in repr(task.get_coro())}


async def test_a_service_purges_by_its_settings(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(settings_for(url, trash_days=3, sync_days=5, max_tasks_per_user=2))
    for name in ("FIRST_S", "PURGE_S"):
        monkeypatch.setattr(purge, name, 0.05)
    async with running(app) as client:
        alice = person("alice", client)
        ids = [await deleted(app, alice, days_ago=days) for days in (6, 4, 2)]

        async with asyncio.timeout(10):
            while ids[0] in await rows_of(app, alice) or ids[1] in await in_trash(alice):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.02)

        assert await in_trash(alice) == [ids[2]]
        assert list(await rows_of(app, alice)) == ids[1:]


async def test_rows_whose_owner_has_none_do_not_keep_a_purge_busy(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(purge, "PORTION", 1)
    app = create_app(settings_for(postgres_url))
    async with running(app):
        loaded = await asyncpg.connect(postgres_url)
        await loaded.execute("INSERT INTO task (user_id, title, deleted_at) VALUES ('x', 'x', '2020-01-01')")
        await loaded.close()

        async with asyncio.timeout(2):
            await purge_of(app).once()

        assert len(await Owner("x", app.state.services.database).all(ROWS)) == 1
