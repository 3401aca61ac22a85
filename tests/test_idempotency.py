import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select

import idempotency
from main import create_app
from tests.conftest import Person, person, running, settings_for


async def post_once(person: Person, key: str, **fields: Any) -> httpx.Response:
    return await person.post(json={"title": "Once", **fields}, headers={"Idempotency-Key": key})


async def test_a_request_that_is_sent_again_is_answered_as_before(alice: Person) -> None:
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


async def test_it_is_replayed_even_after_the_task_is_gone(alice: Person) -> None:
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


async def test_a_key_is_its_users_own(alice: Person, bob: Person) -> None:
    of_alice, of_bob = await post_once(alice, "a"), await post_once(bob, "a")

    assert of_bob.status_code == 201
    assert of_bob.json()["id"] != of_alice.json()["id"]
    assert "idempotent-replayed" not in of_bob.headers


async def test_a_key_may_be_quoted(alice: Person) -> None:
    first = await post_once(alice, '"a b"')

    assert (await post_once(alice, "a b")).content == first.content
    assert (await post_once(alice, '"a b" ')).content == first.content


@pytest.mark.parametrize("key", ["x" * 255, "é", "'", '"', "%00", "../..", "a,b"])
async def test_any_printable_characters_are_a_key(alice: Person, key: str) -> None:
    for replayed in (None, "true"):
        answer = await alice.post(json={"title": "x"}, headers={b"Idempotency-Key": key.encode("latin-1")})
        assert (answer.status_code, answer.headers.get("idempotent-replayed")) == (201, replayed)


@pytest.mark.parametrize("key", [b"", b'""', b"x" * 256, b"\x85", b"a\tb", b"a\x01b"])
async def test_what_is_no_key_creates_nothing(alice: Person, key: bytes) -> None:
    answer = await alice.post(json={"title": "x"}, headers={b"Idempotency-Key": key})

    assert answer.status_code == 422
    assert answer.json()["errors"] == [
        {"parameter": "Idempotency-Key", "detail": "must be 1 to 255 printable characters"}
    ]
    assert (await alice.get()).json() == []


async def test_two_keys_are_none(alice: Person) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b"), ("Authorization", f"Bearer {alice.token}")]

    answer = await alice.client.post(
        alice.tasks, content='{"title": "x"}', headers=[*headers, ("Content-Type", "application/json")]
    )

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"parameter": "Idempotency-Key", "detail": "must be sent once"}]


async def test_what_was_refused_may_be_mended_under_the_same_key(alice: Person) -> None:
    refused = [await post_once(alice, "a", title=""), await post_once(alice, "a", due_time="9:30")]

    answer = await post_once(alice, "a", due_time="09:30")

    assert [answer.status_code for answer in refused] == [422, 422]
    assert (answer.status_code, len((await alice.get()).json())) == (201, 1)


async def test_fifty_at_once_with_one_key_make_one_task(alice: Person) -> None:
    answers = await asyncio.gather(*(post_once(alice, "a") for _ in range(50)))

    statuses = {answer.status_code for answer in answers}
    made = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    assert statuses <= {201, 409}
    assert made == {task["id"] for task in (await alice.get()).json()}
    assert len(made) == 1
    assert all(answer.headers["retry-after"] == "1" for answer in answers if answer.status_code == 409)


# On SQLite the second waits for the first, as every writer does.
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_what_still_runs_is_409(alice: Person, database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        transaction = connection.transaction()
        await transaction.start()
        lock = "SELECT pg_advisory_xact_lock(hashtextextended($1 || '/' || $2, 0))"
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


async def test_after_a_day_a_key_is_free_and_the_old_ones_are_removed(
    app: FastAPI, alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override] # it returns the parent
            return datetime.now(tz) + timedelta(hours=24, seconds=1)

    first = await post_once(alice, "a")
    await post_once(alice, "b")
    monkeypatch.setattr(idempotency, "datetime", Tomorrow)

    answer = await post_once(alice, "a", description="another")

    assert (answer.status_code, answer.json()["id"] > first.json()["id"]) == (201, True)
    assert await kept(app, alice) == ["a"]


async def kept(app: FastAPI, person: Person) -> list[str]:
    keys = idempotency._KEYS
    statement = select(keys.c.key).where(idempotency._OWNED)
    return [row["key"] for row in await app.state.database.all(statement, owner=person.user_id)]


async def test_a_full_list_keeps_no_key(database_url: str) -> None:
    async with running(create_app(settings_for(database_url, max_tasks_per_user=1))) as client:
        alice = person("alice", client)
        task = await alice.create()

        full = await post_once(alice, "a")
        await alice.delete(f"/{task['id']}")
        answer = await post_once(alice, "a")

    assert (full.status_code, answer.status_code) == (409, 201)
    assert datetime.fromisoformat(answer.json()["created_at"]) <= datetime.now(UTC)
