"""Requests of hostile clients, and the exact refusal of each; none changes any data."""

import gzip
import time
from typing import Any
from urllib.parse import quote

import jwt
import pytest

from main import create_app
from tests.conftest import SECRET, Person, person, running, settings_for
from tests.issuer import new_key

JSON = {"Content-Type": "application/json"}
SQL = "x'; DROP TABLE task; --"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/0", 422),
        ("/-1", 422),
        (f"/{2**63}", 422),
        ("/" + "9" * 5000, 422),
        ("/1.0", 422),
        ("/1e3", 422),
        ("/0x10", 422),
        ("/%D9%A1", 422),  # an Arabic digit
        ("/1%00", 422),
        ("/1%0A", 404),  # Python's "$" matches before a trailing newline
        ("/%2e%2e", 422),
        ("/..%2f1", 422),
        (f"/{quote(SQL)}", 422),
        ("/1/complete/x", 404),
        ("//1", 404),
        ("?limit=1%00", 422),
        (f"?status={quote(SQL)}", 422),
        (f"?sort={quote(SQL)}", 422),
        (f"?order={quote(SQL)}", 422),
        (f"?cursor={quote(SQL)}", 422),
        ("?search=%00", 422),
        ("?search=" + "x" * 201, 422),
        ("?category=" + "x" * 51, 422),
        ("?tags=" + "x" * 31, 422),
        ("?due_date_from=2026-02-30", 422),
        ("?limit=1e3", 422),
        ("?limit=99999999999999999999", 422),
    ],
)
async def test_a_malformed_path_or_query_is_refused(alice: Person, path: str, status: int) -> None:
    answer = await alice.get(path)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "suffix", ["%20", "%00", ".", "%2F", "/..", "%252F", "%E2%80%8B", "?", "#", "%0d%0aX-Evil:1"]
)
async def test_another_spelling_of_a_user_id_reaches_no_other_user(
    alice: Person, bob: Person, suffix: str
) -> None:
    await alice.create("secret")

    answer = await bob.client.get(
        f"/api/{alice.user_id}{suffix}/tasks", headers={"Authorization": f"Bearer {bob.token}"}
    )

    assert answer.status_code in (403, 404)
    assert "secret" not in answer.text
    assert "x-evil" not in answer.headers


async def test_the_case_of_a_user_id_counts(alice: Person) -> None:
    answer = await alice.get(f"/api/{alice.user_id.upper()}/tasks")

    assert answer.status_code == 403


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 60_000, 422),
        (b'{"title":' * 6_000 + b"1" + b"}" * 6_000, 422),
        (b'{"title": ' + b"1" * 60_000 + b"}", 422),
        (b'{"title": 1e999999}', 422),
        (b'{"title": "a", "title": "b"}', 422),
        (b" " * 65_536, 422),
        (b" " * 65_537, 413),
        ('{"title": "x"}'.encode("utf-16"), 422),
        (b'\xef\xbb\xbf{"title": "x"}', 422),
        (b'{"title": "\xc0\xaf"}', 422),  # an overlong encoding of a slash
        (b'{"title": "\xed\xa0\x80"}', 422),  # a truncated UTF-8 sequence
        (b'{"title": "\\ud800"}', 422),
        (b'{"title": "a\\u0000b"}', 422),
        (b'{"title": "x"}\x00', 422),
        (b'{"title": "x"} // comment', 422),
        (b"title=x", 422),
        (b'{"__proto__": {"title": "x"}}', 422),
        (b'{"title": {"$ne": null}}', 422),
        (b'{"title": ["x"]}', 422),
    ],
    ids=lambda value: ascii(value)[:30],
)
async def test_a_malicious_body_is_refused(alice: Person, content: bytes, status: int) -> None:
    answer = await alice.post(content=content, headers=JSON)

    assert answer.status_code == status
    assert (await alice.get()).json() == []


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "x", "gzip, identity"])
async def test_a_compressed_body_is_415(alice: Person, encoding: str) -> None:
    content = gzip.compress(b'{"title": "' + b"x" * 100_000_000 + b'"}') if encoding == "gzip" else b"{}"

    answer = await alice.post(content=content[:60_000], headers=JSON | {"Content-Encoding": encoding})

    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "identity"
    assert (await alice.get()).json() == []


FORGED: dict[str, Any] = {
    "id": 1,
    "user_id": "bob",
    "version": 99,
    "created_at": "1999-01-01T00:00:00Z",
    "updated_at": "1999-01-01T00:00:00Z",
    "completed_at": "1999-01-01T00:00:00Z",
    "anchor_day": 31,
    "has_successor": True,
    "owner": "bob",
}


@pytest.mark.parametrize("way", ["POST", "PUT", "PATCH", "bulk create", "bulk update"])
async def test_no_write_sets_server_assigned_fields(alice: Person, way: str) -> None:
    task = await alice.create()
    forged = FORGED | {"title": "Forged"}
    match way:
        case "POST":
            answer = await alice.post(json=forged)
        case "PUT" | "PATCH":
            answer = await alice.send(way, f"/{task['id']}", json=forged)
        case "bulk create":
            answer = await alice.post("/bulk", json={"operations": [{"op": "create", "task": forged}]})
        case _:
            update = {"op": "update", "id": task["id"], "changes": forged}
            answer = await alice.post("/bulk", json={"operations": [update]})

    assert answer.is_success
    for found in (await alice.get()).json():
        assert found["user_id"] == alice.user_id
        assert found["version"] in (1, 2)
        assert not found["created_at"].startswith("1999")
        assert not found["updated_at"].startswith("1999")
        assert found["completed_at"] is None


def _forgeries(user_id: str) -> dict[str, str]:
    claims = {"sub": user_id, "exp": int(time.time()) + 900}
    key = new_key("RS256")
    public = key.public
    return {
        "no algorithm": jwt.encode(claims, None, "none"),  # type: ignore[arg-type] # attackers do this
        "another secret": jwt.encode(claims, SECRET[::-1], "HS256"),
        "another algorithm": jwt.encode(claims, SECRET.ljust(64), "HS512"),
        "a key of its own": jwt.encode(claims, SECRET, "HS256", headers={"jwk": public}),
        "an address of its own": jwt.encode(claims, SECRET, "HS256", headers={"jku": "https://evil.example"}),
        "critical": jwt.encode(claims, SECRET, "HS256", headers={"crit": ["exp"]}),
        "an issuer's, where there is none": key.token(sub=user_id),
        "another kind": jwt.encode(claims, SECRET, "HS256", headers={"typ": "refresh"}),
        "without end": jwt.encode({"sub": user_id}, SECRET, "HS256"),
        "of everybody": jwt.encode(claims | {"sub": ["alice", user_id]}, SECRET, "HS256"),
        "a megabyte": "x" * 1_000_000,
        "SQL": SQL,
        "two": "a.b.c, d.e.f",
    }


@pytest.mark.parametrize("forgery", sorted(_forgeries("alice")))
async def test_a_forged_token_is_401(alice: Person, forgery: str) -> None:
    answer = await alice.get(headers={"Authorization": f"Bearer {_forgeries(alice.user_id)[forgery]}"})

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith('Bearer error="invalid_token"')


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "BREW", "PROPFIND"])
async def test_an_unknown_method_is_405(alice: Person, method: str) -> None:
    answer = await alice.client.request(method, alice.tasks)

    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "a@evil.example", "localhost\\evil", "", "x" * 5000]
)
async def test_no_response_repeats_the_host_header(alice: Person, host: str) -> None:
    for _ in range(2):
        created = await alice.post(json={"title": "x"}, headers={"Host": host})
    listed = await alice.get("?limit=1", headers={"Host": host})
    slash = await alice.client.get("http://testserver//evil.example/", headers={"Host": host})
    root = await alice.client.get("/", headers={"Host": host})

    for answer in (created, listed, slash, root):
        told = " ".join(answer.headers.values()) + answer.text
        assert "evil" not in told
    assert created.headers["location"].startswith("/api/")
    assert listed.links["next"]["url"].startswith("/api/")
    assert root.headers["location"] == "/docs"
    assert slash.status_code == 404


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://app.example.com.evil.example",
        "https://evil.example/https://app.example.com",
        "http://app.example.com",
        "https://app.example.com:8443",
        "https://APP.example.com@evil.example",
    ],
)
async def test_a_lookalike_origin_gets_no_access_control_allow_origin(alice: Person, origin: str) -> None:
    answer = await alice.get(headers={"Origin": origin})

    assert "access-control-allow-origin" not in answer.headers


async def test_html_in_a_task_is_never_served_as_html(alice: Person) -> None:
    html = "<script>alert(1)</script>"
    await alice.create(html)

    answers = [await alice.get(), await alice.get(f"/{quote(html)}"), await alice.get(f"?sort={quote(html)}")]

    for answer in answers:
        assert answer.headers["content-type"] in ("application/json", "application/problem+json")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert all(html not in answer.text for answer in answers[1:])


@pytest.mark.parametrize("text", [SQL, "%", "_", "\\", "%%%", "' OR '1'='1", '"; --', "$1", ":owner", "{}"])
async def test_sql_and_wildcards_in_text_are_literal(alice: Person, bob: Person, text: str) -> None:
    await bob.create("bob's")
    await alice.create("other")
    task = await alice.create(text, description=text, category=text, tags=[text])

    for parameter in ("search", "category", "tags"):
        found = (await alice.get(f"?{parameter}={quote(text)}")).json()
        assert [each["id"] for each in found] == [task["id"]], parameter


async def test_a_forged_x_forwarded_for_does_not_evade_the_rate_limit(database_url: str) -> None:
    app = create_app(settings_for(database_url, rate_limit_anonymous="3/minute"))
    async with running(app) as client:
        answers = [
            await client.get("/api/x/tasks", headers={"X-Forwarded-For": f"10.0.0.{number}"})
            for number in range(6)
        ]

    assert [answer.status_code for answer in answers].count(429) == 3


async def test_another_users_idempotency_key_and_cursor_are_useless(database_url: str) -> None:
    async with running(create_app(settings_for(database_url))) as client:
        alice, bob = person("alice", client), person("bob", client)
        key = {"Idempotency-Key": "shared"}
        secret = await alice.post(json={"title": "secret"}, headers=key)
        await alice.create()
        cursor = (await alice.get("?limit=1")).links["next"]["url"].partition("?")[2]

        same = await bob.post(json={"title": "secret"}, headers=key)
        stolen = await bob.get(f"?{cursor}")

    assert same.json()["id"] != secret.json()["id"]
    assert same.json()["user_id"] == bob.user_id
    assert stolen.status_code == 422
