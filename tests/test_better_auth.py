import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import jwt
import pytest
from alembic import command
from alembic.config import Config

import db
import jwks
from main import create_app, migrate
from tests import better_auth
from tests.better_auth import Account, BetterAuth, running_better_auth
from tests.conftest import Person, running, settings_for
from tests.postgres import Server
from tests.test_jwks import Clock

PROJECT = Path(__file__).parent.parent
BETTER_AUTH_TABLES = {"user", "session", "account", "verification", "jwks"}


@pytest.fixture
async def url(postgres: Server) -> AsyncIterator[str]:
    """An empty database, for Better Auth and for us."""
    name = await postgres.create_database()
    yield postgres.url_of(name)
    await postgres.drop_database(name)


def _service(url: str, issuer: BetterAuth, **changes: Any) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Lend a client of the service that knows no more of *issuer* than its address."""
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


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES256", "RS256"])
async def test_a_token_of_better_auth_opens_all_operations(url: str, tmp_path: Path, algorithm: str) -> None:
    async with (
        running_better_auth(url, tmp_path, algorithm=algorithm) as issuer,
        _service(url, issuer) as client,
    ):
        alice = await _person("alice", issuer, client)

        assert jwt.get_unverified_header(alice.token)["alg"] == algorithm
        await _use_all_operations(alice)


IDS: dict[str, Callable[[str], object]] = {
    "text": lambda user_id: re.fullmatch("[A-Za-z0-9]{32}", user_id),
    "uuid": lambda user_id: str(uuid.UUID(user_id)) == user_id,
    "serial": lambda user_id: user_id in ("1", "2"),
}


@pytest.mark.parametrize("ids", IDS)
async def test_a_user_is_the_subject_of_the_token_whatever_ids_look_like(
    url: str, tmp_path: Path, ids: str
) -> None:
    async with running_better_auth(url, tmp_path, ids=ids) as issuer, _service(url, issuer) as client:
        alice = await _person("alice", issuer, client)
        bob = await _person("bob", issuer, client)

        assert IDS[ids](alice.user_id)
        await _use_all_operations(alice)
        task = await alice.create()

        assert (await bob.get()).json() == []
        assert (await bob.get(f"/{task['id']}")).status_code == 404
        assert (await bob.get(alice.tasks)).status_code == 403
        assert (await alice.get()).json() == [task]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jwks, "time", clock)
    return clock


ROTATIONS = {
    # What `jwks.rotationInterval` leads to: the old key has expired and is published for 30 days more.
    "expires": ("UPDATE jwks SET \"expiresAt\" = now() - interval '1 second'", 200),
    # What people do when a key has leaked.
    "is deleted": ("DELETE FROM jwks", 401),
}


@pytest.mark.parametrize(("rotation", "status_of_old"), ROTATIONS.values(), ids=ROTATIONS)
async def test_a_rotated_key_is_accepted_after_the_cool_down(
    url: str, tmp_path: Path, clock: Clock, rotation: str, status_of_old: int
) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        alice = await issuer.sign_up("alice")
        first, unseen = await issuer.token(alice), await _later_token(issuer, alice)
        assert (await Person(alice.user_id, client, first).get()).status_code == 200

        await _rows(url, rotation)
        rotated = await issuer.token(alice)
        assert jwt.get_unverified_header(rotated)["kid"] != jwt.get_unverified_header(first)["kid"]
        before = await Person(alice.user_id, client, rotated).get()
        clock.now += jwks.COOL_DOWN_S
        after = await Person(alice.user_id, client, rotated).get()
        old = await Person(alice.user_id, client, unseen).get()

        assert (before.status_code, after.status_code) == (401, 200)
        assert old.status_code == status_of_old


async def _later_token(issuer: BetterAuth, account: Account) -> str:
    """Return a token that differs from the last one, since `iat` has whole seconds."""
    last = token = await issuer.token(account)
    while token == last:
        await asyncio.sleep(0.1)
        token = await issuer.token(account)
    return token


@pytest.mark.parametrize(("cookie_cache", "algorithm"), [("secret", "HS256"), ("keys", "EdDSA")])
async def test_what_better_auth_signs_for_other_ends_is_401(
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
async def test_both_can_migrate_in_either_order_and_again(url: str, tmp_path: Path, first: str) -> None:
    if first == "we":
        await asyncio.to_thread(migrate, db.connect(url, pool_size=1))
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        task = await (await _person("alice", issuer, client)).create()
        assert await _tables(url) == BETTER_AUTH_TABLES | {"task", "local_account", "task_schema_version"}

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


async def test_a_user_who_is_deleted_blocks_nothing(url: str, tmp_path: Path) -> None:
    async with running_better_auth(url, tmp_path) as issuer, _service(url, issuer) as client:
        alice = await _person("alice", issuer, client)
        task = await alice.create()

        await _rows(url, 'DELETE FROM "user"')

        assert (await alice.get()).json() == [task]
