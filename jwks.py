"""The public keys of the tokens' issuer (JWK Set, RFC 7517): fetched, checked and kept; nobody waits in vain.

PyJWT's client blocks the event loop, makes known keys wait for unknown ones and forgets what it cannot renew.
"""

import asyncio
import time
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import structlog
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm
from jwt.exceptions import PyJWTError

import metrics
import strict_json
import tls

FETCH_TIMEOUT_S = 3.0
DOCUMENT_MAX_BYTES = 256 * 1024
FRESH_S = (
    300.0  # rotation publishes old and new keys together, so this only bounds how long a removed key lives
)
STALE_MAX_S = 24 * 3600.0  # how long keys serve while their issuer is away
COOL_DOWN_S = 5.0  # between fetches for unknown key ids, however many are asked for; and after a failure
RETRY_AFTER_S = 5
RSA_BITS_MIN = 2048

ALGORITHMS: dict[str, Algorithm] = {
    "EdDSA": OKPAlgorithm(),
    "Ed25519": OKPAlgorithm(),  # its name since RFC 9864
    "ES256": ECAlgorithm(ECAlgorithm.SHA256),
    "ES384": ECAlgorithm(ECAlgorithm.SHA384),
    "ES512": ECAlgorithm(ECAlgorithm.SHA512),
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "RS384": RSAAlgorithm(RSAAlgorithm.SHA384),
    "RS512": RSAAlgorithm(RSAAlgorithm.SHA512),
    "PS256": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256),
    "PS384": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA384),
    "PS512": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA512),
}
# Which algorithms a key is for follows from what it is, never from what a token says.
_OF_CURVE = {
    "Ed25519": ("EdDSA", "Ed25519"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
}
_OF_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")

log = structlog.get_logger("jwks")


class KeySetInvalid(ValueError):
    """A document is not a key set that we would trust; the message says why."""


class KeyUnknown(Exception):
    """The issuer's current keys do not include the one asked for."""


class KeysUnavailable(Exception):
    """There are no keys to ask, or none recent enough to say that one does not exist."""


@dataclass(frozen=True, slots=True)
class Key:
    """One public key and the algorithms that it may be used with."""

    value: Any
    algorithms: frozenset[str]

    def verify(self, algorithm: str, message: bytes, signature: bytes) -> bool:
        return algorithm in self.algorithms and ALGORITHMS[algorithm].verify(message, self.value, signature)


def read_keys(document: bytes) -> dict[str, Key]:
    """Return the signature keys of a JWK Set by key id, passing over what is not for us (RFC 7517, 5).

    That is a key for encryption, or of a type, curve or algorithm that we do not know.

    Raises:
        KeySetInvalid: anything else is amiss with any key, or none is left; then none of them counts.
    """
    try:
        content = strict_json.loads(document)
    except strict_json.NotStrictJson as error:
        raise KeySetInvalid(f"the document {error}") from error
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise KeySetInvalid("the document is not a key set")
    keys: dict[str, Key] = {}
    for entry in entries:
        if entry.get("use", "sig") != "sig" or entry.get("kty") not in ("OKP", "EC", "RSA", "oct"):
            continue
        if entry["kty"] == "oct" or "d" in entry:
            raise KeySetInvalid("a key is secret and has been published")
        if _is_unknown(entry.get("crv"), _OF_CURVE) or _is_unknown(entry.get("alg"), ALGORITHMS):
            continue
        kid = entry.get("kid")
        if not isinstance(kid, str) or not kid or kid in keys:
            raise KeySetInvalid("a key has no id of its own")
        keys[kid] = _read_key(entry)
    if not keys:
        raise KeySetInvalid("the document has no keys")
    return keys


def _is_unknown(name: object, known: Container[str]) -> bool:
    return isinstance(name, str) and name not in known  # what is no text is malformed, not unknown


def _read_key(entry: Mapping[str, Any]) -> Key:
    kty = entry["kty"]
    algorithms = _OF_RSA if kty == "RSA" else _OF_CURVE.get(str(entry.get("crv")), ())
    if "alg" in entry and kty != "OKP":  # EdDSA and Ed25519 are two names of one algorithm
        algorithms = tuple(name for name in algorithms if name == entry["alg"])
    if not algorithms:
        raise KeySetInvalid("a key's type, curve and algorithm do not fit together")
    try:
        value = ALGORITHMS[algorithms[0]].from_jwk(dict(entry))
    except (PyJWTError, ValueError, TypeError, KeyError) as error:
        raise KeySetInvalid("a key is malformed") from error
    if kty == "RSA" and value.key_size < RSA_BITS_MIN:
        raise KeySetInvalid(f"an RSA key has less than {RSA_BITS_MIN} bits")
    return Key(value, frozenset(algorithms))


class StaticKeys:
    """Keys that were given with the settings."""

    def __init__(self, document: bytes) -> None:
        self._keys = read_keys(document)

    async def open(self) -> None:
        """There is nothing to fetch."""

    async def close(self) -> None:
        """There is nothing to end."""

    async def key(self, kid: str) -> Key:
        if kid not in self._keys:
            raise KeyUnknown
        return self._keys[kid]


class FetchedKeys:
    """The keys at an address, renewed in the background; a known key never waits."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str, Key] = {}
        self._fetched_at = -STALE_MAX_S
        self._tried_at = -COOL_DOWN_S
        self._failed = False
        self._sought_at = -COOL_DOWN_S  # when an unknown key id last led to a fetch
        self._fetching: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    async def open(self) -> None:
        """Begin to fetch the keys, without waiting for them."""
        # No redirects: the address is a setting, and nobody else decides where keys come from.
        context = tls.with_minimum_version(httpx.create_ssl_context())
        self._client = httpx.AsyncClient(verify=context, timeout=FETCH_TIMEOUT_S, follow_redirects=False)
        self._begin_fetch()

    async def close(self) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def key(self, kid: str) -> Key:
        """Return the key *kid*.

        Raises:
            KeyUnknown: the issuer has answered within `COOL_DOWN_S` and has no such key.
            KeysUnavailable: the issuer cannot be asked.
        """
        if self._knows(kid):
            if time.monotonic() - self._fetched_at > FRESH_S:
                self._begin_fetch()
            return self._keys[kid]
        for _ in range(2):  # a fetch that was under way may have begun before the key was made
            if fetching := self._begin_fetch(seeking=True):
                await asyncio.shield(fetching)  # one fetch for all who wait, whoever of them hangs up
            if self._knows(kid):
                return self._keys[kid]
        raise KeysUnavailable if self._failed else KeyUnknown

    def _knows(self, kid: str) -> bool:
        return kid in self._keys and time.monotonic() - self._fetched_at < STALE_MAX_S

    def _begin_fetch(self, *, seeking: bool = False) -> "asyncio.Task[None] | None":
        """Return the fetch that is under way, or begin one; None if that has to wait.

        After a failure everybody waits, otherwise only who is *seeking* an unknown key, and only for the last
        who was: what is fetched at start or renewed in time delays nobody.
        """
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        now = time.monotonic()
        if self._failed and now - self._tried_at < COOL_DOWN_S:
            return None
        if seeking and now - self._sought_at < COOL_DOWN_S:
            return None
        self._tried_at = now
        self._sought_at = now if seeking else self._sought_at
        self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                keys = read_keys(await self._download())
        except (httpx.HTTPError, httpx.InvalidURL, KeySetInvalid, TimeoutError, OSError) as error:
            self._failed = True
            metrics.keys_fetched(ok=False)
            log.warning("keys cannot be fetched", url=self._url, reason=str(error) or type(error).__name__)
            return
        if keys.keys() != self._keys.keys():
            log.info("keys fetched", url=self._url, kids=sorted(keys))
        self._keys, self._failed, self._fetched_at = keys, False, time.monotonic()
        metrics.keys_fetched(ok=True)

    async def _download(self) -> bytes:
        assert self._client is not None, "open() comes first"  # noqa: S101 - for the type checker
        async with self._client.stream("GET", self._url, headers={"Accept": "application/json"}) as answer:
            if answer.status_code != 200:
                raise KeySetInvalid(f"the issuer answered {answer.status_code}")
            chunks, size = [], 0
            async for chunk in answer.aiter_bytes():
                size += len(chunk)
                if size > DOCUMENT_MAX_BYTES:
                    raise KeySetInvalid(f"the document is larger than {DOCUMENT_MAX_BYTES // 1024} KiB")
                chunks.append(chunk)
        return b"".join(chunks)
