import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
from alembic import command
from alembic.config import Config

import db
from main import create_app
from server.startup import migrate
from tests import better_auth
from tests.better_auth import Account, BetterAuth, running_better_auth
from tests.conftest import Person, running, settings_for
from tests.postgres import Server
from tests.test_migrations import OUR_TABLES

pytestmark = pytest.mark.process

PROJECT = Path(__file__).parent.parent
BETTER_AUTH_TABLES = {"user", "session", "account", "verification", "jwks"}


@pytest.fixture
async def url(postgres: Server) -> AsyncIterator[str]:
    """An empty database for the tables of Better Auth and of the service."""
    async with postgres.database() as url:
        yield url


def _service(url: str, issuer: BetterAuth, **changes: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Yield a client of the service, which is configured only with the URL of *issuer*."""
    settings = {"better_auth_url": issuer.origin, "better_auth_secret": None} | changes
    return running(create_app(settings_for(url, **settings)))


async def _person(name: str, issuer: BetterAuth, client: httpx.AsyncClient) -> Person:
    account = await issuer.sign_up(name)
    return Person(account.user_id, client, await issuer.token(account))


async def _use_all_operations(someone: Person) -> None:
    task = await someone.create()
    path = f"/{task['id']}"
    assert task["user_id"] == someone.user_id

    listed = await someone.get()
    read = await someone.get(path)
    replaced = await someone.put(path, json={"title": "Buy oat milk"})
    completed = await someone.patch(f"{path}/complete")
    deleted = await someone.delete(path)

    answers = [listed, read, replaced, completed, deleted]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 204]
    assert (listed.json(), read.json()) == ([task], task)
    assert (completed.json()["title"], completed.json()["completed"]) == ("Buy oat milk", True)


async def _rows(url: str, sql: str) -> list[Any]:
    connection = await asyncpg.connect(url)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


IDS: dict[str, Callable[[str], object]] = {
    "text": lambda user_id: re.fullmatch("[A-Za-z0-9]{32}", user_id),
    "uuid": lambda user_id: str(uuid.UUID(user_id)) == user_id,
    "serial": lambda user_id: re.fullmatch("[1-4]", user_id),
}


@dataclass(frozen=True)
class Served:
    """A Better Auth server, and a client of the service that accepts its tokens."""

    issuer: BetterAuth
    client: httpx.AsyncClient
    algorithm: str
    ids: str


@pytest.fixture(
    scope="module", params=[("EdDSA", "text"), ("ES256", "uuid"), ("RS256", "serial")], ids="-".join
)
async def served(
    request: pytest.FixtureRequest, postgres: Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    algorithm, ids = request.param
    folder = tmp_path_factory.mktemp("better_auth")
    async with (
        postgres.database() as url,
        running_better_auth(url, folder, algorithm=algorithm, ids=ids) as issuer,
        _service(url, issuer) as client,
    ):
        yield Served(issuer, client, algorithm, ids)


async def test_a_token_of_better_auth_opens_all_operations(served: Served) -> None:
    alice = await _person("alice", served.issuer, served.client)

    assert jwt.get_unverified_header(alice.token)["alg"] == served.algorithm
    await _use_all_operations(alice)


async def test_a_user_is_the_subject_of_the_token_whatever_ids_look_like(served: Served) -> None:
    carol = await _person("carol", served.issuer, served.client)
    bob = await _person("bob", served.issuer, served.client)

    assert IDS[served.ids](carol.user_id)
    await _use_all_operations(carol)
    task = await carol.create()

    assert (await bob.get()).json() == []
    assert (await bob.get(f"/{task['id']}")).status_code == 404
    assert (await bob.get(carol.tasks)).status_code == 403
    assert (await carol.get()).json() == [task]


ROTATIONS = {
    # As by `jwks.rotationInterval`: the old key has expired, but is published for another 30 days.
    "expires": ("UPDATE jwks SET \"expiresAt\" = now() - interval '1 second'", 200),
    # As an operator does after a key has leaked.
    "is deleted": ("DELETE FROM jwks", 401),
}


@pytest.mark.parametrize(("rotation", "status_of_old"), ROTATIONS.values(), ids=ROTATIONS)
async def test_a_rotated_key_is_accepted_at_once(
    url: str, tmp_path: Path, rotation: str, status_of_old: int
) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        alice = await issuer.sign_up("alice")
        first, unseen = await issuer.token(alice), await _later_token(issuer, alice)
        assert (await Person(alice.user_id, client, first).get()).status_code == 200

        await _rows(url, rotation)
        rotated = await issuer.token(alice)
        assert jwt.get_unverified_header(rotated)["kid"] != jwt.get_unverified_header(first)["kid"]
        new, *old = [await Person(alice.user_id, client, token).get() for token in (rotated, first, unseen)]

        assert new.status_code == 200
        assert [answer.status_code for answer in old] == [status_of_old, status_of_old]


async def _later_token(issuer: BetterAuth, account: Account) -> str:
    """Return a token that differs from the previous one: wait a second, since `iat` has whole seconds."""
    last = token = await issuer.token(account)
    while token == last:
        await asyncio.sleep(0.1)
        token = await issuer.token(account)
    return token


@pytest.mark.parametrize(("cookie_cache", "algorithm"), [("secret", "HS256"), ("keys", "EdDSA")])
async def test_session_cookie_and_mail_tokens_of_better_auth_are_401(
    url: str, tmp_path: Path, cookie_cache: str, algorithm: str
) -> None:
    async with (
        running_better_auth(url, tmp_path, cookie_cache=cookie_cache) as issuer,
        _service(url, issuer) as with_keys,
        _service(url, issuer, better_auth_secret=better_auth.SECRET) as with_keys_and_secret,
    ):
        account = await issuer.sign_up("alice")
        assert account.cookie_cache is not None
        others = [account.session, account.cookie_cache, await issuer.mailed_token("alice")]
        assert [jwt.get_unverified_header(other)["alg"] for other in others[1:]] == [algorithm, "HS256"]

        for client in (with_keys, with_keys_and_secret):
            good = await Person(account.user_id, client, await issuer.token(account)).get()
            refused = [await Person(account.user_id, client, other).get() for other in others]

            assert good.status_code == 200
            assert [answer.status_code for answer in refused] == [401, 401, 401]


def _alembic(url: str) -> Config:
    config = Config(toml_file=PROJECT / "pyproject.toml")
    config.attributes["database"] = db.connect(url, pool_size=1)
    return config


async def _tables(url: str) -> set[str]:
    sql = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    return {name for (name,) in await _rows(url, sql)}


@pytest.mark.parametrize("first", ["Better Auth", "we"])
async def test_better_auth_and_the_service_migrate_in_either_order(
    url: str, tmp_path: Path, first: str
) -> None:
    if first == "we":
        await asyncio.to_thread(migrate, db.connect(url, pool_size=1))
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        task = await (await _person("alice", issuer, client)).create()
        assert await _tables(url) == BETTER_AUTH_TABLES | {*OUR_TABLES, "task_schema_version"}

    await asyncio.to_thread(command.check, _alembic(url))
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        account = await issuer.sign_in("alice")
        alice = Person(account.user_id, client, await issuer.token(account))
        assert (await alice.get()).json() == [task]


async def test_our_migrations_leave_better_auths_accounts_alone(url: str, tmp_path: Path) -> None:
    async with running_better_auth(url, tmp_path) as issuer:
        account = await issuer.sign_up("alice")
        for _ in range(2):
            await asyncio.to_thread(command.upgrade, _alembic(url), "head")
            await asyncio.to_thread(command.downgrade, _alembic(url), "base")

        assert await _tables(url) - {"task_schema_version"} == BETTER_AUTH_TABLES
        assert (await issuer.sign_in("alice")).user_id == account.user_id


async def test_tasks_outlive_a_user_deleted_in_better_auth(url: str, tmp_path: Path) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        alice = await _person("alice", issuer, client)
        task = await alice.create()

        await _rows(url, 'DELETE FROM "user"')

        assert (await alice.get()).json() == [task]


ALICE: dict[str, Any] = {"name": "Alice", "email": "Alice@Example.com", "password": better_auth.PASSWORD}
OF_A_PROBLEM = {"type", "title", "status", "detail", "instance"}

# The order matters: some requests need the account that the first one creates.
SAME_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sign up": ("sign-up", ALICE),
    "sign up again": ("sign-up", ALICE),
    "sign up again, in another case": ("sign-up", ALICE | {"email": "ALICE@example.COM"}),
    "sign up with more members": (
        "sign-up",
        ALICE
        | {"email": "bob@example.com", "image": "https://example.com/bob.png", "rememberMe": False}
        | {"callbackURL": "/home", "id": "bob", "emailVerified": True, "colour": "red"},
    ),
    "sign up without a name": ("sign-up", ALICE | {"email": "nameless@example.com", "name": ""}),
    "sign up with the longest password": (
        "sign-up",
        ALICE | {"email": "longest@example.com", "password": "a" * 128},
    ),
    "sign up with four keys": (
        "sign-up",
        ALICE | {"email": "keys@example.com", "password": "\U0001f511" * 4},
    ),
    "too short": ("sign-up", ALICE | {"password": "1234567"}),
    "too long": ("sign-up", ALICE | {"password": "a" * 129}),
    "too long for Java Script": ("sign-up", ALICE | {"password": "\U0001f511" * 65}),
    "sign in": ("sign-in", ALICE),
    "sign in, in another case": ("sign-in", ALICE | {"email": "ALICE@example.COM"}),
    "sign in with more members": ("sign-in", ALICE | {"rememberMe": False, "colour": "red"}),
    "sign in with four keys": (
        "sign-in",
        ALICE | {"email": "keys@example.com", "password": "\U0001f511" * 4},
    ),
    "wrong password": ("sign-in", ALICE | {"password": "wrong horse"}),
    "no password": ("sign-in", ALICE | {"password": ""}),
    "somebody else's password": ("sign-in", ALICE | {"email": "longest@example.com"}),
    "unknown": ("sign-in", ALICE | {"email": "unknown@example.com"}),
    "too long to sign in": ("sign-in", ALICE | {"password": "a" * 129}),
} | {
    f"{verb}: {email}": (verb, ALICE | {"email": email})
    for verb in ("sign-up", "sign-in")
    for email in (
        *("", "alice", "alice@example", " alice@example.com", "alice@example.com ", "alice@example.com\n"),
        *(
            "al..ice@example.com",
            ".alice@example.com",
            "alice.@example.com",
            "alice@example.com.",
            "a@b@example.com",
        ),
        *("alic\u00e9@example.com", "alice@ex\u00e4mple.com", "\u212aate@example.com", '"alice"@example.com'),
        *(
            "o'alice@example.com",
            "alice+tasks@sub-1.example.com",
            "alice_-@example.museum",
            "alice@-a.example.com",
        ),
        *("alice@example.c", "alice@example.c1", "alice@192.0.2.1", "@example.com", "al\0ice@example.com"),
    )
}


def _local(url: str) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    return running(create_app(settings_for(url, local_accounts=True)))


def _outline(answer: httpx.Response) -> dict[str, Any]:
    """Return the comparable parts: without random values and the members that only our problems have."""
    body = answer.json()
    if answer.status_code >= 400:
        assert answer.headers["content-type"] in ("application/json", "application/problem+json")
        return {"status": answer.status_code} | {key: body[key] for key in body.keys() - OF_A_PROBLEM}
    user = body.pop("user")
    random = {"id", "createdAt", "updatedAt"}
    return {
        "status": answer.status_code,
        "members": set(body),
        "user": {key: type(value) if key in random else value for key, value in user.items()},
        "header": answer.headers["set-auth-token"].startswith(body["token"]),
    }


async def test_local_accounts_respond_as_better_auth_does(url: str, tmp_path: Path) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _local(url) as local:
        for name, (verb, body) in SAME_REQUESTS.items():
            outlines = []
            for client in (issuer.client, local):
                client.cookies.clear()
                answer = await client.post(f"/api/auth/{verb}/email", json=body)
                outlines.append(_outline(answer))
            assert outlines[1] == outlines[0], name


async def test_tokens_and_sessions_of_local_accounts_look_as_better_auths_do(
    url: str, tmp_path: Path
) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _local(url) as local:
        looks = []
        for client in (issuer.client, local):
            session = (await client.post("/api/auth/sign-up/email", json=ALICE)).json()["token"]
            client.cookies.clear()
            seen: list[Any] = []
            for value in (f"Bearer {session}", f"bearer {session}", "Bearer x.y.z", "Basic Og==", None):
                headers = {"Authorization": value} if value else {}
                token = await client.get("/api/auth/token", headers=headers)
                found = await client.get("/api/auth/get-session", headers=headers)
                client.cookies.clear()
                body = found.json() and {name: set(part) for name, part in found.json().items()}
                seen.append((found.status_code, body, found.headers["cache-control"]))
                seen.append("set-auth-jwt" in found.headers)
                seen.append((token.status_code, token.json().keys() - OF_A_PROBLEM, token.json().get("code")))
            for authorization in ({"Authorization": f"Bearer {session}"}, {}):
                headers = authorization | {"Origin": issuer.origin}
                revoked = await client.post("/api/auth/revoke-sessions", headers=headers)
                ended = await client.get("/api/auth/get-session", headers=headers)
                outline = {name: revoked.json().get(name) for name in ("status", "code")}
                seen.append(
                    (revoked.status_code, outline | {"status": outline["status"] is True}, ended.json())
                )
                client.cookies.clear()
            signed_out = await client.post("/api/auth/sign-out", headers={"Origin": issuer.origin})
            seen.append((signed_out.status_code, signed_out.json()))
            looks.append(seen)

    assert looks[1] == looks[0]
    assert [seen[0] for seen in looks[1][:-3:3]] == [200] * 5
    assert [seen[0] for seen in looks[1][2:-3:3]] == [200, 200, 401, 401, 401]
    assert [seen[0] for seen in looks[1][-3:]] == [200, 401, 200]


async def test_a_front_end_may_move_its_accounts_to_better_auth(url: str, tmp_path: Path) -> None:
    """The same calls before and after the move: sign up, get a token, create a task."""
    async with running_better_auth(url, tmp_path) as issuer, _local(url) as local:
        for home in (issuer.client, local):
            settings = (
                {"better_auth_url": issuer.origin} if home is issuer.client else {"local_accounts": True}
            )
            async with running(create_app(settings_for(url, **settings))) as client:
                session = (await home.post("/api/auth/sign-up/email", json=ALICE)).json()
                headers = {"Authorization": f"Bearer {session['token']}"}
                token = (await home.get("/api/auth/token", headers=headers)).json()["token"]
                await Person(session["user"]["id"], client, token).create()
