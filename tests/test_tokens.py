"""Tokens here have valid signatures, so that a refusal is for the tested rule and not for the signature."""

import base64
import hmac
import json
import re
import string
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from auth import jwks, tokens
from auth.jwks import FetchedKeys, KeysUnavailable
from auth.tokens import Claims, TokenExpired, TokenInvalid, Verifier
from errors import InvalidToken
from tests.conftest import SECRET, Clock
from tests.issuer import Issuer, SigningKey, new_key, running_issuer
from web.openapi import CHALLENGE_PATTERN

OLDER = "a-secret-that-only-the-tests-know-0000"
PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=
-----END PUBLIC KEY-----
"""
NOW = 1_800_000_000
SOON = NOW + 900

Json = Mapping[str, Any] | bytes
HEADER: dict[str, Any] = {"alg": "HS256", "typ": "JWT"}
CLAIMS: dict[str, Any] = {"sub": "alice", "exp": SOON}


def part(content: Json) -> str:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def signed(header: str, payload: str, secret: str = SECRET, digest: str = "sha256") -> str:
    """Return a token of the two given parts, with a valid signature."""
    mac = hmac.digest(secret.encode(), f"{header}.{payload}".encode(), digest)
    return f"{header}.{payload}.{part(mac)}"


def token(payload: Json = CLAIMS, header: Json = HEADER, secret: str = SECRET, digest: str = "sha256") -> str:
    return signed(part(header), part(payload), secret, digest)


def claiming(**claims: Any) -> str:
    return token(CLAIMS | claims)


def without(name: str) -> str:
    return token({key: value for key, value in CLAIMS.items() if key != name})


def headed(**header: Any) -> str:
    return token(header=HEADER | header)


def resigned(token: str, signature: str) -> str:
    return f"{token.rpartition('.')[0]}.{signature}"


def signature_of(token: str) -> bytes:
    return base64.urlsafe_b64decode(token.rpartition(".")[2] + "=")


def respelt(text: str) -> str:
    """Return another base64 text of the same bytes: the last character has unused bits."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    other = text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]
    padding = "=" * (-len(text) % 4)
    assert base64.urlsafe_b64decode(other + padding) == base64.urlsafe_b64decode(text + padding)
    return other


def standard(text: str) -> str:
    """Return *text* in the base64 alphabet, which differs from base64url in two characters."""
    assert "-" in text
    assert "_" in text
    return text.replace("-", "+").replace("_", "/")


def of_length(length: int) -> str:
    """Return a valid token of *length* characters."""
    bare = token(CLAIMS | {"image": ""})
    payload = part(CLAIMS | {"image": ""})
    wanted = len(payload) + length - len(bare)
    filler = wanted * 3 // 4 - len(json.dumps(CLAIMS | {"image": ""}))
    made = claiming(image="x" * filler)
    assert len(made) == length
    return made


H, P = part(HEADER), part(CLAIMS)
GOOD = token()
WITHDRAWN, STAYING = new_key("EdDSA", "withdrawn"), new_key("EdDSA", "staying")
# 16 bytes, as P has 35: the last base64 character has unused bits.
LOOSE_HEADER = part({"alg": "HS256"})
# Contains characters that base64 and base64url encode differently.
ODD_PAYLOAD = part(b'{"sub": "~~~???>>>", "exp": %d, "x": "\xc3\xbe\xc3\xbf~?"}' % SOON)
ODD_HEADER = part({"alg": "HS256", "kid": "~~~???>>>"})

REFUSED: dict[str, dict[str, str]] = {
    "Token is malformed": {
        "nothing": "",
        "a word": "not-a-token",
        "one part": H,
        "two parts": f"{H}.{P}",
        "four parts": f"{GOOD}.{P}",
        "five parts, as if encrypted": f"{GOOD}.{P}.{P}",
        "a dot more": f"{GOOD}.",
        "a dot before": f".{GOOD}",
        "no header": signed("", P),
        "no payload": signed(H, ""),
        "dots only": "..",
        "header not base64": signed("{}", P),
        "payload not base64": signed(H, '{"sub":"alice"}'),
        "signature not base64": resigned(GOOD, "!" * 43),
        "signature in hexadecimal": resigned(GOOD, signature_of(GOOD).hex() + "0"),
        "a length that base64 never has": signed(H, P + "A" * (-len(P) % 4 + 1)),
        "header padded": signed(LOOSE_HEADER + "==", P),
        "payload padded": signed(H, P + "="),
        "signature padded": GOOD + "=",
        "padding only": "=.=.=",
        "space before": f" {GOOD}",
        "space after": f"{GOOD} ",
        "line feed after": f"{GOOD}\n",
        "U+0000 after": f"{GOOD}\0",
        "line feed in the header": signed(f"{H[:4]}\n{H[4:]}", P),
        "space in the payload": signed(H, f"{P[:4]} {P[4:]}"),
        "line feed after the payload": signed(H, f"{P}\n"),
        "tab in the signature": resigned(GOOD, "\t" + part(signature_of(GOOD))),
        "header in standard base64": signed(standard(ODD_HEADER), P),
        "payload in standard base64": signed(H, standard(ODD_PAYLOAD)),
        "header with other spare bits": signed(respelt(LOOSE_HEADER), P),
        "payload with other spare bits": signed(H, respelt(P)),
        "signature with other spare bits": resigned(GOOD, respelt(part(signature_of(GOOD)))),
        "letters beyond ASCII": "é.é.é",
        "digits beyond ASCII": signed(H, "٣" * 4),
        "unpaired surrogates": "\ud800.\ud800.\ud800",
        "header not JSON": token(header=b"HS256"),
        "header an array": token(header=b'["HS256"]'),
        "header a string": token(header=b'"HS256"'),
        "header null": token(header=b"null"),
        "header not UTF-8": token(header=b'{"alg": "HS256", "kid": "\xff"}'),
        "header names alg twice": token(header=b'{"alg": "none", "alg": "HS256"}'),
        "header names alg twice alike": token(header=b'{"alg": "HS256", "alg": "HS256"}'),
        "header names typ twice": token(header=b'{"alg": "HS256", "typ": "x", "typ": "JWT"}'),
        "payload not JSON": token(b"alice"),
        "payload an array": token(b'[{"sub": "alice"}]'),
        "payload a string": token(b'"alice"'),
        "payload a number": token(b"7"),
        "payload true": token(b"true"),
        "payload null": token(b"null"),
        "payload cut": token(b'{"sub": "alice", "exp": 1'),
        "payload and more": token(b'{"sub": "alice", "exp": %d} {}' % SOON),
        "payload not UTF-8": token(b'{"sub": "al\xffce", "exp": %d}' % SOON),
        "payload in UTF-16": token('{"sub": "alice"}'.encode("utf-16")),
        "payload behind a byte order mark": token(b'\xef\xbb\xbf{"sub": "alice", "exp": %d}' % SOON),
        "payload names sub twice": token(b'{"sub": "bob", "exp": %d, "sub": "alice"}' % SOON),
        "payload names sub twice, once escaped": token(
            b'{"sub": "bob", "s\\u0075b": "alice", "exp": %d}' % SOON
        ),
        "payload names exp twice": token(b'{"sub": "alice", "exp": 1, "exp": %d}' % SOON),
        "payload names a member within twice": token(
            b'{"sub": "alice", "exp": %d, "a": {"b": 1, "b": 1}}' % SOON
        ),
        "payload nested deeply": token(b"[" * 12_000),
        "exp NaN": token(b'{"sub": "alice", "exp": NaN}'),
        "exp Infinity": token(b'{"sub": "alice", "exp": Infinity}'),
        "exp -Infinity": token(b'{"sub": "alice", "exp": -Infinity}'),
        "exp 1e999": token(b'{"sub": "alice", "exp": 1e999}'),
        "exp of 5000 digits": token(b'{"sub": "alice", "exp": %s}' % (b"9" * 5000)),
        "iat NaN": token(b'{"sub": "alice", "exp": %d, "iat": NaN}' % SOON),
    },
    "Token algorithm is not accepted": {
        "alg none, unsigned": f"{part({'alg': 'none'})}.{P}.",
        "alg none, signed": headed(alg="none"),
        "alg None": headed(alg="None"),
        "alg missing": token(header={"typ": "JWT"}),
        "header empty": token(header={}),
        "alg null": headed(alg=None),
        "alg empty": headed(alg=""),
        "alg a number": headed(alg=256),
        "alg an array": headed(alg=["HS256"]),
        "alg in lower case": headed(alg="hs256"),
        "alg with a space": headed(alg="HS256 "),
        "alg HS384": token(header={"alg": "HS384"}, digest="sha384"),
        "alg HS512": token(header={"alg": "HS512"}, digest="sha512"),
        "alg HS512, signed as HS256": headed(alg="HS512"),
        "alg RS256, signed as HS256": headed(alg="RS256"),
        "alg RS256, signed with the public key": token(header={"alg": "RS256"}, secret=PUBLIC_KEY),
        "alg PS256": headed(alg="PS256"),
        "alg ES256": headed(alg="ES256"),
        "alg EdDSA": headed(alg="EdDSA"),
        "alg dir": headed(alg="dir", enc="A256GCM"),
    },
    "Token is not an access token": {
        "typ of Better Auth's session cache": headed(typ="better-auth.session-cache+jwt"),
        "typ of an identity token": headed(typ="id+jwt"),
        "typ of a logout token": headed(typ="logout+jwt"),
        "typ of a DPoP proof": headed(typ="dpop+jwt"),
        "typ JOSE": headed(typ="JOSE"),
        "typ with a space": headed(typ="JWT "),
        "typ empty": headed(typ=""),
        "typ null": headed(typ=None),
        "typ a number": headed(typ=7),
        "typ an array": headed(typ=["JWT"]),
    },
    "Token header is not accepted": {
        "crit of what we know": headed(crit=["exp"], exp=SOON),
        "crit of what we do not know": headed(crit=["x"], x=1),
        "crit empty": headed(crit=[]),
        "crit null": headed(crit=None),
        "b64 false": headed(b64=False),
        "b64 false and critical": headed(b64=False, crit=["b64"]),
        "b64 true": headed(b64=True),
        "jwk": headed(jwk={"kty": "oct", "k": part(SECRET.encode())}),
        "jku": headed(jku="https://evil.example.com/jwks"),
        "x5u": headed(x5u="https://evil.example.com/certificate"),
        "x5c": headed(x5c=["MIIB"]),
    },
    "Token signature is invalid": {
        "another secret": token(secret=OLDER),
        "an empty secret": token(secret=""),
        "a public key as the secret": token(secret=PUBLIC_KEY),
        "the secret and more": token(secret=f"{SECRET}\n"),
        "SHA-512 under the name of HS256": token(digest="sha512"),
        "no signature": resigned(GOOD, ""),
        "half a signature": resigned(GOOD, part(signature_of(GOOD)[:16])),
        "a signature and more": resigned(GOOD, part(signature_of(GOOD) + b"\0")),
        "a bit changed in the signature": resigned(
            GOOD, part(bytes([signature_of(GOOD)[0] ^ 1]) + signature_of(GOOD)[1:])
        ),
        "zeros": resigned(GOOD, part(bytes(32))),
        "the signature of another payload": resigned(GOOD, part(signature_of(claiming(sub="bob")))),
        "the signature of another header": resigned(GOOD, part(signature_of(headed(kid="1")))),
        "expired as well": token(CLAIMS | {"exp": 1}, secret=OLDER),
        "without sub as well": token({"exp": SOON}, secret=OLDER),
    },
    "Token has no sub claim, which must be the user's id": {
        "sub missing": without("sub"),
        "nothing but a user's row": token({"id": "alice", "email": "alice@example.com", "exp": SOON}),
        "payload empty": token({}),
    },
    "Token names no user": {
        "sub null": claiming(sub=None),
        "sub empty": claiming(sub=""),
        "sub blank": claiming(sub=" "),
        "sub blank beyond ASCII": claiming(sub="\u3000"),
        "sub a tab": claiming(sub="\t"),
        "sub with a line feed": claiming(sub="alice\nbob"),
        "sub with U+0000": claiming(sub="alice\0"),
        "sub with DEL": claiming(sub="alice\x7f"),
        "sub with a no-break space": claiming(sub="alice\u00a0"),
        "sub with a zero-width space": claiming(sub="ali\u200bce"),
        "sub with a change of direction": claiming(sub="alice\u202e"),
        "sub with a line separator": claiming(sub="alice\u2028"),
        "sub with an unpaired surrogate": claiming(sub="alice\ud800"),
        "sub of 256 characters": claiming(sub="x" * 256),
        "sub a number": claiming(sub=42),
        "sub true": claiming(sub=True),
        "sub an array": claiming(sub=["alice"]),
        "sub an object": claiming(sub={"id": "alice"}),
    },
    "Token has no expiry": {
        "exp missing": without("exp"),
        "exp in capitals": token({"sub": "alice", "EXP": SOON}),
    },
    "Token claim exp is not a number": {
        "exp null": claiming(exp=None),
        "exp a string": claiming(exp=str(SOON)),
        "exp a date": claiming(exp="2099-01-01T00:00:00Z"),
        "exp true": claiming(exp=True),
        "exp false": claiming(exp=False),
        "exp an array": claiming(exp=[SOON]),
        "exp an object": claiming(exp={}),
        "exp beyond every float": claiming(exp=10**400),
        "exp below every float": claiming(exp=-(10**400)),
    },
    "Token claim iat is not a number": {
        "iat a string": claiming(iat=str(NOW)),
        "iat null": claiming(iat=None),
        "iat true": claiming(iat=True),
        "iat beyond every float": claiming(iat=10**400),
    },
    "Token claim nbf is not a number": {
        "nbf a string": claiming(nbf=str(NOW)),
        "nbf null": claiming(nbf=None),
        "nbf false": claiming(nbf=False),
        "nbf an array": claiming(nbf=[NOW]),
    },
    "Token is not valid yet": {
        "nbf in eleven seconds": claiming(nbf=NOW + 11),
        "nbf in a moment more than the leeway": claiming(nbf=NOW + 10.5),
        "nbf in milliseconds": claiming(nbf=NOW * 1000),
        "iat in eleven seconds": claiming(iat=NOW + 11),
        "iat in milliseconds": claiming(iat=NOW * 1000),
        "iat past but nbf to come": claiming(iat=NOW - 60, nbf=NOW + 60),
    },
    "Token is larger than 16 KiB": {
        "a character more than 16 KiB": of_length(16 * 1024 + 1),
        "an avatar in the payload": of_length(27_000),
        "a megabyte of letters": "A" * 1_000_000,
        "a megabyte of dots": "." * 1_000_000,
    },
}

ALL_REFUSED = [
    pytest.param(reason, token, id=f"{reason}: {name}")
    for reason, named in REFUSED.items()
    for name, token in named.items()
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(NOW)
    monkeypatch.setattr(tokens, "time", clock)
    return clock


@pytest.fixture
def verifier() -> Verifier:
    return Verifier([SECRET])


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every signature that was checked, in order."""
    checked: list[bytes] = []
    verify = tokens._HS256.verify

    def counting(message: bytes, key: Any, signature: bytes) -> bool:
        checked.append(signature)
        return verify(message, key, signature)

    monkeypatch.setattr(tokens._HS256, "verify", counting)
    return checked


@pytest.mark.parametrize(("reason", "refused"), ALL_REFUSED)
async def test_a_token_is_refused_for_its_reason(verifier: Verifier, reason: str, refused: str) -> None:
    for _ in range(2):
        with pytest.raises(TokenInvalid) as refusal:
            await verifier.verify(refused)

        assert type(refusal.value) is TokenInvalid
        assert str(refusal.value) == reason


@pytest.mark.parametrize("reason", REFUSED)
def test_a_reason_may_stand_in_a_challenge(reason: str) -> None:
    assert re.fullmatch(CHALLENGE_PATTERN, InvalidToken(reason).headers["WWW-Authenticate"])  # type: ignore[index] # it has some


@pytest.mark.parametrize(("reason", "refused"), ALL_REFUSED)
async def test_a_refusal_never_contains_the_token(verifier: Verifier, reason: str, refused: str) -> None:
    with pytest.raises(TokenInvalid) as refusal:
        await verifier.verify(refused)

    told = "".join(traceback.format_exception(refusal.value))
    for secret in (*refused.split("."), "alice", "@example.com", SECRET):
        assert len(secret) < 5 or secret not in told


@pytest.mark.parametrize(
    "accepted",
    [
        pytest.param(GOOD, id="sub and exp, typ JWT"),
        pytest.param(token(header={"alg": "HS256"}), id="typ absent"),
        pytest.param(headed(typ="jwt"), id="typ jwt"),
        pytest.param(headed(typ="Jwt"), id="typ Jwt"),
        pytest.param(headed(typ="at+jwt"), id="typ at+jwt"),
        pytest.param(headed(typ="AT+JWT"), id="typ AT+JWT"),
        pytest.param(headed(typ="application/at+jwt"), id="typ application/at+jwt"),
        pytest.param(headed(typ="Application/AT+JWT"), id="typ Application/AT+JWT"),
        pytest.param(headed(typ="application/jwt"), id="typ application/jwt"),
        pytest.param(headed(kid="1", cty="json", x5t="x"), id="other headers"),
        pytest.param(claiming(exp=SOON + 0.5), id="exp a float"),
        pytest.param(token(b'{"sub": "alice", "exp": 1.8e300}'), id="exp after the end of the world"),
        pytest.param(claiming(iat=NOW, nbf=NOW), id="iat and nbf now"),
        pytest.param(claiming(iat=NOW + 10, nbf=NOW + 10.0), id="iat and nbf ahead by the leeway"),
        pytest.param(claiming(iat=0, nbf=-1), id="iat and nbf long ago"),
        pytest.param(claiming(iss="https://app.example.com", aud=["a", "b"], jti=None), id="iss and aud"),
        pytest.param(
            claiming(name="Alice", email="alice@example.com", roles=[{"a": {"b": None}}]), id="extra claims"
        ),
        pytest.param(token(b' { "exp" : %d , "sub" : "alic\\u0065" } ' % SOON), id="its own way with spaces"),
        pytest.param(of_length(16 * 1024), id="16 KiB"),
    ],
)
async def test_a_good_token_is_accepted(verifier: Verifier, accepted: str) -> None:
    assert (await verifier.verify(accepted)).sub == "alice"


@pytest.mark.parametrize(
    "user_id",
    [
        "x",
        "42",
        "aB3" * 10 + "xy",
        "0f8fad5b-d9cb-469f-a165-70867728950e",
        "auth0|5f7c8ec7c33c6c004bbafe82",
        "a b/c?d#e%20",
        "ü@example.com",
        "李明",
        "😀",
        "x" * 255,
        "é" * 255,
        "null",
    ],
)
async def test_the_claims_are_those_of_the_token(verifier: Verifier, user_id: str) -> None:
    assert (await verifier.verify(claiming(sub=user_id))) == Claims(user_id, SOON, by_secret=True)


async def test_a_fraction_of_a_second_counts(verifier: Verifier, clock: Clock) -> None:
    clock.now = NOW + 10

    assert (await verifier.verify(claiming(exp=NOW + 0.25))).exp == NOW + 0.25
    with pytest.raises(TokenExpired):
        await verifier.verify(claiming(exp=NOW - 0.25))


@pytest.mark.parametrize("exp", [NOW - 10, NOW - 10.0, NOW - 11, NOW - 86_400, 1, 0, -1, -1e300])
async def test_an_expired_token_says_so(verifier: Verifier, exp: float) -> None:
    with pytest.raises(TokenExpired) as refusal:
        await verifier.verify(claiming(exp=exp))

    assert str(refusal.value) == "Token has expired"


@pytest.mark.parametrize(("leeway_s", "accepted"), [(0, 0), (10, 9), (60, 59)])
async def test_a_token_outlives_its_expiry_by_the_leeway(leeway_s: int, accepted: int) -> None:
    verifier = Verifier([SECRET], leeway_s=leeway_s)

    assert await verifier.verify(claiming(exp=NOW - accepted + 1e-3))
    with pytest.raises(TokenExpired):
        await verifier.verify(claiming(exp=NOW - leeway_s))


async def test_the_leeway_is_ten_seconds(verifier: Verifier, clock: Clock) -> None:
    clock.now = SOON + 9.9
    assert await verifier.verify(GOOD)

    clock.now = SOON + 10
    with pytest.raises(TokenExpired):
        await verifier.verify(GOOD)


async def test_every_secret_is_accepted_while_they_rotate() -> None:
    before, between, after = Verifier([OLDER]), Verifier([SECRET, OLDER]), Verifier([SECRET])
    old, new = token(secret=OLDER), token(secret=SECRET)

    assert [(await between.verify(old)).sub, (await between.verify(new)).sub] == ["alice", "alice"]
    assert [(await before.verify(old)).sub, (await after.verify(new)).sub] == ["alice", "alice"]
    for verifier, refused in ((before, new), (after, old), (between, token(secret=SECRET + OLDER))):
        with pytest.raises(TokenInvalid, match=r"^Token signature is invalid$"):
            await verifier.verify(refused)


async def test_a_signature_is_checked_once(verifier: Verifier, checks: list[bytes]) -> None:
    first = await verifier.verify(GOOD)
    again = [(await verifier.verify(GOOD)) for _ in range(5)]

    assert again == [first] * 5
    assert len(checks) == 1


async def test_every_other_token_has_its_own_signature_checked(
    verifier: Verifier, checks: list[bytes]
) -> None:
    others = [claiming(sub=f"user{number}") for number in range(5)]

    assert [(await verifier.verify(other)).sub for other in others] == [
        f"user{number}" for number in range(5)
    ]
    assert checks == [signature_of(other) for other in others]


async def test_a_remembered_token_expires(verifier: Verifier, clock: Clock, checks: list[bytes]) -> None:
    await verifier.verify(GOOD)
    clock.now = SOON + 10

    for _ in range(3):
        with pytest.raises(TokenExpired, match=r"^Token has expired$"):
            await verifier.verify(GOOD)
    assert len(checks) == 1


@pytest.mark.parametrize("place", ["header", "payload", "signature"])
async def test_a_token_that_resembles_a_remembered_one_is_refused(verifier: Verifier, place: str) -> None:
    await verifier.verify(GOOD)
    header, payload, signature = GOOD.split(".")

    alike = {
        "header": f"{part({'alg': 'none'})}.{payload}.{signature}",
        "payload": f"{header}.{part(CLAIMS | {'sub': 'bob'})}.{signature}",
        "signature": f"{header}.{payload}.{part(bytes(32))}",
    }[place]
    with pytest.raises(TokenInvalid):
        await verifier.verify(alike)


async def test_no_more_tokens_are_remembered_than_allowed(checks: list[bytes]) -> None:
    verifier = Verifier([SECRET], remembered_max=3)
    seen = [claiming(sub=f"user{number}") for number in range(10)]

    for other in seen:
        await verifier.verify(other)
        assert len(verifier._remembered) <= 3
    for other in seen[-3:]:
        await verifier.verify(other)

    assert len(checks) == 10
    assert (await verifier.verify(seen[0])).sub == "user0"
    assert len(checks) == 11


async def test_verifying_a_remembered_token_evicts_no_other(checks: list[bytes]) -> None:
    verifier = Verifier([SECRET], remembered_max=2)
    alice, bob = claiming(sub="alice"), claiming(sub="bob")

    for known in (alice, bob, bob, bob, alice):
        await verifier.verify(known)

    assert len(checks) == 2


async def test_ten_thousand_tokens_are_remembered(verifier: Verifier, checks: list[bytes]) -> None:
    seen = [claiming(sub=f"user{number}") for number in range(10_001)]

    for other in seen[1:] * 2:
        await verifier.verify(other)
    assert len(checks) == 10_000
    await verifier.verify(seen[0])

    assert len(verifier._remembered) == 10_000


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([case.values[1] for case in ALL_REFUSED], id="refused"),
        pytest.param([claiming(exp=NOW - 10 - number) for number in range(50)], id="expired"),
        pytest.param([token(CLAIMS | {"n": n}, secret=OLDER) for n in range(50)], id="forged"),
    ],
)
async def test_a_refused_token_never_evicts_a_good_one(checks: list[bytes], bad: list[str]) -> None:
    verifier = Verifier([SECRET], remembered_max=1)
    await verifier.verify(GOOD)

    for other in bad:
        with pytest.raises(TokenInvalid):
            await verifier.verify(other)
    checks.clear()

    assert (await verifier.verify(GOOD)).sub == "alice"
    assert checks == []


async def test_the_token_cache_does_not_contain_the_token(verifier: Verifier) -> None:
    await verifier.verify(GOOD)

    assert len(verifier._remembered) == 1
    assert signature_of(GOOD).hex() not in repr(verifier._remembered)
    assert GOOD.rpartition(".")[2] not in repr(vars(verifier))


@pytest.fixture
def clock_of_keys(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jwks, "time", clock)
    return clock


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with running_issuer(WITHDRAWN) as issuer:
        yield issuer


@pytest.fixture
async def keys(issuer: Issuer, clock_of_keys: Clock) -> AsyncIterator[FetchedKeys]:
    keys = FetchedKeys(issuer.url)
    await keys.open()
    yield keys
    await keys.close()


def of_key(key: SigningKey) -> str:
    return key.token(exp=SOON, iat=None)


async def renew(issuer: Issuer, keys: FetchedKeys, clock: Clock, *published: SigningKey) -> None:
    issuer.publish(*published, STAYING)
    clock.now += jwks.FRESH_S + 1
    await keys.key(WITHDRAWN.kid)  # stale: this call renews in the background, and the next one awaits that
    await keys.key(STAYING.kid)


async def test_a_remembered_token_ends_with_its_key(
    issuer: Issuer, keys: FetchedKeys, clock_of_keys: Clock
) -> None:
    verifier = Verifier(keys=keys)
    await verifier.verify(of_key(WITHDRAWN))

    await renew(issuer, keys, clock_of_keys)

    for _ in range(2):
        with pytest.raises(TokenInvalid, match=r"^Token key is unknown$"):
            await verifier.verify(of_key(WITHDRAWN))
    assert verifier._remembered == {}


async def test_a_remembered_token_ends_when_its_kid_names_another_key(
    issuer: Issuer, keys: FetchedKeys, clock_of_keys: Clock
) -> None:
    verifier = Verifier(keys=keys)
    await verifier.verify(of_key(WITHDRAWN))
    successor = new_key("EdDSA", WITHDRAWN.kid)

    await renew(issuer, keys, clock_of_keys, successor)

    with pytest.raises(TokenInvalid, match=r"^Token signature is invalid$"):
        await verifier.verify(of_key(WITHDRAWN))
    assert verifier._remembered == {}
    assert (await verifier.verify(of_key(successor))).sub == "alice"


async def test_a_signature_is_checked_once_however_often_its_key_is_fetched(
    issuer: Issuer,
    keys: FetchedKeys,
    clock_of_keys: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifier = Verifier(keys=keys)
    await verifier.verify(of_key(WITHDRAWN))
    monkeypatch.setattr(jwks.Key, "verify", None)

    await renew(issuer, keys, clock_of_keys, WITHDRAWN)

    assert len(issuer.requests) == 2
    assert (await verifier.verify(of_key(WITHDRAWN))).sub == "alice"


async def test_a_remembered_token_outlives_its_issuer_by_no_more_than_its_key(
    issuer: Issuer, keys: FetchedKeys, clock_of_keys: Clock
) -> None:
    verifier = Verifier([SECRET], keys)
    remembered = [of_key(WITHDRAWN), GOOD]
    too_long = clock_of_keys.now + jwks.STALE_MAX_S
    for known in remembered:
        await verifier.verify(known)
    issuer.reply = None

    clock_of_keys.now = too_long - 1
    for known in remembered:
        assert (await verifier.verify(known)).sub == "alice"
    clock_of_keys.now = too_long

    with pytest.raises(KeysUnavailable):
        await verifier.verify(of_key(WITHDRAWN))
    assert (await verifier.verify(GOOD)).sub == "alice"


async def test_a_token_for_a_user_is_issued(verifier: Verifier, clock: Clock) -> None:
    issued = tokens.issue("alice", SECRET, 900)

    header, payload, _ = (base64.urlsafe_b64decode(part + "==") for part in issued.split("."))
    assert json.loads(header) == {"alg": "HS256", "typ": "JWT"}
    assert json.loads(payload) == {"sub": "alice", "iat": NOW, "exp": NOW + 900}
    assert (await verifier.verify(issued)) == Claims("alice", NOW + 900, by_secret=True, auth_time=NOW)
    clock.now = NOW + 910
    with pytest.raises(TokenExpired):
        await verifier.verify(issued)


@pytest.mark.parametrize("user_id", ["42", "ü@example.com", "😀" * 255])
async def test_an_issued_token_is_accepted_for_any_user(verifier: Verifier, user_id: str) -> None:
    expected = Claims(user_id, NOW + 1800, by_secret=True, auth_time=NOW)
    assert (await verifier.verify(tokens.issue(user_id, SECRET, 0.5 * 3600))) == expected


async def test_a_token_issued_with_another_secret_is_refused(verifier: Verifier) -> None:
    with pytest.raises(TokenInvalid, match=r"^Token signature is invalid$"):
        await verifier.verify(tokens.issue("alice", OLDER, 900))
