"""Every kind of token against every kind of configuration: a shared secret, an issuer's keys, or both."""

import base64
import json
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from jwt.algorithms import HMACAlgorithm

import tests.issuer
from auth import jwks, tokens
from auth.tokens import ALGORITHMS, Expectations, TokenInvalid, Verifier
from tests.conftest import SECRET, Clock
from tests.issuer import ORIGIN, SigningKey, document, new_key

KEYS = {algorithm: new_key(algorithm) for algorithm in jwks.ALGORITHMS}
ED, RSA, EC = KEYS["EdDSA"], KEYS["RS256"], KEYS["ES256"]
STRANGER = {algorithm: new_key(algorithm) for algorithm in ("EdDSA", "ES256", "RS256")}
SET = jwks.StaticKeys(document(*KEYS.values()))
OF_KEYS = Expectations(frozenset({ORIGIN, "https://other.example.com"}), frozenset({ORIGIN}))
NOW = int(time.time())

VERIFIERS = {
    "secret": Verifier([SECRET]),
    "keys": Verifier(keys=SET, of_keys=OF_KEYS),
    "both": Verifier([SECRET], SET, of_keys=OF_KEYS),
}


def part(content: object) -> str:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def shared(header: dict[str, Any] | None = None, secret: bytes = SECRET.encode(), **claims: Any) -> str:
    """Return a token signed with a shared secret; a claim set to None is omitted."""
    content = {"sub": "alice", "exp": NOW + 900} | claims
    kept = {name: value for name, value in content.items() if value is not None}
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT'} | (header or {}))}.{part(kept)}"
    hashes = {"HS384": HMACAlgorithm.SHA384, "HS512": HMACAlgorithm.SHA512}
    digest = HMACAlgorithm(hashes.get((header or {}).get("alg", ""), HMACAlgorithm.SHA256))
    return f"{signed}.{part(digest.sign(signed.encode(), secret))}"


def pem(key: SigningKey) -> bytes:
    kind, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.private.public_key().public_bytes(kind, form))


def unsigned(alg: str) -> str:
    return f"{part({'alg': alg})}.{part({'sub': 'alice', 'exp': NOW + 900, 'iss': ORIGIN, 'aud': ORIGIN})}."


def tampered(token: str) -> str:
    head, _, signature = token.split(".")
    return f"{head}.{part({'sub': 'bob', 'exp': NOW + 900, 'iss': ORIGIN, 'aud': ORIGIN})}.{signature}"


def flipped(token: str) -> str:
    return f"{token[:-8]}{'AAAAAAAA' if token[-8:] != 'AAAAAAAA' else 'BBBBBBBB'}"


# name: (token, the configurations that accept it)
GOOD: dict[str, tuple[str, set[str]]] = {
    "shared secret": (shared(), {"secret", "both"}),
    "shared secret, with iat, email and name": (shared(iat=NOW, email="a@b.example"), {"secret", "both"}),
    "shared secret, of any issuer for anyone": (shared(iss="x", aud="y"), {"secret", "both"}),
    "shared secret, typ at+jwt": (shared({"typ": "at+jwt"}), {"secret", "both"}),
    "shared secret, with a kid": (shared({"kid": ED.kid}), {"secret", "both"}),
    **{algorithm: (key.token(), {"keys", "both"}) for algorithm, key in KEYS.items()},
    "without typ, as Better Auth writes": (ED.token({"typ": None}), {"keys", "both"}),
    "typ JWT": (ED.token({"typ": "JWT"}), {"keys", "both"}),
    "typ application/at+jwt": (ED.token({"typ": "application/at+jwt"}), {"keys", "both"}),
    "typ at+jwt": (ED.token({"typ": "at+jwt"}), {"keys", "both"}),
    "of another accepted issuer": (ED.token(iss="https://other.example.com"), {"keys", "both"}),
    "for several, us among them": (ED.token(aud=["https://x.example.com", ORIGIN]), {"keys", "both"}),
    "EdDSA by its newer name": (ED.token({"alg": "Ed25519"}), {"keys", "both"}),
    "just expired, within the leeway": (ED.token(exp=NOW - 5), {"keys", "both"}),
    "issued a little ahead of our clock": (ED.token(iat=NOW + 5), {"keys", "both"}),
}

HEADERS_REFUSED: dict[str, dict[str, Any]] = {
    "crit": {"crit": ["exp"]},
    "b64": {"b64": False},
    "an embedded key": {"jwk": ED.public},
    "an address of keys": {"jku": "https://evil.example/keys"},
    "an address of a certificate": {"x5u": "https://evil.example/cert"},
    "an embedded certificate": {"x5c": ["AAAA"]},
    "typ of Better Auth's session cache": {"typ": "better-auth.session-cache+jwt"},
    "typ null": {"typ": [None]},
    "typ dpop+jwt": {"typ": "dpop+jwt"},
    "typ application/dpop+jwt": {"typ": "application/dpop+jwt"},
    "typ application": {"typ": "application/"},
    "typ of another tree": {"typ": "text/at+jwt"},
    "typ application twice": {"typ": "application/application/jwt"},
}
CLAIMS_REFUSED: dict[str, dict[str, Any]] = {
    "no sub": {"sub": None},
    "empty sub": {"sub": ""},
    "blank sub": {"sub": "  "},
    "sub with U+0000": {"sub": "a\0b"},
    "sub a number": {"sub": 7},
    "sub too long": {"sub": "a" * 256},
    "no exp": {"exp": None},
    "exp text": {"exp": str(NOW + 900)},
    "exp true": {"exp": True},
    "exp NaN": {"exp": float("nan")},
    "exp infinite": {"exp": float("inf")},
    "expired": {"exp": NOW - 11},
    "long expired": {"exp": 1},
    "not yet valid": {"nbf": NOW + 60},
    "issued in the future": {"iat": NOW + 60},
    "iat text": {"iat": "now"},
}
ONLY_KEYS_REFUSE: dict[str, str] = {
    "no kid": ED.token({"kid": None}),
    "kid a number": ED.token({"kid": 7}),
    "kid an array": ED.token({"kid": [ED.kid]}),
    "unknown kid": ED.token({"kid": "nobody"}),
    "kid of another key of its type": STRANGER["EdDSA"].token({"kid": ED.kid}),
    "kid of a key of another type": ED.token({"kid": RSA.kid}),
    "no iss": ED.token(iss=None),
    "another iss": ED.token(iss="https://evil.example.com"),
    "iss with a slash more": ED.token(iss=f"{ORIGIN}/"),
    "no aud": ED.token(aud=None),
    "another aud": ED.token(aud="https://evil.example.com"),
    "aud of none": ED.token(aud=[]),
    "aud a number": ED.token(aud=7),
}
BAD: dict[str, str] = {
    **{f"shared secret, {name}": shared(header) for name, header in HEADERS_REFUSED.items()},
    **{f"EdDSA, {name}": ED.token(header) for name, header in HEADERS_REFUSED.items()},
    **{f"shared secret, {name}": shared(**claims) for name, claims in CLAIMS_REFUSED.items()},
    **{f"EdDSA, {name}": ED.token(**claims) for name, claims in CLAIMS_REFUSED.items()},
    **{f"EdDSA, {name}": token for name, token in ONLY_KEYS_REFUSE.items()},
    **{f"{name}, of a stranger": key.token({"kid": KEYS[name].kid}) for name, key in STRANGER.items()},
    **{f"{name}, tampered with": tampered(key.token()) for name, key in KEYS.items()},
    **{f"{name}, another signature": flipped(key.token()) for name, key in KEYS.items()},
    "shared secret, another secret": shared(secret=b"another-secret-of-at-least-32-characters"),
    "shared secret, tampered with": tampered(shared()),
    "alg none": unsigned("none"),
    "alg None": unsigned("None"),
    "alg empty": unsigned(""),
    "HS384": shared({"alg": "HS384"}),
    "HS512": shared({"alg": "HS512"}),
    "HS256 signed with the public key, PEM": shared({"kid": RSA.kid}, secret=pem(RSA)),
    "HS256 signed with the public key, JWK": shared(
        {"kid": ED.kid}, secret=json.dumps(ED.public, separators=(",", ":")).encode()
    ),
    "HS256 signed with the public key's x": shared({"kid": ED.kid}, secret=ED.public["x"].encode()),
    "HS256 signed with nothing": shared(secret=b""),
    "RS256 that says PS256": RSA.token({"alg": "PS256"}),
    "ES256 that says ES384": EC.token({"alg": "ES384"}),
    "EdDSA that says RS256": ED.token({"alg": "RS256"}),
    "EdDSA that says HS256": ED.token({"alg": "HS256"}),
    "ES256K": EC.token({"alg": "ES256K"}),
    "encrypted": f"{part({'alg': 'dir', 'enc': 'A256GCM'})}..AAAA.AAAA.AAAA",
    "a session token of Better Auth": "k3yJx1v0tS0s9nq2.Qm9iIHdhcyBoZXJl",
    "the e-mail verification token of Better Auth": shared(sub=None, email="a@b.example"),
}


@pytest.fixture(autouse=True)
def _stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freeze the clock at the time for which the tokens were issued."""
    for module in (tokens, tests.issuer):
        monkeypatch.setattr(module, "time", Clock(NOW))


@pytest.mark.parametrize("configuration", VERIFIERS)
@pytest.mark.parametrize("name", GOOD)
async def test_a_token_is_accepted_where_its_key_is_configured(name: str, configuration: str) -> None:
    token, accepted_by = GOOD[name]

    if configuration in accepted_by:
        assert (await VERIFIERS[configuration].verify(token)).sub == "alice"
    else:
        with pytest.raises(TokenInvalid, match="Token algorithm is not accepted"):
            await VERIFIERS[configuration].verify(token)


@pytest.mark.parametrize("configuration", VERIFIERS)
@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused_everywhere(name: str, configuration: str) -> None:
    with pytest.raises(TokenInvalid):
        await VERIFIERS[configuration].verify(BAD[name])


async def test_an_algorithm_that_is_not_configured_is_refused() -> None:
    verifier = Verifier([SECRET], SET, algorithms={"ES256"}, of_keys=OF_KEYS)

    assert await verifier.verify(EC.token())
    for token in (shared(), ED.token(), RSA.token()):
        with pytest.raises(TokenInvalid, match="Token algorithm is not accepted"):
            await verifier.verify(token)


async def test_issuer_and_audience_of_a_shared_secret_are_checked_when_configured() -> None:
    expected = Expectations(frozenset({ORIGIN}), frozenset({"tasks"}))
    verifier = Verifier([SECRET], of_secrets=expected)

    assert await verifier.verify(shared(iss=ORIGIN, aud="tasks"))
    for token in (shared(), shared(iss=ORIGIN), shared(iss="x", aud="tasks"), shared(iss=ORIGIN, aud="x")):
        with pytest.raises(TokenInvalid):
            await verifier.verify(token)


def test_the_matrix_has_over_100_tokens_and_every_algorithm() -> None:
    assert len(GOOD) + len(BAD) > 100
    assert set(ALGORITHMS) == {"HS256", *KEYS}
