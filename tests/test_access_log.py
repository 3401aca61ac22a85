import json
import re

import httpx
import pytest
from fastapi import FastAPI

from main import create_app
from tests.conftest import Log, Person, front, person, running, settings_for


async def test_every_response_has_a_request_id(client: httpx.AsyncClient, alice: Person) -> None:
    answers = [await client.get("/health"), await client.get("/nope"), await alice.get("/1")]
    ids = [answer.headers["x-request-id"] for answer in answers]

    assert len(set(ids)) == 3
    assert all(re.fullmatch(r"[0-9a-f]{32}", identifier) for identifier in ids)


async def test_a_clients_x_request_id_is_used(client: httpx.AsyncClient) -> None:
    answer = await client.get("/nope", headers={"X-Request-ID": "a1b2-c3"})

    assert answer.headers["x-request-id"] == answer.json()["instance"] == "a1b2-c3"


@pytest.mark.parametrize("sent", ["", "two words", "x" * 129, 'quote"', "\x1b[31m", "é", "a,b;c"])
async def test_an_unsafe_x_request_id_is_replaced(client: httpx.AsyncClient, sent: str) -> None:
    answer = await client.get("/health", headers={b"X-Request-ID": sent.encode("latin-1")})

    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_a_request_is_one_access_log_line(logged: httpx.AsyncClient, log: Log) -> None:
    alice = person("alice", logged)
    answer = await alice.post(json={"title": "Buy milk"})

    (line,) = log.events("request")
    assert line["method"] == "POST"
    assert line["path"] == alice.tasks
    assert line["status"] == 201
    assert line["bytes"] == len(answer.content)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert isinstance(line["duration_ms"], float)
    assert alice.token not in json.dumps(line)


async def test_an_access_log_line_names_the_user_and_the_route(logged: httpx.AsyncClient, log: Log) -> None:
    alice, bob = person("alice", logged), person("bob", logged)
    await alice.get("/1")
    await bob.get(f"{alice.tasks}/1/")
    await logged.get(alice.tasks, headers={"Authorization": f"Bearer {alice.token[:-8]}AAAAAAAA"})
    await logged.get("/nope")

    own, denied, refused, lost = log.events("request")
    assert own["route"] == denied["route"] == "/api/{user_id}/tasks/{task_id}"
    assert (own["user_id"], denied["user_id"]) == (alice.user_id, bob.user_id)
    assert denied["path"] == f"{alice.tasks}/1/"
    assert "user_id" not in refused
    assert lost["route"] is None


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


async def test_a_head_request_is_logged_with_the_route_of_get(logged: httpx.AsyncClient, log: Log) -> None:
    await logged.head("/api/alice/tasks")

    (line,) = log.events("request")
    assert (line["method"], line["route"]) == ("HEAD", "/api/{user_id}/tasks")


@pytest.mark.parametrize(
    ("sent", "taken_up"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-will-be-like", True),
        (f"00-{TRACE}-{PARENT}-01-more", False),
        (f"00-{TRACE}-{PARENT}-01-", False),
        (f"ff-{TRACE}-{PARENT}-01", False),
        (f"00-{'0' * 32}-{PARENT}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE.upper()}-{PARENT}-01", False),
        (f"00-{TRACE[1:]}-{PARENT}-01", False),
        ("", False),
        ("x" * 10_000, False),
    ],
)
async def test_a_valid_traceparent_is_in_the_access_log_line(
    logged: httpx.AsyncClient, log: Log, sent: str, taken_up: bool
) -> None:
    await logged.get("/health", headers={"traceparent": sent})

    (line,) = log.events("request")
    assert line.get("trace_id") == (TRACE if taken_up else None)


async def test_a_repeated_traceparent_header_is_ignored(logged: httpx.AsyncClient, log: Log) -> None:
    header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    await logged.get("/health", headers=[header, header])

    (line,) = log.events("request")
    assert "trace_id" not in line


async def test_a_log_line_cannot_be_forged(logged: httpx.AsyncClient, log: Log) -> None:
    await logged.get('/x%0a{"event":"request","status":200}%1b[2J')

    (line,) = log.events("request")
    assert line["status"] == 404


@pytest.mark.parametrize("log_format", ["console"])
async def test_a_console_log_line_cannot_be_forged(logged: httpx.AsyncClient, log: Log) -> None:
    log.truncate(0)
    for sent in ("%0aforged", "%1b[2J", "%C2%9B2J", "%E2%80%A8", "%E2%80%AE", "%7F", "%00"):
        await logged.get(f"/x{sent}")

    assert len(log.getvalue().splitlines()) == 7
    assert log.getvalue().isascii()
    assert "\x1b[2J" not in log.getvalue()


async def test_a_crash_is_logged_with_its_cause_and_id(
    database_url: str, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **values: object) -> None:
        raise RuntimeError("the cause")

    app = create_app(settings_for(database_url))
    monkeypatch.setattr(app.state.services.database, "all", fail)
    async with running(app) as client:
        alice = person("alice", client)
        answer = await alice.get("/1", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})

    (crash,) = log.events("crash")
    assert crash["request_id"] == answer.headers["x-request-id"]
    assert (crash["trace_id"], crash["user_id"]) == (TRACE, alice.user_id)
    assert crash["level"] == "error"
    assert "the cause" in json.dumps(crash["exception"])
    assert "locals" not in json.dumps(crash["exception"])  # local variables would contain tokens and bodies


async def test_the_access_log_can_be_switched_off(database_url: str, log: Log) -> None:
    async with running(create_app(settings_for(database_url, access_log=False))) as client:
        assert "x-request-id" in (await client.get("/health")).headers

    assert log.events("request") == []


async def test_an_exception_after_the_response_has_started_propagates(app: FastAPI) -> None:
    async def half(scope: object, receive: object, send: httpx.ASGITransport) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator] # ASGI by hand
        raise RuntimeError("the cause")

    transport = httpx.ASGITransport(front(half))
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        with pytest.raises(RuntimeError, match="the cause"):
            await client.get("/")


async def test_refusals_are_logged_once_with_their_reason_and_without_the_token(
    logged: httpx.AsyncClient, log: Log
) -> None:
    alice, bob = person("alice", logged), person("bob", logged)
    bad = f"{alice.token[:-8]}AAAAAAAA"

    await alice.get(headers={"Authorization": f"Bearer {bad}"})
    await bob.get(f"{alice.tasks}/1")
    await alice.get()

    (refused,), (denied,) = log.events("token refused"), log.events("access denied")
    assert refused["reason"] == "Token signature is invalid"
    assert (denied["sub"], denied["user_id"]) == (bob.user_id, alice.user_id)
    assert alice.token not in log.getvalue()
