import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI
from sqlalchemy import delete

import db
from auth import tokens
from auth.passwords import Passwords
from auth.sign_in_throttle import FAILURES_MAX, WINDOW_MIN
from main import create_app
from queries import accounts
from services import Services
from tests.conftest import SECRET, Log, Person, running, settings_for
from tests.issuer import ORIGIN, document, new_key
from tests.test_errors import assert_problem
from tests.test_passwords import WatchedHasher

PASSWORD = "correct horse battery"
USER = {"id", "name", "email", "emailVerified", "image", "createdAt", "updatedAt"}
SIGN_UP, SIGN_IN = "/api/auth/sign-up/email", "/api/auth/sign-in/email"
TOKEN, SESSION = "/api/auth/token", "/api/auth/get-session"
SIGN_OUT, REVOKE = "/api/auth/sign-out", "/api/auth/revoke-sessions"
DAY_S = 86400
ENDED = "Session has ended: sign in again"


def _keeping(database_url: str, **changes: Any) -> FastAPI:
    """Return a service with local accounts and cheap hashes: twelve rounds would take minutes."""
    app = create_app(settings_for(database_url, local_accounts=True, **changes))
    replace_passwords(app, Passwords(WatchedHasher()))
    return app


def replace_passwords(app: FastAPI, passwords: Passwords) -> None:
    services: Services = app.state.services
    assert services.local_accounts
    local_accounts = replace(services.local_accounts, passwords=passwords)
    app.state.services = replace(services, local_accounts=local_accounts)


@pytest.fixture(scope="session")
async def app(database_url: str) -> FastAPI:
    return _keeping(database_url)


@pytest.fixture(scope="session")
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with running(app) as client:
        yield client


@pytest.fixture
def email() -> str:
    return f"alice.{secrets.token_hex(8)}@example.com"


@pytest.fixture
def checked(app: FastAPI) -> list[str]:
    """The hashes against which the service checks passwords from now on."""
    hasher: WatchedHasher = app.state.services.local_accounts.passwords._hasher
    hasher.checked.clear()
    return hasher.checked


async def _sign_up(client: httpx.AsyncClient, email: str, **members: Any) -> httpx.Response:
    body = {"name": "Alice", "email": email, "password": PASSWORD} | members
    return await _post(client, SIGN_UP, body)


async def _sign_in(client: httpx.AsyncClient, email: str, password: str = PASSWORD) -> httpx.Response:
    return await _post(client, SIGN_IN, {"email": email, "password": password})


async def _post(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    # httpx's encoder cannot send an unpaired surrogate.
    return await client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})


async def _alice(client: httpx.AsyncClient, email: str) -> Person:
    answer = await _sign_up(client, email)
    assert answer.status_code == 200, answer.text
    return Person(answer.json()["user"]["id"], client, answer.json()["token"])


def _assert_refused(answer: httpx.Response, status: int, code: str, message: str) -> None:
    problem = answer.json()
    assert_problem(answer, status, problem["title"], problem["detail"])
    assert (problem["code"], problem["message"]) == (code, message)


async def test_a_signed_up_user_has_tasks_of_their_own(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)
    bob = await _alice(client, f"bob.{email}")

    task = await alice.create()

    assert task["user_id"] == alice.user_id
    assert (await alice.get()).json() == [task]
    assert (await bob.get(alice.tasks)).status_code == 403
    assert (await bob.get(f"/{task['id']}")).status_code == 404


async def test_sign_up_responds_as_better_auth_does(client: httpx.AsyncClient, email: str) -> None:
    answer = await _sign_up(client, email.upper(), image="https://example.com/alice.png")

    assert (answer.status_code, set(answer.json())) == (200, {"token", "user"})
    user = answer.json()["user"]
    assert set(user) == USER
    assert re.fullmatch("[A-Za-z0-9]{32}", user["id"])
    assert (user["name"], user["email"], user["emailVerified"]) == ("Alice", email, False)
    assert user["image"] == "https://example.com/alice.png"
    assert user["createdAt"] == user["updatedAt"]
    assert user["createdAt"].endswith("Z")
    assert answer.headers["set-auth-token"] == answer.json()["token"]
    assert answer.headers["cache-control"] == "no-store"


async def test_the_token_has_the_users_claims_and_expires_in_seven_days(
    client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)

    claims = jwt.decode(alice.token, SECRET, ["HS256"])

    assert set(claims) == {"sub", "email", "name", "iat", "exp", "auth_time"}
    assert 0 <= time.time() - claims["auth_time"] < 60
    assert (claims["sub"], claims["email"], claims["name"]) == (alice.user_id, email, "Alice")
    assert claims["exp"] - claims["iat"] == 7 * 86400


async def test_the_newest_secret_signs_for_the_issuer_and_audience_of_the_settings(
    database_url: str, email: str
) -> None:
    app = _keeping(
        database_url,
        better_auth_secrets=f"2:{SECRET[::-1]},1:{SECRET}",
        better_auth_secret=None,
        jwt_issuer="https://app.example.com",
        jwt_audience="tasks",
        jwt_expiration="15m",
    )
    async with running(app) as client:
        alice = await _alice(client, email)

        claims = jwt.decode(alice.token, SECRET[::-1], ["HS256"], audience="tasks")
        assert claims["iss"] == "https://app.example.com"
        assert claims["exp"] - claims["iat"] == 15 * 60
        assert (await alice.get()).status_code == 200
        assert (await alice.get(TOKEN)).status_code == 200


async def test_signing_in_returns_the_same_account(client: httpx.AsyncClient, email: str) -> None:
    signed_up = (await _sign_up(client, email)).json()

    answer = await _sign_in(client, email)

    assert (answer.status_code, set(answer.json())) == (200, {"redirect", "token", "user"})
    assert answer.json()["user"] == signed_up["user"]
    assert answer.json()["redirect"] is False
    assert (await Person(signed_up["user"]["id"], client, answer.json()["token"]).get()).status_code == 200


async def test_an_email_is_the_same_in_any_case(client: httpx.AsyncClient, email: str) -> None:
    await _alice(client, email)

    assert (await _sign_in(client, email.title())).status_code == 200
    _assert_refused(
        await _sign_up(client, email.upper()),
        422,
        "USER_ALREADY_EXISTS_USE_ANOTHER_EMAIL",
        "User already exists. Use another email.",
    )


async def test_concurrent_sign_ups_with_one_email_create_one_account(
    client: httpx.AsyncClient, email: str
) -> None:
    answers = await asyncio.gather(
        *(_sign_up(client, email, password=f"{PASSWORD} {number}") for number in range(8))
    )

    assert sorted(answer.status_code for answer in answers) == [200] + [422] * 7
    signed_in = [(await _sign_in(client, email, f"{PASSWORD} {number}")).status_code for number in range(8)]
    assert signed_in == [200 if answer.status_code == 200 else 401 for answer in answers]


async def test_an_unknown_email_and_a_wrong_password_get_the_same_401(
    client: httpx.AsyncClient, email: str, checked: list[str]
) -> None:
    await _alice(client, email)

    unknown, wrong = await _sign_in(client, f"bob.{email}"), await _sign_in(client, email, "wrong horse")

    for answer in (unknown, wrong):
        _assert_refused(answer, 401, "INVALID_EMAIL_OR_PASSWORD", "Invalid email or password")
    assert unknown.json() | {"instance": ""} == wrong.json() | {"instance": ""}
    assert unknown.headers.keys() == wrong.headers.keys()
    assert len(checked) == 2  # both cost a bcrypt check


@pytest.mark.parametrize(
    ("password", "code", "message"),
    [
        ("", "PASSWORD_TOO_SHORT", "Password too short"),
        ("1234567", "PASSWORD_TOO_SHORT", "Password too short"),
        ("a" * 129, "PASSWORD_TOO_LONG", "Password too long"),
        ("\U0001f511" * 65, "PASSWORD_TOO_LONG", "Password too long"),
    ],
)
async def test_a_password_has_8_to_128_characters(
    client: httpx.AsyncClient, email: str, password: str, code: str, message: str
) -> None:
    _assert_refused(await _sign_up(client, email, password=password), 400, code, message)
    if len(password) > 8:
        _assert_refused(await _sign_in(client, email, password), 400, code, message)


@pytest.mark.parametrize(
    "password",
    ["12345678", "a" * 128, "\U0001f511" * 4, "\0" * 8, "pass\0word", " " * 8, "e\u0301" * 8, "\ud800" * 8],
    ids=ascii,
)
async def test_any_characters_are_allowed_in_a_password(
    client: httpx.AsyncClient, email: str, password: str
) -> None:
    signed_up = await _sign_up(client, email, password=password)

    assert signed_up.status_code == 200
    assert (await _sign_in(client, email, password)).status_code == 200
    assert (await _sign_in(client, email, password[:-1] + "?")).status_code == 401


@pytest.mark.parametrize("length", [73, 128])
async def test_the_last_byte_of_a_long_password_counts(
    client: httpx.AsyncClient, email: str, length: int
) -> None:
    await _sign_up(client, email, password="a" * length)

    assert (await _sign_in(client, email, "a" * (length - 1) + "b")).status_code == 401
    assert (await _sign_in(client, email, "a" * length)).status_code == 200


NO_EMAILS = [
    "",
    "alice",
    "alice@example",
    " alice@example.com",
    "alice@example.com\n",
    "ali ce@example.com",
    "alice@@example.com",
    ".alice@example.com",
    "al..ice@example.com",
    "alice.@example.com",
    "alice@example.com.",
    "alice@.example.com",
    "alic\u00e9@example.com",
    "\u212aelvin@example.com",  # lower() turns it into an ASCII k
    "alice@ex\u00e4mple.com",
    "al\0ice@example.com",
    "al\ud800ice@example.com",
    "a" * 243 + "@example.com",
    "a" * 60_000,
    "@".join("a" * 30_000),
]


@pytest.mark.parametrize("value", NO_EMAILS, ids=lambda value: ascii(value[:20]))
async def test_an_invalid_email_is_refused_as_by_better_auth(
    client: httpx.AsyncClient, checked: list[str], value: str
) -> None:
    _assert_refused(
        await _sign_up(client, value), 400, "VALIDATION_ERROR", "[body.email] Invalid email address"
    )
    _assert_refused(await _sign_in(client, value), 400, "INVALID_EMAIL", "Invalid email")
    assert checked == []


GOOD: dict[str, Any] = {"name": "Alice", "email": "alice@example.com", "password": PASSWORD}


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"{}", "name: is required; email: is required; password: is required"),
        (b"", "body: is required"),
        (b"[]", "body: must be a JSON object"),
        (b"null", "body: must not be null"),
        (b"{", "body: is not valid JSON at character 1"),
        (b"\xff", "body: is not valid UTF-8"),
        (b'{"email": "a@example.com", "email": "b@example.com"}', "body: has a member twice"),
        (b"[" * 60_000, "body: is nested too deeply"),
        (json.dumps(GOOD | {"name": 5}).encode(), "name: must be text"),
        (json.dumps(GOOD | {"name": None}).encode(), "name: must not be null"),
        (json.dumps(GOOD | {"email": ["alice@example.com"]}).encode(), "email: must be text"),
        (json.dumps(GOOD | {"password": {"$ne": ""}}).encode(), "password: must be text"),
        (
            json.dumps(GOOD | {"name": "al\ud800ice"}).encode(),
            "name: must not contain U+0000 or unpaired surrogates",
        ),
        (
            json.dumps(GOOD | {"name": "al\0ice"}).encode(),
            "name: must not contain U+0000 or unpaired surrogates",
        ),
        (json.dumps(GOOD | {"name": "a" * 256}).encode(), "name: must be at most 255 characters"),
        (json.dumps(GOOD | {"image": "a" * 2049}).encode(), "image: must be at most 2048 characters"),
    ],
    ids=lambda value: ascii(value)[:40],
)
async def test_an_invalid_sign_up_body_is_422(client: httpx.AsyncClient, content: bytes, detail: str) -> None:
    answer = await client.post(SIGN_UP, content=content, headers={"Content-Type": "application/json"})

    assert_problem(answer, 422, "Unprocessable Content", detail)
    assert (answer.json()["code"], answer.json()["message"]) == ("VALIDATION_ERROR", detail)


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"a" * 1_000_000, "application/json", 413, "CONTENT_TOO_LARGE"),
        (b"{}", "text/plain", 415, "UNSUPPORTED_MEDIA_TYPE"),
        (b"email=alice", "application/x-www-form-urlencoded", 415, "UNSUPPORTED_MEDIA_TYPE"),
    ],
)
async def test_413_and_415_of_account_routes_have_a_better_auth_code(
    client: httpx.AsyncClient, content: bytes, content_type: str, status: int, code: str
) -> None:
    for path in (SIGN_UP, SIGN_IN):
        answer = await client.post(path, content=content, headers={"Content-Type": content_type})
        _assert_refused(answer, status, code, answer.json()["detail"])


async def test_sign_up_ignores_server_assigned_fields(client: httpx.AsyncClient, email: str) -> None:
    answer = await _sign_up(
        client,
        email,
        id="alice",
        emailVerified=True,
        email_verified=True,
        createdAt="2001-01-01T00:00:00Z",
        password_hash="x",
        rememberMe=False,
        callbackURL="/home",
    )

    assert answer.status_code == 200
    user = answer.json()["user"]
    assert (user["id"] == "alice", user["emailVerified"]) == (False, False)
    assert user["createdAt"] > "2026"
    assert (await _sign_in(client, email)).status_code == 200


async def test_a_valid_token_is_exchanged_for_a_fresh_one(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)
    old = tokens.issue(alice.user_id, SECRET, 60)

    answer = await replace(alice, token=old).get(TOKEN)

    assert (answer.status_code, set(answer.json())) == (200, {"token"})
    claims = jwt.decode(answer.json()["token"], SECRET, ["HS256"])
    assert claims["exp"] > time.time() + 86400
    assert (claims["sub"], claims["email"]) == (alice.user_id, email)


async def _delete_account(app: FastAPI, account_id: str) -> None:
    database = app.state.services.database
    if isinstance(database, db.Postgres) and database.target.arguments["user"] == "tasks_service":
        pytest.skip("This service's role may not delete accounts.")
    table = accounts.ACCOUNTS
    statement = delete(table).where(table.c.id == account_id).returning(table.c.id)
    assert await database.one(statement)


async def test_an_invalid_token_or_a_missing_account_gets_401_and_a_null_session(
    app: FastAPI, client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)
    expired = jwt.encode({"sub": alice.user_id, "exp": int(time.time()) - 60}, SECRET, "HS256")
    forged = tokens.issue(alice.user_id, SECRET[::-1], 60)
    elsewhere = tokens.issue("alice", SECRET, 60)
    deleted = await _alice(client, f"gone.{email}")
    await _delete_account(app, deleted.user_id)

    reasons = {
        expired: "Token has expired",
        forged: "Token signature is invalid",
        elsewhere: "Token belongs to no account",
        deleted.token: "Token belongs to no account",
        "x.y.z": "Token is malformed",
        "é": "Token is malformed",
        "a" * 20_000: "Token is larger than 16 KiB",
    }
    for token, reason in reasons.items():
        headers = {b"Authorization": f"Bearer {token}".encode()}
        refused = await client.get(TOKEN, headers=headers)
        session = await client.get(SESSION, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHORIZED")
        challenge = f'Bearer error="invalid_token", error_description="{reason}"'
        assert (refused.json()["detail"], refused.headers["www-authenticate"]) == (reason, challenge)
        assert (session.status_code, session.text) == (200, "null")
    without = await client.get(TOKEN)
    assert (without.status_code, without.headers["www-authenticate"]) == (401, "Bearer")
    assert (await client.get(SESSION)).text == "null"
    assert (await alice.get(TOKEN)).status_code == 200


async def test_an_issuers_token_is_not_exchanged_for_one_of_ours(database_url: str, email: str) -> None:
    key = new_key("EdDSA")
    keys = {"jwks": document(key).decode(), "jwt_issuer": ORIGIN, "jwt_audience": ORIGIN}
    async with running(_keeping(database_url, **keys)) as client:
        alice = await _alice(client, email)
        headers = {"Authorization": f"Bearer {key.token(sub=alice.user_id)}"}

        tasks = await client.get(alice.tasks, headers=headers)
        token = await client.get("/api/auth/token", headers=headers)
        session = await client.get("/api/auth/get-session", headers=headers)

    assert (tasks.status_code, token.status_code, session.json()) == (200, 401, None)


def _claims(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, SECRET, ["HS256"])
    return claims


def _signed_in(account: Person, days_ago: float, **claims: Any) -> Person:
    """Return *account* with a token of a session that began *days* days ago."""
    return replace(
        account,
        token=tokens.issue(
            account.user_id, SECRET, 60, **{"auth_time": time.time() - days_ago * DAY_S} | claims
        ),
    )


async def _renewed(account: Person) -> list[str]:
    """Return the tokens for which *account*'s token is exchanged."""
    token, session = await account.get(TOKEN), await account.get(SESSION)
    assert (token.status_code, session.status_code) == (200, 200), token.text
    return [token.json()["token"], session.headers["set-auth-jwt"]]


async def _assert_ended(account: Person, reason: str = ENDED) -> None:
    token, session = await account.get(TOKEN), await account.get(SESSION)
    challenge = f'Bearer error="invalid_token", error_description="{reason}"'
    assert (token.status_code, token.json()["detail"], token.json()["code"]) == (401, reason, "UNAUTHORIZED")
    assert token.headers["www-authenticate"] == challenge
    assert (session.json(), "set-auth-jwt" in session.headers) == (None, False)
    assert (await account.send("POST", REVOKE)).status_code == 401


async def test_every_renewed_token_has_the_auth_time_of_the_sign_in(
    client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)
    signed_in_at = _claims(alice.token)["auth_time"]

    for token in await _renewed(alice):
        for again in await _renewed(replace(alice, token=token)):
            assert _claims(again)["auth_time"] == signed_in_at


async def test_no_renewed_token_outlives_the_session(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)

    for days_ago, left_s in ((22, 7 * DAY_S), (23.5, 6.5 * DAY_S), (29.5, DAY_S / 2), (30 - 3 / DAY_S, 3)):
        old = _signed_in(alice, days_ago)
        for token in await _renewed(old):
            claims = _claims(token)
            assert claims["exp"] <= claims["auth_time"] + 30 * DAY_S
            assert left_s - 3 <= claims["exp"] - time.time() <= left_s


async def test_a_session_that_is_too_old_is_not_renewed(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)

    for days_ago in (30, 31, 20_000):
        old = _signed_in(alice, days_ago)
        await _assert_ended(old)
        assert (await old.get()).status_code == 200  # the token itself stays valid until it expires


@pytest.mark.parametrize("expiration", ["7d", "15m"])
async def test_the_settings_say_how_long_a_session_lasts(
    database_url: str, email: str, expiration: str
) -> None:
    settings = {"session_max_age": "1h", "jwt_expiration": expiration}
    lifetime_s = 3600 if expiration == "7d" else 900
    async with running(_keeping(database_url, **settings)) as client:
        alice = await _alice(client, email)
        granted = (await client.post(TOKEN, data=_grant(email))).json()

        for token in (alice.token, granted["access_token"]):
            assert _claims(token)["exp"] - _claims(token)["iat"] == lifetime_s
        assert granted["expires_in"] == lifetime_s
        await _renewed(_signed_in(alice, 0.9 / 24))
        await _assert_ended(_signed_in(alice, 1.1 / 24))


async def test_a_token_without_auth_time_starts_its_session_at_iat(
    client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)
    now = int(time.time())

    def issued(**claims: Any) -> Person:
        token = jwt.encode({"sub": alice.user_id, "exp": now + 60} | claims, SECRET, "HS256")
        return replace(alice, token=token)

    for token in await _renewed(issued(iat=now - DAY_S)):
        assert _claims(token)["auth_time"] == now - DAY_S
    await _assert_ended(issued(iat=now - 30 * DAY_S))
    for odd in (issued(), issued(iat=now, auth_time="0"), issued(iat=now, auth_time=None)):
        await _assert_ended(odd, "Token does not say when its user signed in")
        assert (await odd.get()).status_code == 200


async def _sign_out(account: Person) -> None:
    answer = await account.send("POST", SIGN_OUT)
    assert (answer.status_code, answer.json()) == (200, {"success": True})


async def _revoke(account: Person) -> None:
    answer = await account.send("POST", REVOKE)
    assert (answer.status_code, answer.json()) == (200, {"status": True})


@pytest.mark.parametrize("end", [_sign_out, _revoke])
async def test_signing_out_ends_every_session_of_the_account(
    client: httpx.AsyncClient, email: str, end: Callable[[Person], Awaitable[None]]
) -> None:
    alice, bob = await _alice(client, email), await _alice(client, f"bob.{email}")
    stolen = [replace(alice, token=token) for token in await _renewed(alice)]
    elsewhere = replace(alice, token=(await _sign_in(client, email)).json()["token"])

    await end(alice)

    for ended in (alice, elsewhere, *stolen):
        await _assert_ended(ended)
        assert (await ended.get()).status_code == 200  # the token itself stays valid until it expires
    await _renewed(bob)
    await _sign_out(alice)  # a repeated sign-out has no session to end


async def test_sign_in_works_right_after_sign_out(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)

    for _ in range(10):
        ended = alice
        await _revoke(ended)
        alice = replace(alice, token=(await _sign_in(client, email)).json()["token"])
        await _assert_ended(ended)
        await _renewed(alice)


async def test_sign_out_ends_sessions_despite_clock_skew(
    app: FastAPI, client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)
    ahead = _signed_in(alice, -5 / DAY_S)  # issued by a process whose clock is 5 s ahead

    await _revoke(ahead)
    earlier = datetime.now(UTC)
    await accounts.end_sessions(app.state.services.database, alice.user_id, earlier)  # changes nothing

    await _assert_ended(ahead)
    await _renewed(replace(alice, token=(await _sign_in(client, email)).json()["token"]))


async def test_signing_out_without_a_good_token_ends_nothing(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)
    expired = jwt.encode({"sub": alice.user_id, "exp": int(time.time()) - 60}, SECRET, "HS256")

    for token in (expired, tokens.issue(alice.user_id, SECRET[::-1], 60), tokens.issue("alice", SECRET, 60)):
        await _sign_out(replace(alice, token=token))
    answer = await client.post(SIGN_OUT)

    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert (await client.post(REVOKE)).status_code == 401
    await _renewed(alice)


async def test_the_session_is_that_of_the_token(client: httpx.AsyncClient, email: str) -> None:
    signed_up = (await _sign_up(client, email)).json()
    alice = Person(signed_up["user"]["id"], client, signed_up["token"])

    answer = await alice.get(SESSION, headers={"User-Agent": "a browser"})

    assert (answer.status_code, set(answer.json())) == (200, {"session", "user"})
    assert answer.json()["user"] == signed_up["user"]
    session = answer.json()["session"]
    assert (session["userId"], session["token"]) == (alice.user_id, alice.token)
    assert (session["ipAddress"], session["userAgent"]) == ("127.0.0.1", "a browser")
    assert session["createdAt"] < session["expiresAt"]
    assert session["id"] == (await alice.get(SESSION)).json()["session"]["id"]
    assert (await replace(alice, token=answer.headers["set-auth-jwt"]).get()).status_code == 200
    assert answer.headers["cache-control"] == "no-store"


async def test_a_token_that_never_ends_has_a_session(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)
    endless = jwt.encode({"sub": alice.user_id, "exp": 1e300, "auth_time": time.time()}, SECRET, "HS256")

    answer = await replace(alice, token=endless).get(SESSION)

    assert answer.json()["session"]["expiresAt"] == "9999-12-31T23:59:59Z"


async def _fail(client: httpx.AsyncClient, email: str, times: int) -> list[int]:
    return [(await _sign_in(client, email, "wrong horse")).status_code for _ in range(times)]


async def test_after_ten_failed_sign_ins_the_right_password_is_429(
    client: httpx.AsyncClient, email: str, checked: list[str]
) -> None:
    await _alice(client, email)
    assert await _fail(client, email, FAILURES_MAX) == [401] * FAILURES_MAX

    answer = await _sign_in(client, email.upper())

    _assert_refused(answer, 429, "TOO_MANY_REQUESTS", "Too many requests. Please try again later.")
    assert 0 < int(answer.headers["retry-after"]) <= WINDOW_MIN * 60
    assert len(checked) == FAILURES_MAX
    granted = await client.post(TOKEN, data=_grant(email))
    assert (granted.status_code, granted.json()["error"]) == (429, "temporarily_unavailable")


async def test_failed_sign_ins_are_counted_per_account_and_address(
    app: FastAPI, client: httpx.AsyncClient, email: str
) -> None:
    await _alice(client, email)
    await _alice(client, f"bob.{email}")
    await _fail(client, email, FAILURES_MAX + 1)

    elsewhere = httpx.ASGITransport(app, client=("192.0.2.7", 4711))
    async with httpx.AsyncClient(transport=elsewhere, base_url="http://testserver") as another:
        assert (await _sign_in(another, email)).status_code == 200
    assert (await _sign_in(client, f"bob.{email}")).status_code == 200
    assert (await _sign_in(client, email)).status_code == 429


async def test_failed_sign_ins_to_unknown_accounts_are_counted_too(
    client: httpx.AsyncClient, email: str
) -> None:
    assert await _fail(client, email, FAILURES_MAX + 1) == [401] * FAILURES_MAX + [429]


async def test_concurrent_password_guesses_are_limited_to_ten(
    client: httpx.AsyncClient, email: str, checked: list[str]
) -> None:
    await _alice(client, email)

    await _fail(client, email, FAILURES_MAX - 3)

    answers = await asyncio.gather(*(_sign_in(client, email, f"guess {number}") for number in range(8)))

    assert sorted(answer.status_code for answer in answers) == [401] * 3 + [429] * 5
    assert len(checked) == FAILURES_MAX


async def test_a_successful_sign_in_resets_the_failure_count(client: httpx.AsyncClient, email: str) -> None:
    await _alice(client, email)

    for _ in range(2):
        assert await _fail(client, email, FAILURES_MAX - 1) == [401] * (FAILURES_MAX - 1)
        assert (await _sign_in(client, email)).status_code == 200


async def test_a_full_password_queue_is_503_with_retry_after(
    app: FastAPI, client: httpx.AsyncClient, email: str
) -> None:
    await _alice(client, email)
    services = app.state.services
    replace_passwords(app, Passwords(WatchedHasher(), waiting_max=-2))
    try:
        answers = [await _sign_up(client, f"bob.{email}")]
        answers += [await _sign_in(client, email) for _ in range(FAILURES_MAX + 1)]
    finally:
        app.state.services = services

    for answer in answers:
        _assert_refused(answer, 503, "SERVICE_UNAVAILABLE", answer.json()["detail"])
        assert answer.headers["retry-after"] == "1"
    assert (await _sign_in(client, email)).status_code == 200  # the 503s were not counted as failures


def _grant(email: str, **changes: str) -> dict[str, str]:
    return {"grant_type": "password", "username": email, "password": PASSWORD} | changes


async def test_the_password_grant_gives_a_bearer_token(client: httpx.AsyncClient, email: str) -> None:
    alice = await _alice(client, email)

    # Swagger UI also sends client credentials, which are empty.
    answer = await client.post(TOKEN, data=_grant(email, scope=""), headers={"Authorization": "Basic Og=="})

    assert answer.status_code == 200
    token = answer.json().pop("access_token")
    assert answer.json() == {"access_token": token, "token_type": "bearer", "expires_in": 7 * 86400}
    assert answer.headers["cache-control"] == "no-store"
    assert (await replace(alice, token=token).get()).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "error"),
    [
        ("grant_type=password&username=alice%40example.com&password=wrong", 400, "invalid_grant"),
        ("grant_type=password&username=alice&password=wrong", 400, "invalid_grant"),
        ("grant_type=password&username=alice%40example.com&password=" + "a" * 129, 400, "invalid_grant"),
        ("grant_type=refresh_token&username=a%40example.com&password=b", 400, "unsupported_grant_type"),
        ("grant_type=refresh_token&refresh_token=x", 400, "unsupported_grant_type"),
        ("grant_type=client_credentials", 400, "unsupported_grant_type"),
        ("username=alice%40example.com&password=wrong", 400, "invalid_request"),
        ("grant_type=password&username=alice%40example.com&password=", 400, "invalid_request"),
        ("grant_type=password&username=a&username=b&password=c", 400, "invalid_request"),
        ("grant_type=password&username=%ff&password=b", 400, "invalid_request"),
        (b"grant_type=password&username=\xff&password=b", 400, "invalid_request"),
        ("", 400, "invalid_request"),
        ("{}", 400, "invalid_request"),
        ("a=b&" * 16_000, 400, "invalid_request"),
        ("a" * 1_000_000, 413, "invalid_request"),
    ],
    ids=lambda value: ascii(value)[:70],
)
async def test_a_grant_is_refused_as_oauth_wants_it(
    client: httpx.AsyncClient, content: str | bytes, status: int, error: str
) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}

    answer = await client.post(TOKEN, content=content, headers=form)

    problem = answer.json()
    assert_problem(answer, status, problem["title"], problem["detail"])
    assert (problem["error"], problem["error_description"]) == (error, problem["detail"])


async def test_a_grant_must_be_a_form(client: httpx.AsyncClient, email: str) -> None:
    answer = await _post(client, TOKEN, _grant(email))

    assert (answer.status_code, answer.json()["error"]) == (415, "invalid_request")
    assert "application/x-www-form-urlencoded" in answer.json()["detail"]


async def test_a_failed_sign_in_is_logged_without_email_and_password(
    log: Log, database_url: str, email: str
) -> None:
    async with running(_keeping(database_url)) as client:
        await _alice(client, email)
        answers = [await _sign_in(client, email, "wrong horse"), await _sign_in(client, f"bob.{email}")]

    lines = log.events("failed sign-in")
    assert [line["reason"] for line in lines] == ["wrong password", "unknown e-mail"]
    assert [line["request_id"] for line in lines] == [answer.json()["instance"] for answer in answers]
    for secret in (email, "horse", PASSWORD, "eyJ"):
        assert secret not in log.getvalue()


async def test_log_lines_of_failed_sign_ins_are_bounded(log: Log, database_url: str, email: str) -> None:
    async with running(_keeping(database_url)) as client:
        await _fail(client, email, FAILURES_MAX + 40)

    assert 2 <= len(log.events("failed sign-in")) < 40


async def test_account_routes_are_404_without_local_accounts(database_url: str, email: str) -> None:
    async with running(create_app(settings_for(database_url))) as client:
        answers = [
            await _sign_up(client, email),
            await _sign_in(client, email),
            await client.post(TOKEN, data=_grant(email)),
            await client.get(TOKEN),
            await client.get(SESSION),
        ]

    assert [answer.status_code for answer in answers] == [404] * 5


async def test_only_a_hash_of_the_password_is_kept(
    app: FastAPI, client: httpx.AsyncClient, email: str
) -> None:
    alice = await _alice(client, email)

    row = await accounts.account_of_id(app.state.services.database, alice.user_id)

    assert row == await accounts.account_of_email(app.state.services.database, email.upper())
    assert row is not None
    assert row["password_hash"].startswith("$2b$")
    assert PASSWORD not in str(row)
