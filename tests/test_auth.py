import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI
from hypothesis import assume, given
from hypothesis import strategies as st

from auth import jwks, tokens
from main import create_app
from tests.conftest import SECRET, Person, on_one_database, person, raw_status, running, settings_for
from tests.issuer import ORIGIN, document, new_key, running_issuer
from tests.strategies import BOUNDED, JSON, LATIN_1, near_misses
from tests.test_tokens import part, resigned, respelt, signed


async def test_a_missing_token_is_401(alice: Person) -> None:
    answer = await alice.client.get(alice.tasks)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["detail"] == "Not authenticated"


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Basic YTpi", "Bearer a b", "Bearer é", "bearer x.y.z"]
)
async def test_a_malformed_authorization_header_is_401(alice: Person, value: str) -> None:
    answer = await alice.client.get(alice.tasks, headers={b"Authorization": value.encode("latin-1")})

    assert answer.status_code == 401


@pytest.mark.parametrize("value", [None, "", "Bearer", "Bearer ", "Basic YTpi"])
async def test_without_a_token_the_challenge_names_the_scheme_only(alice: Person, value: str | None) -> None:
    answer = await alice.client.get(alice.tasks, headers={} if value is None else {"Authorization": value})

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


@pytest.mark.parametrize("token", ["a b", "x.y.z", "a" * 20_000, signed(part({"alg": "HS256"}), part({}))])
async def test_a_refused_token_is_called_invalid_and_the_challenge_says_why(
    alice: Person, token: str
) -> None:
    answer = await alice.get(headers={"Authorization": f"Bearer {token}"})

    assert answer.status_code == 401
    said = f'error="invalid_token", error_description="{answer.json()["detail"]}"'
    assert answer.headers["www-authenticate"] == f"Bearer {said}"


async def test_the_401_for_a_token_without_sub_says_so(alice: Person) -> None:
    token = jwt.encode({"id": alice.user_id, "exp": int(time.time()) + 60}, SECRET, "HS256")

    answer = await alice.get(headers={"Authorization": f"Bearer {token}"})

    sentence = "Token has no sub claim, which must be the user's id"
    assert (answer.status_code, answer.json()["detail"]) == (401, sentence)


async def test_two_authorization_headers_are_401(alice: Person) -> None:
    good = ("Authorization", f"Bearer {alice.token}")

    answer = await alice.client.get(alice.tasks, headers=[good, good])

    assert answer.status_code == 401
    assert answer.json()["detail"] == "There is more than one Authorization header"


async def test_the_scheme_is_read_without_regard_to_case(alice: Person) -> None:
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = await alice.get(headers={"Authorization": f"{scheme} {alice.token}"})
        assert answer.status_code == 200


async def test_several_spaces_may_follow_the_scheme(alice: Person) -> None:
    answer = await alice.get(headers={"Authorization": f"Bearer   {alice.token}"})

    assert answer.status_code == 200


async def test_an_expired_token_says_so(alice: Person) -> None:
    expired = jwt.encode({"sub": alice.user_id, "exp": int(time.time()) - 60}, SECRET, "HS256")

    answer = await alice.get(headers={"Authorization": f"Bearer {expired}"})

    assert (answer.status_code, answer.json()["detail"]) == (401, "Token has expired")


async def test_a_token_of_a_megabyte_is_401(alice: Person) -> None:
    answer = await alice.get(headers={"Authorization": f"Bearer {'a' * 1_000_000}"})

    assert (answer.status_code, answer.json()["detail"]) == (401, "Token is larger than 16 KiB")


@pytest.mark.parametrize("path", ["", "/1", "/abc", f"/{2**70}", "?limit=0"])
async def test_401_and_403_come_before_validation_of_path_and_query(
    alice: Person, bob: Person, path: str
) -> None:
    url = f"{alice.tasks}{path}"

    assert (await alice.client.get(url)).status_code == 401
    assert (await bob.get(url)).status_code == 403


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"title": null}', b"\xff"])
async def test_401_and_403_come_before_validation_of_the_body(
    alice: Person, bob: Person, content: bytes
) -> None:
    options: dict[str, Any] = {"content": content, "headers": {"Content-Type": "application/json"}}

    assert (await alice.client.post(alice.tasks, **options)).status_code == 401
    assert (await bob.post(alice.tasks, **options)).status_code == 403
    assert (await alice.post(**options)).status_code == 422


def _task_operations(app: FastAPI) -> list[tuple[str, str]]:
    return [
        (method.upper(), path)
        for path, operations in app.openapi()["paths"].items()
        for method in operations
        if "{user_id}" in path
    ]


async def test_the_wrong_user_gets_403_from_every_operation(app: FastAPI, alice: Person, bob: Person) -> None:
    task = await alice.create()
    operations = _task_operations(app)
    assert len(operations) == 18

    for method, path in operations:
        url = path.format(user_id=alice.user_id, task_id=task["id"])
        for prefix in ("/api", "/api/v1"):
            answer = await bob.send(method, url.replace("/api", prefix, 1), json={"title": "Mine"})
            assert (answer.status_code, answer.json()["detail"]) == (403, "Access denied"), (method, url)
            anonymous = await bob.client.request(method, url)
            assert anonymous.status_code == 401, (method, url)
    assert (await alice.get()).json() == [task]


OWN = tokens.issue("alice", SECRET, 3600)
HEADER, CLAIMS = {"alg": "HS256"}, {"sub": "alice", "exp": time.time() + 3600}


def _is_in_force(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > time.time() - 60


def _is_past(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number < time.time() + 60


def _is_user(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and bool(name.strip()) and name != "alice"


def _is_token_type(name: object) -> bool:
    return str(name).lower() in ("jwt", "at+jwt")


# Each is signed with the right secret, but must be refused for another reason.
WRONG_CLAIMS = st.one_of(
    st.builds(
        lambda value: {"sub": value}, JSON.filter(lambda value: value != "alice" and not _is_user(value))
    ),
    st.builds(lambda value: {"exp": value}, JSON.filter(lambda value: not _is_in_force(value))),
    st.builds(lambda name, value: {name: value}, st.sampled_from(["nbf", "iat"]), JSON).filter(
        lambda claim: not any(_is_past(value) for value in claim.values())
    ),
)
WRONG_HEADERS = st.one_of(
    st.builds(lambda value: {"alg": value}, JSON.filter(lambda value: value != "HS256")),
    st.builds(lambda value: {"typ": value}, JSON.filter(lambda value: not _is_token_type(value))),
    st.builds(lambda name, value: {name: value}, st.sampled_from(["crit", "b64", "jwk", "jku", "x5u"]), JSON),
)
WRONG_CONTENT = st.one_of(
    st.binary(max_size=100),
    JSON.filter(lambda value: not isinstance(value, dict)).map(lambda value: json.dumps(value).encode()),
    near_misses(json.dumps(CLAIMS)[:-1]).map(lambda text: text.encode()),  # the closing brace is missing
    JSON.map(lambda value: b'{"sub": %s, ' % json.dumps(value).encode() + json.dumps(CLAIMS)[1:].encode()),
)
WRONG_TOKENS = st.one_of(
    near_misses(OWN),
    st.builds(
        lambda place, text: ".".join([*OWN.split(".")[:place], text, *OWN.split(".")[place + 1 :]]),
        st.integers(0, 2),
        st.text(LATIN_1, max_size=100),
    ),
    WRONG_CLAIMS.map(lambda claims: signed(part(HEADER), part(CLAIMS | claims))),
    WRONG_HEADERS.map(lambda header: signed(part(HEADER | header), part(CLAIMS))),
    WRONG_CONTENT.map(lambda content: signed(part(HEADER), part(content))),
    WRONG_CONTENT.map(lambda content: signed(part(content), part(CLAIMS))),
    st.sampled_from([f"{OWN} {OWN}", f"{OWN}, Bearer {OWN}", f"Bearer {OWN}", f"{OWN}.{OWN}", f'"{OWN}"']),
    st.just(resigned(OWN, respelt(OWN.rpartition(".")[2]))),
)
WRONG_VALUES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda value: b"Bearer " + value),
    WRONG_TOKENS.map(lambda token: b"Bearer " + token.encode("latin-1")),
    st.text(LATIN_1)
    .filter(lambda scheme: scheme.lower() != "bearer")
    .map(lambda scheme: f"{scheme} {OWN}".encode("latin-1")),
)


async def _status(app: FastAPI, number: int, authorization: bytes) -> int:
    ending = [each for each in _task_operations(app) if not each[1].endswith("/events")]
    method, path = ending[number]
    url = path.format(user_id="alice", task_id=1)
    return await raw_status(app, method, url, b"", (b"authorization", authorization))


async def test_the_owners_token_opens_a_task_operation(app: FastAPI, client: httpx.AsyncClient) -> None:
    statuses = [await _status(app, number, f"Bearer {OWN}".encode()) for number in range(6)]

    assert {401, 403}.isdisjoint(statuses)


@on_one_database
@pytest.mark.no_cover  # coverage of the same lines many times is slow
@BOUNDED
@given(value=WRONG_VALUES, number=st.integers(0, 5))
async def test_no_bytes_but_the_owners_token_open_a_task_operation(
    app: FastAPI, client: httpx.AsyncClient, value: bytes, number: int
) -> None:
    assume(
        value.decode("latin-1").partition(" ")[2].strip() != OWN or not value.lower().startswith(b"bearer ")
    )

    assert await _status(app, number, value) == 401


@on_one_database
@pytest.mark.no_cover  # coverage of the same lines many times is slow
@BOUNDED
@given(user_id=st.text(min_size=1, max_size=255).filter(_is_user), number=st.integers(0, 5))
async def test_the_token_of_any_other_user_is_403(
    app: FastAPI, client: httpx.AsyncClient, user_id: str, number: int
) -> None:
    assert await _status(app, number, f"Bearer {tokens.issue(user_id, SECRET, 3600)}".encode()) == 403


async def test_a_token_of_another_secret_is_401(alice: Person) -> None:
    other = tokens.issue(alice.user_id, "a-secret-that-nobody-has-configured-01", 60)

    answer = await alice.get(headers={"Authorization": f"Bearer {other}"})

    assert (answer.status_code, answer.json()["detail"]) == (401, "Token signature is invalid")


async def test_health_needs_no_token_and_ignores_a_bad_one(client: httpx.AsyncClient) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}):
        answer = await client.get("/health", headers=headers)
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("algorithm", jwks.ALGORITHMS)
async def test_tokens_of_an_issuer_and_of_a_secret_are_accepted_side_by_side(
    database_url: str, algorithm: str
) -> None:
    key = new_key(algorithm)
    async with running_issuer(key) as issuer:
        settings = settings_for(database_url, better_auth_url=ORIGIN, jwks_url=issuer.url)
        async with running(create_app(settings)) as client:
            alice = person("alice", client)
            by_key = key.token(sub=alice.user_id)

            created = await alice.create()
            listed = await alice.get(headers={"Authorization": f"Bearer {by_key}"})

            assert listed.json() == [created]
            assert len(issuer.requests) == 1


async def test_better_auth_url_alone_sets_keys_issuer_and_audience(database_url: str) -> None:
    key = new_key("EdDSA")
    async with running_issuer(key) as issuer:
        origin = issuer.url.removesuffix("/api/auth/jwks")
        settings = settings_for(database_url, better_auth_url=origin, better_auth_secret=None)
        async with running(create_app(settings)) as client:
            good, other = key.token(iss=origin, aud=origin), key.token()

            answers = [
                await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {token}"})
                for token in (good, other, person("alice", client).token)
            ]

    assert [answer.status_code for answer in answers] == [200, 401, 401]


async def test_keys_that_cannot_be_fetched_are_503_and_never_401(database_url: str) -> None:
    key = new_key("EdDSA")
    async with running_issuer(key) as issuer:
        issuer.reply = None
        settings = settings_for(database_url, better_auth_url=ORIGIN, jwks_url=issuer.url)
        async with running(create_app(settings)) as client:
            by_key = await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {key.token()}"})
            by_secret = await person("alice", client).get()

    assert (by_key.status_code, by_key.headers["retry-after"]) == (503, "5")
    assert by_key.headers["content-type"] == "application/problem+json"
    assert by_secret.status_code == 200


async def test_fetched_keys_verify_while_the_issuer_is_down(database_url: str) -> None:
    key = new_key("ES256")
    async with running_issuer(key) as issuer:
        settings = settings_for(database_url, better_auth_url=ORIGIN, jwks_url=issuer.url)
        async with running(create_app(settings)) as client:
            first = await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {key.token()}"})
            issuer.reply = None
            another = key.token(jti="another")
            second = await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {another}"})

    assert [first.status_code, second.status_code] == [200, 200]


async def test_static_keys_need_no_issuer(database_url: str, tmp_path: Path) -> None:
    key = new_key("RS256")
    file = tmp_path / "keys.json"
    file.write_bytes(document(key))
    for keys in (str(file), document(key).decode()):
        settings = settings_for(database_url, jwks=keys, jwt_issuer=f"x, {ORIGIN}", jwt_audience=ORIGIN)
        async with running(create_app(settings)) as client:
            answer = await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {key.token()}"})
        assert answer.status_code == 200


async def test_an_issuer_with_one_key_without_an_id_signs_tokens_without_kid(database_url: str) -> None:
    one, other = new_key("ES256"), new_key("ES256", "other")
    nameless = {name: value for name, value in one.public.items() if name != "kid"}
    async with running_issuer() as issuer:
        settings = settings_for(
            database_url, jwks_url=issuer.url, jwt_issuer=ORIGIN, jwt_audience=ORIGIN, better_auth_secret=None
        )
        statuses = []
        for published in ([nameless], [nameless, other], [other]):
            issuer.publish(*published)
            async with running(create_app(settings)) as client:
                for token in (one.token({"kid": None}), one.token({"kid": "x"}), other.token({"kid": None})):
                    headers = {"Authorization": f"Bearer {token}"}
                    statuses.append((await client.get("/api/alice/tasks", headers=headers)).status_code)

    assert statuses == [200, 401, 401] + [401] * 6


async def test_paging_works_without_any_secret(database_url: str) -> None:
    key = new_key("EdDSA")
    settings = settings_for(
        database_url, better_auth_secret=None, jwks=document(key).decode(), better_auth_url=ORIGIN
    )
    async with running(create_app(settings)) as client:
        alice = replace(person("alice", client), token="")
        alice = replace(alice, token=key.token(sub=alice.user_id))
        await alice.create("1")
        await alice.create("2")

        first = await alice.get("?limit=1")
        second = await alice.get(first.links["next"]["url"])

    assert [first.json()[0]["title"], second.json()[0]["title"]] == ["2", "1"]
