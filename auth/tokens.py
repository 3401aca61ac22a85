"""Bearer tokens (JWT, RFC 7519): verified with shared secrets or an issuer's public keys, and issued."""

import base64
import hashlib
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jwt
from jwt.algorithms import HMACAlgorithm

from auth import jwks
from models import USER_ID_MAX
from web import strict_json

TOKEN_MAX_BYTES = 16 * 1024  # ample; refuses tokens with an avatar in the payload, of which one had 27 kB
# Better Auth signs other things with the same secret, so a token with another `typ` is refused. The prefix
# `application/` is optional (RFC 7515, section 4.1.9).
_TYPES = {"jwt", "at+jwt", "application/jwt", "application/at+jwt"}
ALGORITHMS = ("HS256", *jwks.ALGORITHMS)
# Headers that would let a token choose its own key or meaning.
_FORBIDDEN_HEADERS = ("crit", "b64", "jwk", "jku", "x5u", "x5c")


class TokenInvalid(Exception):
    """The token is not acceptable; the message says why and never holds the token."""


class TokenExpired(TokenInvalid):
    """The token was valid until its `exp`."""


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a verified token: `sub`, the user's id, and `exp`, seconds since 1970.

    `by_secret`: signed with one of our shared secrets (HS256), not with an issuer's key. `auth_time` is set
    only then: when the user signed in (OpenID Connect Core, section 2), or `iat` in a token without it.
    """

    sub: str
    exp: float
    by_secret: bool = False
    auth_time: float | None = None


class KeySource(Protocol):
    async def key(self, kid: str) -> jwks.Key: ...


@dataclass(frozen=True, slots=True)
class _Signer:
    """The key that signed a token: the issuer's with the id *kid*, or None for one of our secrets."""

    kid: str = ""
    key: jwks.Key | None = None


@dataclass(frozen=True)
class Expectations:
    """The issuers and the audiences of which a token must name one. Empty accepts any, and none."""

    issuers: frozenset[str] = frozenset()
    audiences: frozenset[str] = frozenset()

    def check(self, payload: dict[str, Any]) -> None:
        if self.issuers and payload.get("iss") not in self.issuers:
            raise TokenInvalid("Token issuer is not accepted")
        audience = payload.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        if self.audiences and not any(isinstance(name, str) and name in self.audiences for name in named):
            raise TokenInvalid("Token audience is not accepted")


class Verifier:
    """Verifies tokens and remembers valid ones, so that a signature is checked once.

    A remembered token stays valid only while its issuer has the key that verified it.

    A token can only choose among what is configured. HS256 needs *secrets*. The other algorithms need *keys*:
    `kid` names one, and its type decides which algorithms it may be used with. A token without `kid` needs an
    issuer whose only key has no id either (OpenID Connect Core, section 10.1).
    """

    def __init__(
        self,
        secrets: Sequence[str] = (),
        keys: KeySource | None = None,
        *,
        algorithms: Collection[str] = ALGORITHMS,
        of_secrets: Expectations = Expectations(),
        of_keys: Expectations = Expectations(),
        leeway_s: float = 10,
        remembered_max: int = 10_000,
    ) -> None:
        self._secrets = [secret.encode() for secret in secrets]
        self._keys = keys
        self._algorithms = frozenset(algorithms)
        self._of_secrets, self._of_keys = of_secrets, of_keys
        self.leeway_s = leeway_s
        self._remembered_max = remembered_max
        self._remembered: dict[bytes, tuple[Claims, _Signer]] = {}

    async def verify(self, token: str) -> Claims:
        """Return the claims of *token*, a compact JWS (RFC 7515).

        Raises:
            TokenExpired: `exp` lies more than the leeway in the past.
            TokenInvalid: any other reason.
            jwks.KeysUnavailable: the keys cannot be fetched.
        """
        if len(token) > TOKEN_MAX_BYTES:
            raise TokenInvalid(f"Token is larger than {TOKEN_MAX_BYTES // 1024} KiB")
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        remembered = self._remembered.get(digest)
        if remembered is not None and not await self._still_signs(remembered[1]):
            self._remembered.pop(digest, None)
            remembered = None
        claims, signer = remembered or await self._verify_afresh(token)
        if claims.exp <= time.time() - self.leeway_s:
            raise TokenExpired("Token has expired")
        if remembered is None:
            self._remember(digest, claims, signer)
        return claims

    async def _still_signs(self, signer: _Signer) -> bool:
        """Return whether the issuer still has this very key; a secret stays valid while the process runs."""
        if signer.key is None or self._keys is None:
            return True
        try:
            return await self._keys.key(signer.kid) == signer.key
        except jwks.KeyUnknown:
            return False

    async def _verify_afresh(self, token: str) -> tuple[Claims, _Signer]:
        try:
            header_part, payload_part, signature_part = token.split(".")
            signature = _decode(signature_part)
            header = strict_json.loads(_decode(header_part))
            payload = strict_json.loads(_decode(payload_part))
        except ValueError as error:
            raise TokenInvalid("Token is malformed") from error
        if not isinstance(header, dict) or not isinstance(payload, dict):
            raise TokenInvalid("Token is malformed")
        _check_header(header)
        signer = await self._check_signature(header, f"{header_part}.{payload_part}".encode(), signature)
        claims = self._claims(payload, by_secret=signer.key is None)
        (self._of_keys if signer.key else self._of_secrets).check(payload)
        return claims, signer

    async def _check_signature(self, header: dict[str, Any], signed: bytes, signature: bytes) -> _Signer:
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise TokenInvalid("Token algorithm is not accepted")
        if algorithm == "HS256" and self._secrets:
            if not any(_HS256.verify(signed, secret, signature) for secret in self._secrets):
                raise TokenInvalid("Token signature is invalid")
            return _Signer()
        if algorithm == "HS256" or self._keys is None:
            raise TokenInvalid("Token algorithm is not accepted")
        kid = header.get("kid", "")
        if not isinstance(kid, str):
            raise TokenInvalid("Token names no key")
        try:
            key = await self._keys.key(kid)
        except jwks.KeyUnknown as error:
            raise TokenInvalid("Token key is unknown" if kid else "Token names no key") from error
        if not key.verify(algorithm, signed, signature):
            raise TokenInvalid("Token signature is invalid")
        return _Signer(kid, key)

    def _claims(self, payload: dict[str, Any], *, by_secret: bool) -> Claims:
        if "sub" not in payload:
            raise TokenInvalid("Token has no sub claim, which must be the user's id")
        subject = payload["sub"]
        if not isinstance(subject, str) or not 0 < len(subject) <= USER_ID_MAX:
            raise TokenInvalid("Token names no user")
        if not subject.isprintable() or not subject.strip():
            raise TokenInvalid("Token names no user")
        expires = _numeric_date(payload, "exp")
        if expires is None:
            raise TokenInvalid("Token has no expiry")
        latest = time.time() + self.leeway_s
        if any((_numeric_date(payload, name) or 0) > latest for name in ("nbf", "iat")):
            raise TokenInvalid("Token is not valid yet")
        return Claims(subject, expires, by_secret, _auth_time(payload) if by_secret else None)

    def _remember(self, digest: bytes, claims: Claims, signer: _Signer) -> None:
        if len(self._remembered) >= self._remembered_max:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[digest] = claims, signer


def issue(user_id: str, secret: str, lifetime_s: float, **claims: str | float) -> str:
    """Return a token for *user_id* that is valid for *lifetime_s* seconds, with further *claims*."""
    now = int(time.time())
    return jwt.encode({**claims, "sub": user_id, "iat": now, "exp": now + int(lifetime_s)}, secret, "HS256")


_HS256 = HMACAlgorithm(HMACAlgorithm.SHA256)


def _decode(part: str) -> bytes:
    """Decode base64url without padding.

    Raises:
        ValueError: *part* is not base64url, or not its canonical spelling.
    """
    raw = base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True)
    if base64.urlsafe_b64encode(raw).rstrip(b"=") != part.encode():
        raise ValueError("is not canonical base64url")
    return raw


def _check_header(header: dict[str, Any]) -> None:
    if "typ" in header and str(header["typ"]).lower() not in _TYPES:
        raise TokenInvalid("Token is not an access token")
    if any(name in header for name in _FORBIDDEN_HEADERS):
        raise TokenInvalid("Token header is not accepted")


def _auth_time(payload: dict[str, Any]) -> float | None:
    try:
        return _numeric_date(payload, "auth_time" if "auth_time" in payload else "iat")
    except TokenInvalid:  # only renewing a token needs it
        return None


def _numeric_date(payload: dict[str, Any], name: str) -> float | None:
    value = payload.get(name)
    if value is None and name not in payload:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenInvalid(f"Token claim {name} is not a number")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not math.isfinite(seconds):
        raise TokenInvalid(f"Token claim {name} is not a number")
    return seconds
