import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from auth import jwks
from auth.jwks import FetchedKeys, KeySetInvalid, KeysUnavailable, KeyUnknown, StaticKeys, read_keys
from tests.conftest import Clock
from tests.issuer import Issuer, SigningKey, answer, document, new_key, running_issuer

KEYS = {algorithm: new_key(algorithm) for algorithm in jwks.ALGORITHMS}
OLD, NEW = new_key("EdDSA", "old"), new_key("EdDSA", "new")
RSA = KEYS["RS256"].public
PUBLIC = OLD.public


@pytest.mark.parametrize("algorithm", jwks.ALGORITHMS)
def test_a_key_verifies_what_it_signed_and_nothing_else(algorithm: str) -> None:
    key = read_keys(document(KEYS[algorithm])).keys[f"key-{algorithm}"]
    signature = jwks.ALGORITHMS[algorithm].sign(b"message", KEYS[algorithm].private)

    assert key.verify(algorithm, b"message", signature)
    assert not key.verify(algorithm, b"another message", signature)
    for other in set(jwks.ALGORITHMS) - {algorithm}:
        same = {algorithm, other} == {"EdDSA", "Ed25519"}
        assert key.verify(other, b"message", signature) is same


def test_a_key_with_alg_verifies_no_other_algorithm() -> None:
    key = read_keys(document(RSA | {"alg": "PS256"})).keys["key-RS256"]

    assert key.algorithms == {"PS256"}


NOT_FOR_US: dict[str, dict[str, Any]] = {
    "another type": {"kty": "AKP", "kid": "x"},
    "no type": {"kid": "x"},
    "for encryption": RSA | {"use": "enc", "kid": "x"},
    "Ed448": {"kty": "OKP", "crv": "Ed448", "kid": "x", "x": "A" * 76},
    "X25519": PUBLIC | {"crv": "X25519", "kid": "x"},
    "secp256k1": KEYS["ES256"].public | {"crv": "secp256k1", "kid": "x"},
    "brainpool": KEYS["ES256"].public | {"crv": "BP-256", "alg": "ES256", "kid": "x"},
    "RSA-OAEP": RSA | {"alg": "RSA-OAEP", "kid": "x"},
    "RS1": RSA | {"alg": "RS1", "kid": "x"},
    "ECDH-ES": KEYS["ES256"].public | {"alg": "ECDH-ES", "kid": "x"},
    "an unknown curve, and no id": {"kty": "OKP", "crv": "X448"},
}


@pytest.mark.parametrize("entry", NOT_FOR_US.values(), ids=NOT_FOR_US)
def test_keys_for_other_uses_are_ignored(entry: dict[str, Any]) -> None:
    for entries in ((entry, OLD), (OLD, entry), (entry, OLD, entry)):
        found = read_keys(document(*entries))
        assert (list(found.keys), found.skipped) == (["old"], {})
    assert read_keys(document(entry)).keys == {}


NOT_A_SET: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not valid JSON"),
    "HTML": (b"<!doctype html><title>Sign in</title>", "is not valid JSON"),
    "an array": (b"[]", "is not a key set"),
    "no keys": (b"{}", "is not a key set"),
    "keys that are no array": (b'{"keys": {}}', "is not a key set"),
    "a member twice": (b'{"keys": [], "keys": []}', "has a member twice"),
}


@pytest.mark.parametrize(("content", "reason"), NOT_A_SET.values(), ids=NOT_A_SET.keys())
def test_a_document_that_is_not_a_key_set_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(KeySetInvalid, match=reason):
        read_keys(content)


def lacking(key: dict[str, Any], name: str) -> dict[str, Any]:
    return {member: value for member, value in key.items() if member != name}


ODD: dict[str, tuple[Any, str]] = {
    "no object": ("x", "not an object"),
    "null": (None, "not an object"),
    "the id of another": (NEW.public | {"kid": "old"}, "no id of its own"),
    "no id": (lacking(PUBLIC, "kid"), "no id of its own"),
    "an empty id": (PUBLIC | {"kid": ""}, "no id of its own"),
    "an id that is a number": (PUBLIC | {"kid": 1}, "an id that is not text"),
    "an id that is null": (PUBLIC | {"kid": None}, "an id that is not text"),
    "a shared secret": ({"kty": "oct", "kid": "s", "k": "c2VjcmV0"}, "has been published"),
    "a private key": (PUBLIC | {"d": "c2VjcmV0", "kid": "x"}, "has been published"),
    "a private key of an unknown curve": ({"kty": "OKP", "crv": "X448", "d": "A"}, "has been published"),
    "a private key of an unknown algorithm": (RSA | {"alg": "RS1", "d": "A"}, "has been published"),
    "a curve of another type": (PUBLIC | {"crv": "P-256", "kid": "x"}, "malformed"),
    "a curve that is no text": (PUBLIC | {"crv": 7, "kid": "x"}, "do not fit together"),
    "a curve that is an array": (PUBLIC | {"crv": ["Ed25519"], "kid": "x"}, "do not fit together"),
    "no curve": (lacking(PUBLIC, "crv"), "do not fit together"),
    "an algorithm that is no text": (RSA | {"alg": ["RS256"]}, "do not fit together"),
    "an algorithm of another curve": (KEYS["ES256"].public | {"alg": "ES384"}, "do not fit together"),
    "an algorithm of another type": (RSA | {"alg": "ES256"}, "do not fit together"),
    "a point that is none": (PUBLIC | {"x": "AAAA"}, "malformed"),
    "a point that is no text": (PUBLIC | {"x": 7}, "malformed"),
    "a point off its curve": (KEYS["ES256"].public | {"y": KEYS["ES256"].public["x"]}, "malformed"),
    "no modulus": (lacking(RSA, "n"), "malformed"),
    "a short RSA key": (RSA | {"n": RSA["n"][:200]}, "less than 2048 bits"),
}


@pytest.mark.parametrize(("entry", "reason"), ODD.values(), ids=ODD.keys())
def test_an_invalid_key_is_skipped_and_counted(entry: Any, reason: str) -> None:
    found = read_keys(document(OLD, entry, entry, KEYS["ES512"]))

    assert found.keys == read_keys(document(OLD, KEYS["ES512"])).keys
    ((said, times),) = found.skipped.items()
    assert reason in said
    assert times == 2


def test_an_invalid_key_does_not_take_the_id_of_a_valid_one() -> None:
    found = read_keys(document(PUBLIC | {"x": "AAAA"}, OLD))

    assert found.keys == read_keys(document(OLD)).keys


def test_the_only_key_of_a_set_needs_no_kid() -> None:
    nameless = lacking(PUBLIC, "kid")

    for beside in ([], [NOT_FOR_US["for encryption"]], [RSA | {"n": "AQAB"}]):
        assert list(read_keys(document(nameless, *beside)).keys) == [""]
    assert list(read_keys(document(nameless, NEW)).keys) == ["new"]
    assert list(read_keys(document(NEW, nameless)).keys) == ["new"]
    assert read_keys(document(nameless, lacking(NEW.public, "kid"))).keys == {}


@pytest.mark.parametrize(("entry", "reason"), ODD.values(), ids=ODD.keys())
def test_an_invalid_key_in_a_static_key_set_is_refused(entry: Any, reason: str) -> None:
    with pytest.raises(KeySetInvalid, match=reason):
        StaticKeys(document(OLD, entry))


def test_settings_without_any_key_are_refused() -> None:
    for entries in ((), NOT_FOR_US.values()):
        with pytest.raises(KeySetInvalid, match="has no keys"):
            StaticKeys(document(*entries))


async def test_static_keys_are_exactly_those_configured() -> None:
    keys = StaticKeys(document(OLD))

    assert (await keys.key("old")).algorithms == {"EdDSA", "Ed25519"}
    with pytest.raises(KeyUnknown):
        await keys.key("new")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jwks, "time", clock)
    return clock


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with running_issuer(OLD) as issuer:
        yield issuer


@pytest.fixture
async def keys(issuer: Issuer, clock: Clock) -> AsyncIterator[FetchedKeys]:
    """`FetchedKeys` after its first fetch."""
    keys = FetchedKeys(issuer.url)
    await keys.open()
    await keys.key("old")
    yield keys
    await keys.close()


async def end_of_fetch(keys: FetchedKeys) -> None:
    assert keys._fetching is not None
    await keys._fetching


async def test_concurrent_look_ups_share_one_fetch(issuer: Issuer, clock: Clock) -> None:
    issuer.delay_s = 0.1
    keys = FetchedKeys(issuer.url)
    await keys.open()

    found = await asyncio.gather(*(keys.key("old") for _ in range(100)))

    assert len({id(key) for key in found}) == len(issuer.requests) == 1
    await keys.close()


async def test_a_key_that_is_fresh_costs_no_fetch(issuer: Issuer, keys: FetchedKeys, clock: Clock) -> None:
    clock.now += jwks.FRESH_S
    for _ in range(3):
        await keys.key("old")
        await end_of_fetch(keys)

    assert len(issuer.requests) == 1


async def test_closing_does_not_wait_for_the_issuer(issuer: Issuer) -> None:
    issuer.delay_s = 1.0
    keys = FetchedKeys(issuer.url)
    await keys.open()
    await asyncio.sleep(0.1)
    began = time.perf_counter()

    await keys.close()

    assert time.perf_counter() - began < 0.5


async def test_opening_does_not_wait_for_the_issuer(issuer: Issuer) -> None:
    issuer.delay_s = 1.0
    keys = FetchedKeys(issuer.url)
    began = time.perf_counter()

    await keys.open()

    assert time.perf_counter() - began < 0.5
    await keys.close()


async def test_a_client_that_hangs_up_does_not_end_the_fetch_for_others(issuer: Issuer, clock: Clock) -> None:
    issuer.delay_s = 0.1
    keys = FetchedKeys(issuer.url)
    await keys.open()
    hasty, patient = asyncio.create_task(keys.key("old")), asyncio.create_task(keys.key("old"))
    await asyncio.sleep(0.02)

    hasty.cancel()

    assert await patient
    await keys.close()


async def test_a_client_that_hangs_up_does_not_end_a_renewal_for_others(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.delay_s = 0.1
    clock.now += jwks.IDLE_MAX_S + 1
    hasty, patient = asyncio.create_task(keys.key("old")), asyncio.create_task(keys.key("old"))
    await asyncio.sleep(0.02)

    hasty.cancel()

    assert await patient
    assert len(issuer.requests) == 2


async def test_a_known_key_never_waits_for_an_unknown_one(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.delay_s = 0.5
    clock.now += jwks.COOL_DOWN_S
    unknown = asyncio.create_task(keys.key("new"))
    await asyncio.sleep(0.05)

    await asyncio.wait_for(keys.key("old"), 0.1)

    assert not unknown.done()
    with pytest.raises(KeyUnknown):
        await unknown


async def test_a_key_made_after_the_start_is_found_at_once(issuer: Issuer, keys: FetchedKeys) -> None:
    issuer.publish(OLD, NEW)

    assert await keys.key("new")
    assert await keys.key("old")


async def test_a_key_made_after_a_renewal_is_found_at_once(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    clock.now += jwks.FRESH_S + 1
    await keys.key("old")
    await end_of_fetch(keys)
    assert len(issuer.requests) == 2
    issuer.publish(OLD, NEW)

    assert await keys.key("new")


async def test_a_key_made_during_a_fetch_is_found_at_once(issuer: Issuer, clock: Clock) -> None:
    issuer.delay_s = 0.1
    keys = FetchedKeys(issuer.url)
    await keys.open()
    unknown = [asyncio.create_task(keys.key("new")) for _ in range(100)]
    await end_of_fetch(keys)
    issuer.publish(OLD, NEW)

    assert len({id(key) for key in await asyncio.gather(*unknown)}) == 1
    assert len(issuer.requests) == 2
    await keys.close()


async def test_a_rotated_key_is_found_within_the_cool_down(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    with pytest.raises(KeyUnknown):
        await keys.key("new")
    issuer.publish(OLD, NEW)
    clock.now += jwks.COOL_DOWN_S - 1
    with pytest.raises(KeyUnknown):
        await keys.key("new")

    clock.now += 1

    assert await keys.key("new")
    assert await keys.key("old")


async def test_unknown_keys_cost_one_fetch_per_cool_down(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    for _ in range(3):
        clock.now += jwks.COOL_DOWN_S
        results = await asyncio.gather(
            *(keys.key(f"unknown-{number}") for number in range(200)), return_exceptions=True
        )
        assert {type(result) for result in results} == {KeyUnknown}

    assert len(issuer.requests) == 1 + 3


async def test_a_key_that_is_no_longer_published_is_dropped(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.publish(NEW)
    clock.now += jwks.FRESH_S + 1

    assert await keys.key("old")  # returns the old key and renews in the background
    assert await keys.key("new")
    with pytest.raises(KeyUnknown):
        await keys.key("old")


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([], id="an empty set"),
        pytest.param(list(NOT_FOR_US.values()), id="none for us"),
        *(pytest.param([entry], id=name) for name, (entry, _) in ODD.items() if "id" not in name),
    ],
)
async def test_a_key_missing_from_the_next_set_is_withdrawn_at_once(
    issuer: Issuer, keys: FetchedKeys, clock: Clock, entries: list[Any]
) -> None:
    clock.now += jwks.FRESH_S + 1
    issuer.publish(*entries)
    await keys.key("old")  # returns the old key and renews in the background
    await end_of_fetch(keys)

    with pytest.raises(KeyUnknown):
        await keys.key("old")

    clock.now += jwks.COOL_DOWN_S
    issuer.publish(*entries, NEW)
    assert await keys.key("new")


async def test_skipped_keys_and_an_empty_key_set_are_logged_once(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    with capture_logs() as lines:
        for entries in ((OLD, "x", "x"), (OLD, "x", "x"), (OLD,), ()):
            issuer.publish(*entries)
            clock.now += jwks.FRESH_S + 1
            await keys.key("old")
            await end_of_fetch(keys)

    assert [line["event"] for line in lines] == ["keys skipped", "issuer has no keys"]
    assert lines[0] == {
        "event": "keys skipped",
        "log_level": "warning",
        "url": issuer.url,
        "reasons": {"a key is not an object": 2},
    }


async def test_after_idle_time_a_withdrawn_key_is_not_trusted(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.publish(NEW)
    issuer.delay_s = 0.1
    clock.now += jwks.IDLE_MAX_S + 1

    found = await asyncio.gather(*(keys.key("old") for _ in range(5)), return_exceptions=True)

    assert [type(each) for each in found] == [KeyUnknown] * 5
    assert len(issuer.requests) == 1 + 2  # a renewal, and a fetch in search of the unknown key
    assert await keys.key("new")


@pytest.mark.parametrize("failed_before", [False, True])
async def test_after_idle_time_one_call_waits_for_a_fetch_while_the_issuer_is_down(
    issuer: Issuer, keys: FetchedKeys, clock: Clock, monkeypatch: pytest.MonkeyPatch, failed_before: bool
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.3)
    issuer.delay_s = 30
    if failed_before:
        clock.now += jwks.FRESH_S + 1
        await keys.key("old")
        await end_of_fetch(keys)

    for _ in range(2):
        clock.now += jwks.IDLE_MAX_S + 1
        began = time.perf_counter()
        assert await keys.key("old")
        assert 0.2 < time.perf_counter() - began < 2  # this call has waited, and the old key stays valid

        clock.now += jwks.COOL_DOWN_S
        began = time.perf_counter()
        assert await keys.key("old")  # a fetch goes on in the background
        assert time.perf_counter() - began < 0.2
        await end_of_fetch(keys)


async def test_a_key_that_is_asked_for_all_the_time_is_renewed_without_waiting(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.delay_s = 0.2
    for _ in range(5):
        clock.now += jwks.FRESH_S + 1
        await asyncio.wait_for(keys.key("old"), 0.1)
        await end_of_fetch(keys)

    assert len(issuer.requests) == 1 + 5


async def test_a_redirect_to_another_set_of_keys_is_not_followed(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    async with running_issuer(NEW) as another:
        for status in ("301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect"):
            issuer.reply = answer(b"", status, f"Location: {another.url}")
            clock.now += jwks.COOL_DOWN_S
            with pytest.raises(KeysUnavailable):
                await keys.key("new")

    assert len(issuer.requests) == 1 + 4
    assert another.requests == []


MISBEHAVIOUR: dict[str, bytes | None] = {
    "resets": None,
    "says nothing": b"",
    "fails": answer(b"{}", "500 Internal Server Error"),
    "answers with HTML": answer(b"<html></html>", "200 OK", "Content-Type: text/html"),
    "answers with nothing": answer(b""),
    "answers with too much": answer(b" " * (jwks.DOCUMENT_MAX_BYTES + 1) + document(NEW)),
    "breaks off": answer(document(NEW))[:-9],
    "speaks no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "has a member twice": answer(b'{"keys": [], "keys": []}'),
}


@pytest.mark.parametrize("reply", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
async def test_an_invalid_response_of_the_issuer_keeps_the_known_keys(
    issuer: Issuer, keys: FetchedKeys, clock: Clock, reply: bytes | None
) -> None:
    issuer.reply = reply
    clock.now += jwks.FRESH_S + 1

    assert await keys.key("old")
    with pytest.raises(KeysUnavailable):  # the key may exist by now, but it cannot be fetched
        await keys.key("new")
    assert await keys.key("old")

    issuer.publish(OLD, NEW)
    clock.now += jwks.COOL_DOWN_S
    assert await keys.key("new")


@pytest.mark.parametrize("reply", MISBEHAVIOUR.values(), ids=MISBEHAVIOUR.keys())
async def test_keys_are_unavailable_if_the_first_fetch_fails(
    issuer: Issuer, clock: Clock, reply: bytes | None
) -> None:
    issuer.reply = reply
    keys = FetchedKeys(issuer.url)
    await keys.open()

    with pytest.raises(KeysUnavailable):
        await keys.key("old")
    with pytest.raises(KeysUnavailable):  # at once, during the cool-down
        await keys.key("old")

    assert len(issuer.requests) == 1
    await keys.close()


async def test_a_fetch_from_a_slow_issuer_times_out(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.1)
    issuer.delay_s = 5
    keys = FetchedKeys(issuer.url)
    await keys.open()

    with pytest.raises(KeysUnavailable):
        await asyncio.wait_for(keys.key("old"), 2)
    await keys.close()


async def test_a_fetch_that_arrives_byte_by_byte_times_out(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "FETCH_TIMEOUT_S", 0.3)

    async def dribble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in answer(document(OLD)):
            writer.write(bytes([byte]))
            await asyncio.sleep(0.05)

    server = await asyncio.start_server(dribble, "127.0.0.1", 0)
    keys = FetchedKeys(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await keys.open()

    with pytest.raises(KeysUnavailable):
        await asyncio.wait_for(keys.key("old"), 2)
    await keys.close()
    server.close()


async def test_keys_stay_valid_for_a_day_while_the_issuer_is_down(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.reply = None
    for _ in range(24):
        clock.now += 3600 - 60
        assert await keys.key("old")
        await asyncio.sleep(0.02)

    clock.now += 3600

    with pytest.raises(KeysUnavailable):
        await keys.key("old")


async def test_an_issuer_that_is_down_is_fetched_from_once_per_cool_down(
    issuer: Issuer, keys: FetchedKeys, clock: Clock
) -> None:
    issuer.reply = None
    clock.now += jwks.FRESH_S + 1

    for _ in range(3):
        for _ in range(20):
            clock.now += jwks.COOL_DOWN_S / 20
            assert await keys.key("old")
            with pytest.raises(KeysUnavailable):
                await keys.key("new")

    assert 1 + 3 <= len(issuer.requests) <= 1 + 4


async def test_the_key_set_is_fetched_without_authorization(issuer: Issuer, keys: FetchedKeys) -> None:
    assert issuer.requests[0].startswith(b"GET /api/auth/jwks HTTP/1.1\r\n")
    assert b"authorization" not in issuer.requests[0].lower()


@pytest.mark.parametrize("more", ["?p=policy", "/", "/?a=b/&c=%20"])
async def test_jwks_url_is_requested_unchanged(issuer: Issuer, more: str) -> None:
    keys = FetchedKeys(issuer.url + more)
    await keys.open()

    assert await keys.key("old")
    assert issuer.requests[0].startswith(f"GET /api/auth/jwks{more} HTTP/1.1\r\n".encode())
    await keys.close()


def test_the_keys_of_these_tests_are_of_every_algorithm() -> None:
    assert len(KEYS) == 11
    assert all(isinstance(key, SigningKey) for key in KEYS.values())
