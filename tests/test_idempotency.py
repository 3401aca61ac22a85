import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select
from sqlalchemy.sql.base import Executable
from structlog.testing import capture_logs

import db
from database import postgres as postgres_database
from database.statements import Row, compile_statement
from db import Database, Postgres
from errors import Unavailable
from main import create_app
from queries import idempotency
from queries.owner import Owner
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server


async def post_once(person: Person, key: str, **fields: Any) -> httpx.Response:
    return await person.post(json={"title": "Once", **fields}, headers={"Idempotency-Key": key})


async def test_a_repeated_idempotency_key_replays_the_response(alice: Person) -> None:
    first = await post_once(alice, "a", due_date="2026-02-28", tags=["é"])
    await alice.put(f"/{first.json()['id']}", json={"title": "Changed since"})

    again = await post_once(alice, "a", tags=["é"], due_date="2026-02-28")

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    for header in ("location", "etag"):
        assert again.headers[header] == first.headers[header]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len((await alice.get()).json()) == 1


async def test_a_response_is_replayed_even_after_its_task_is_deleted(alice: Person) -> None:
    first = await post_once(alice, "a")
    await alice.delete(f"/{first.json()['id']}")

    assert (await post_once(alice, "a")).content == first.content
    assert (await alice.get()).json() == []


async def test_another_body_under_the_same_key_is_422(alice: Person) -> None:
    await post_once(alice, "a")

    answer = await post_once(alice, "a", description="another")

    assert answer.status_code == 422
    assert answer.json()["detail"] == "Idempotency-Key: was used for another request"
    assert len((await alice.get()).json()) == 1


async def test_two_users_never_share_the_lock_of_a_key(postgres: Server) -> None:
    release = asyncio.Event()

    async def work(_: Owner) -> str:
        await release.wait()
        return "done"

    async with postgres.migrated_database() as url:
        database = db.connect(url, pool_size=2)
        await database.open()
        try:
            both = [
                asyncio.create_task(idempotency.once(Owner(user_id, database), key, {}, work))
                for user_id, key in (("a", "b/k"), ("a/b", "k"))
            ]
            await asyncio.sleep(0.2)
            release.set()
            assert await asyncio.gather(*both) == [("done", False)] * 2
        finally:
            await database.close()


async def test_an_idempotency_key_belongs_to_one_user(alice: Person, bob: Person) -> None:
    of_alice, of_bob = await post_once(alice, "a"), await post_once(bob, "a")

    assert of_bob.status_code == 201
    assert of_bob.json()["id"] != of_alice.json()["id"]
    assert "idempotent-replayed" not in of_bob.headers


async def test_an_idempotency_key_may_be_quoted(alice: Person) -> None:
    first = await post_once(alice, '"a b"')

    assert (await post_once(alice, "a b")).content == first.content
    assert (await post_once(alice, '"a b" ')).content == first.content


@pytest.mark.parametrize("key", ["x" * 255, "é", "'", '"', "%00", "../..", "a,b"])
async def test_any_printable_idempotency_key_is_accepted(alice: Person, key: str) -> None:
    for replayed in (None, "true"):
        answer = await alice.post(json={"title": "x"}, headers={b"Idempotency-Key": key.encode("latin-1")})
        assert (answer.status_code, answer.headers.get("idempotent-replayed")) == (201, replayed)


@pytest.mark.parametrize("key", [b"", b'""', b"x" * 256, b"\x85", b"a\tb", b"a\x01b"])
async def test_an_invalid_idempotency_key_is_422_and_creates_nothing(alice: Person, key: bytes) -> None:
    answer = await alice.post(json={"title": "x"}, headers={b"Idempotency-Key": key})

    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"parameter": "Idempotency-Key", "detail": "must be 1 to 255 printable characters"}
    ]
    assert (await alice.get()).json() == []


async def test_repeated_idempotency_key_header_is_422(alice: Person) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b"), ("Authorization", f"Bearer {alice.token}")]

    answer = await alice.client.post(
        alice.tasks, content='{"title": "x"}', headers=[*headers, ("Content-Type", "application/json")]
    )

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"parameter": "Idempotency-Key", "detail": "must be sent once"}]


async def test_a_422_does_not_use_up_its_idempotency_key(alice: Person) -> None:
    refused = [await post_once(alice, "a", title=""), await post_once(alice, "a", due_time="9:30")]

    answer = await post_once(alice, "a", due_time="09:30")

    assert [answer.status_code for answer in refused] == [422, 422]
    assert (answer.status_code, len((await alice.get()).json())) == (201, 1)


async def test_fifty_concurrent_requests_with_one_key_create_one_task(alice: Person) -> None:
    answers = await asyncio.gather(*(post_once(alice, "a") for _ in range(50)))

    statuses = {answer.status_code for answer in answers}
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert statuses <= {201, 409}
    assert made == {task["id"] for task in (await alice.get()).json()}
    assert len(made) == 1
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 409)


# On SQLite the second request waits for the first, as every writer does.
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_key_whose_request_is_still_running_is_409(alice: Person, database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        lock = "SELECT pg_advisory_xact_lock(hashtextextended($1 || chr(10) || $2, 0))"
        await connection.execute(lock, alice.user_id, "a")

        running = await post_once(alice, "a")
        other = await post_once(alice, "b")
        await transaction.rollback()
        afterwards = await post_once(alice, "a")
    finally:
        await connection.close()

    assert (running.status_code, running.headers["retry-after"]) == (409, "1")
    assert running.json()["detail"] == "A request with this Idempotency-Key is still running"
    assert (other.status_code, afterwards.status_code) == (201, 201)


class Tomorrow(datetime):
    after = timedelta(hours=24, seconds=1)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override] # it returns a plain datetime
        return datetime.now(tz) + cls.after


class JustBefore(Tomorrow):
    after = timedelta(hours=23, minutes=59)


async def test_an_idempotency_key_is_replayed_for_a_day(
    app: FastAPI, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await post_once(alice, "a")
    monkeypatch.setattr(idempotency, "datetime", JustBefore)

    await idempotency.remove_expired(app.state.services.database)

    assert (await post_once(alice, "a")).content == first.content


async def test_an_idempotency_key_may_be_reused_after_a_day(
    app: FastAPI, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await post_once(alice, "a")
    await post_once(alice, "b")
    monkeypatch.setattr(idempotency, "datetime", Tomorrow)

    answer = await post_once(alice, "a", description="another")
    again = await post_once(alice, "a", description="another")

    assert (answer.status_code, answer.json()["id"] > first.json()["id"]) == (201, True)
    assert again.content == answer.content
    assert await kept(app, alice) == ["a", "b"]


async def test_expired_keys_of_inactive_users_are_removed_in_batches(
    app: FastAPI, alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = app.state.services.database
    for key in "abc":
        await post_once(alice, key)
        await post_once(bob, key)
    assert not await idempotency.remove_expired(database)
    assert await kept(app, alice) == ["a", "b", "c"]

    monkeypatch.setattr(idempotency, "datetime", Tomorrow)
    await post_once(alice, "new")
    portions = 1
    while await idempotency.remove_expired(database):
        portions += 1

    assert (await kept(app, alice), await kept(app, bob)) == (["new"], [])
    assert portions == 1


async def test_a_batch_has_the_oldest_expired_keys_and_says_if_more_remain(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "_FIND_PORTION", _portion_of(monkeypatch, 2))
    app = create_app(settings_for(url))
    async with running(app) as client:
        alice = person("alice", client)
        for hours, key in enumerate("edcba"):
            with monkeypatch.context() as earlier:
                past = type("Past", (Tomorrow,), {"after": timedelta(hours=-hours)})
                earlier.setattr(idempotency, "datetime", past)
                await post_once(alice, key)
        monkeypatch.setattr(idempotency, "datetime", Tomorrow)

        more = await idempotency.remove_expired(app.state.services.database)
        left = await kept(app, alice)
        others = [await idempotency.remove_expired(app.state.services.database) for _ in range(3)]

        assert (more, left) == (True, ["c", "d", "e"])
        assert (others, await kept(app, alice)) == ([True, False, False], [])


def _portion_of(monkeypatch: pytest.MonkeyPatch, count: int) -> Executable:
    monkeypatch.setattr(idempotency, "PORTION", count)
    statement: Executable = idempotency._find_portion()
    return statement


async def test_concurrent_sweeps_remove_every_expired_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "_FIND_PORTION", _portion_of(monkeypatch, 5))
    monkeypatch.setattr(idempotency, "SWEEP_S", 0.01)
    monkeypatch.setattr(idempotency, "PAUSE_S", 0.001)
    first, second = create_app(settings_for(url)), create_app(settings_for(url))
    async with running(first) as client, running(second):
        alice = person("alice", client)
        for number in range(40):
            await post_once(alice, str(number))
        monkeypatch.setattr(idempotency, "datetime", Tomorrow)

        async with asyncio.timeout(10):
            while await kept(first, alice):  # noqa: ASYNC110 - another process has no event either
                await asyncio.sleep(0.02)


async def test_a_failed_sweep_is_retried_and_ends_with_the_service(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([Unavailable(), RuntimeError("a bug of ours"), True, True])
    swept = asyncio.Event()

    async def remove_expired(_: Database) -> bool:
        outcome = next(outcomes, None)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            swept.set()
        return bool(outcome)

    monkeypatch.setattr(idempotency, "remove_expired", remove_expired)
    monkeypatch.setattr(idempotency, "SWEEP_S", 0.001)
    before = asyncio.all_tasks()
    with capture_logs() as lines:
        async with running(create_app(settings_for(database_url))) as client:
            await asyncio.wait_for(swept.wait(), 5)
            assert (await client.get("/health")).status_code == 200

    assert [line["event"] for line in lines].count("expired keys are not removed") == 1  # for RuntimeError
    assert not {task for task in asyncio.all_tasks() - before if "sweep" in repr(task.get_coro())}


async def test_the_sweep_interval_is_short_while_expired_keys_remain(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    outcomes = iter([True, False, True])

    async def remove_expired(_: Database) -> bool:
        return next(outcomes)

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 4:
            raise asyncio.CancelledError

    monkeypatch.setattr(idempotency, "remove_expired", remove_expired)
    with monkeypatch.context() as clock:
        clock.setattr(asyncio, "sleep", rest)
        with pytest.raises(asyncio.CancelledError):
            await idempotency.sweep(app.state.services.database)

    first, *others = rests
    assert 0 <= first <= idempotency.SWEEP_S
    assert others == [idempotency.PAUSE_S, idempotency.SWEEP_S, idempotency.PAUSE_S]


async def test_a_sweep_without_expired_keys_writes_nothing(
    app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Database = app.state.services.database
    while await idempotency.remove_expired(database):
        pass
    monkeypatch.setattr(idempotency, "_REMOVE_PORTION", None)

    assert not await idempotency.remove_expired(database)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_expired_keys_are_found_by_their_index(app: FastAPI, client: httpx.AsyncClient) -> None:
    database: Database = app.state.services.database
    for statement in (idempotency._FIND_PORTION, idempotency._REMOVE_PORTION):
        compiled = compile_statement(statement, database.dialect)
        values = compiled.arguments({"expiry": datetime.now(UTC)})
        assert isinstance(database, Postgres)
        async with database.pool.connection() as connection, connection.raw.transaction():
            await connection.raw.execute("SET LOCAL enable_seqscan = off")
            plan = await connection.raw.fetch(f"EXPLAIN {compiled.sql}", *values)
        assert "ix_idempotency_key_created_at" in str(plan)


async def kept(app: FastAPI, person: Person) -> list[str]:
    keys = idempotency._KEYS
    statement = select(keys.c.key).where(idempotency._OWNED).order_by(keys.c.key)
    return [row["key"] for row in await app.state.services.database.all(statement, owner=person.user_id)]


async def test_a_409_for_too_many_tasks_stores_no_key(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=1))) as client:
        alice = person("alice", client)
        task = await alice.create()

        full = await post_once(alice, "a")
        await alice.delete(f"/{task['id']}")
        answer = await post_once(alice, "a")

    assert (full.status_code, answer.status_code) == (409, 201)
    assert datetime.fromisoformat(answer.json()["created_at"]) <= datetime.now(UTC)


async def test_keys_beyond_the_limit_per_user_are_429(
    alice: Person, bob: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "KEYS_MAX", 2)
    first = await post_once(alice, "a")
    await post_once(alice, "b")

    refused = await post_once(alice, "c")

    assert (refused.status_code, refused.headers["retry-after"]) == (429, "3600")
    assert refused.json()["detail"].startswith("You have sent as many Idempotency-Keys as are kept for a day")
    assert len((await alice.get()).json()) == 2
    assert (await post_once(alice, "a")).content == first.content
    assert (await alice.post(json={"title": "x"})).status_code == 201
    assert (await post_once(bob, "c")).status_code == 201


async def test_a_large_response_counts_as_several_keys(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "KEYS_MAX", 4)
    creations = [{"op": "create", "task": {"title": "x", "description": "é" * 1000}} for _ in range(7)]

    large = await bulk_once(alice, "a", *creations)  # 7 times 2,400 bytes count as four keys
    refused = await post_once(alice, "b")

    assert 15_000 <= len(large.content) < 20_000
    assert (large.status_code, refused.status_code) == (200, 429)


async def bulk_once(person: Person, key: str, *operations: dict[str, Any], query: str = "") -> httpx.Response:
    body = {"operations": list(operations)}
    return await person.post(f"/bulk{query}", json=body, headers={"Idempotency-Key": key})


CREATION = {"op": "create", "task": {"title": "Once", "due_date": "2026-02-28"}}


@pytest.mark.parametrize(("query", "status"), [("", 200), ("?atomic=false", 207)])
async def test_a_repeated_key_of_a_bulk_request_replays_the_response(
    alice: Person, query: str, status: int
) -> None:
    task = await alice.create()
    completion = {"op": "complete", "id": task["id"]}
    deletion = {"op": "delete", "id": 1 if query else task["id"]}

    first = await bulk_once(alice, "a", CREATION, completion, deletion, query=query)
    tasks = (await alice.get()).json()
    again = await bulk_once(alice, "a", CREATION, completion, deletion, query=query)

    assert (first.status_code, again.status_code) == (status, status)
    assert again.content == first.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert (await alice.get()).json() == tasks


async def test_a_key_of_a_bulk_request_is_good_for_the_same_request_only(alice: Person) -> None:
    await bulk_once(alice, "a", CREATION)
    await post_once(alice, "b")

    others = [
        await bulk_once(alice, "a", CREATION, CREATION),
        await bulk_once(alice, "a", CREATION, query="?atomic=false"),
        await post_once(alice, "a"),
        await bulk_once(alice, "b", CREATION),
    ]

    assert [other.status_code for other in others] == [422] * 4
    for other in others:
        assert other.json()["detail"] == "Idempotency-Key: was used for another request"
    assert len((await alice.get()).json()) == 2


async def test_a_failed_bulk_request_stores_no_key(alice: Person) -> None:
    refused = await bulk_once(alice, "a", CREATION, {"op": "delete", "id": 1})
    mended = await bulk_once(alice, "a", CREATION)

    assert (refused.status_code, refused.json()["index"]) == (404, 1)
    assert (mended.status_code, len((await alice.get()).json())) == (200, 1)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_bulk_request_that_still_runs_is_409(alice: Person, database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        async with connection.transaction():
            lock = "SELECT pg_advisory_xact_lock(hashtextextended($1 || chr(10) || $2, 0))"
            await connection.execute(lock, alice.user_id, "a")
            running = await bulk_once(alice, "a", CREATION)
    finally:
        await connection.close()

    assert (running.status_code, running.headers["retry-after"]) == (409, "1")
    assert (await alice.get()).json() == []


async def test_twenty_concurrent_bulk_requests_with_one_key_create_one_task(alice: Person) -> None:
    answers = await asyncio.gather(*(bulk_once(alice, "a", CREATION) for _ in range(20)))

    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len({answer.content for answer in answers if answer.status_code == 200}) == 1
    assert len((await alice.get()).json()) == 1


@pytest.mark.parametrize("send", ["task", "bulk", "bulk of another task"])
async def test_a_response_stored_after_the_first_look_up_is_replayed(
    database_url: str, monkeypatch: pytest.MonkeyPatch, send: str
) -> None:
    """The first request fills the quota or deletes the task, and commits before the second gets the lock."""
    async with running(create_app(settings_for(database_url, max_tasks_per_user=1))) as client:
        alice = person("alice", client)
        if send == "bulk of another task":
            task = await alice.create()
            sent = partial(bulk_once, alice, "a", {"op": "delete", "id": task["id"]})
        else:
            sent = (
                partial(post_once, alice, "a") if send == "task" else partial(bulk_once, alice, "a", CREATION)
            )
        first = await sent()
        looks = _miss_the_first_look(monkeypatch)

        again = await sent()

    assert looks == ["missed", "seen"]
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(("lost", "status", "tried"), [(True, 201, 2), (False, 503, 1)])
async def test_only_a_lost_connection_is_retried(
    alice: Person, monkeypatch: pytest.MonkeyPatch, lost: bool, status: int, tried: int
) -> None:
    attempts = 0
    one = Owner.one

    async def fail_once(self: Owner, statement: Executable, **values: Any) -> Row | None:
        nonlocal attempts
        if statement is idempotency._KEEP:
            attempts += 1
            if attempts == 1:
                error = Unavailable()
                error.lost = lost
                raise error
        return await one(self, statement, **values)

    # A lost connection ends its transaction in PostgreSQL; this one survives and has to roll back.
    monkeypatch.setattr(postgres_database, "Unavailable", ZeroDivisionError)
    monkeypatch.setattr(Owner, "one", fail_once)

    answer = await post_once(alice, "a")

    assert (answer.status_code, attempts) == (status, tried)
    assert len((await alice.get()).json()) == tried - 1


async def test_a_key_of_another_request_is_looked_up_once(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    await post_once(alice, "a")
    looks = _miss_the_first_look(monkeypatch)
    looks.append("not missed")

    answer = await post_once(alice, "a", title="Another")

    assert (answer.status_code, looks) == (422, ["not missed", "seen"])


def _miss_the_first_look(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    looks: list[str] = []
    one = Owner.one

    async def look(self: Owner, statement: Executable, **values: Any) -> Row | None:
        row = await one(self, statement, **values)
        if statement is idempotency._LOCK_AND_FIND:
            looks.append("seen" if looks else "missed")
            if len(looks) == 1 and row:
                row |= {"answer": None, "expired": None, "fingerprint": None}
        return row

    monkeypatch.setattr(Owner, "one", look)
    return looks


async def test_a_bulk_request_with_a_key_may_name_a_version_of_any_size(alice: Person) -> None:
    task = await alice.create()
    operation = {"op": "delete", "id": task["id"], "version": 2**70}

    answers = [
        await alice.post("/bulk", json={"operations": [operation]}, headers={"Idempotency-Key": key})
        for key in ("a", "a")
    ]

    assert [answer.status_code for answer in answers] == [412, 412]
