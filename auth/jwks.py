"""The public keys of the tokens' issuer (JWK Set, RFC 7517): fetched, checked and kept.

PyJWT's client blocks the event loop, makes known keys wait for unknown ones and forgets what it cannot renew.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from jwt.algorithms import Algorithm, ECAlgorithm, OKPAlgorithm, RSAAlgorithm, RSAPSSAlgorithm
from jwt.exceptions import PyJWTError

import tls
from observability import metrics
from web import strict_json

if TYPE_CHECKING:
    import httpx

FETCH_TIMEOUT_S = 3.0
DOCUMENT_MAX_BYTES = 256 * 1024
# An issuer publishes old and new keys together, so these times only bound how long a withdrawn key works.
FRESH_S = 300.0
# A busy service renews its keys after FRESH_S in the background. After more idle time than this a request
# waits for the renewal, since a key may have been withdrawn hours ago.
IDLE_MAX_S = 2 * FRESH_S
STALE_MAX_S = 24 * 3600.0  # how long keys are used while their issuer is unreachable
COOL_DOWN_S = 5.0  # between two fetches for unknown key ids, and after a failed fetch
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
# A key's algorithms follow from its type and curve, never from a token's header.
_OF_CURVE = {
    "Ed25519": ("EdDSA", "Ed25519"),
    "P-256": ("ES256",),
    "P-384": ("ES384",),
    "P-521": ("ES512",),
}
_OF_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")

log = structlog.get_logger("jwks")


class KeySetInvalid(ValueError):
    """A document is not a key set; the message says why."""


class KeyInvalid(ValueError):
    """An entry of a key set is not a key that we would trust; the message says why."""


class KeyUnknown(Exception):
    """The issuer's current keys do not include the one asked for."""


class KeysUnavailable(Exception):
    """The last fetch failed, and no recent key has the id asked for."""


@dataclass(frozen=True, slots=True)
class Key:
    """One public key and the algorithms that it may be used with."""

    value: Any
    algorithms: frozenset[str]

    def verify(self, algorithm: str, message: bytes, signature: bytes) -> bool:
        return algorithm in self.algorithms and ALGORITHMS[algorithm].verify(message, self.value, signature)


@dataclass(frozen=True, slots=True)
class KeySet:
    """The signature keys of a JWK Set by key id, and how often each reason led to an entry being skipped.

    A key without an id has the id "" and is the only one of its set.
    """

    keys: dict[str, Key]
    skipped: Counter[str]


def read_keys(document: bytes) -> KeySet:
    """Return the signature keys of *document*, a JWK Set.

    Keys for encryption and keys of an unknown type, curve or algorithm are left out. Invalid entries are
    skipped too (RFC 7517, section 5), and counted: a set with a mistake in it still withdraws the keys that
    it lacks.

    Raises:
        KeySetInvalid: the document is not a key set.
    """
    try:
        content = strict_json.loads(document)
    except strict_json.NotStrictJson as error:
        raise KeySetInvalid(f"the document {error}") from error
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise KeySetInvalid("the document is not a key set")
    found: list[tuple[str, Key]] = []
    skipped: Counter[str] = Counter()
    for entry in entries:
        try:
            found += _read_entry(entry)
        except KeyInvalid as error:
            skipped[str(error)] += 1
    keys: dict[str, Key] = {}
    for kid, key in found:
        if kid in keys or (not kid and len(found) > 1):
            skipped["a key has no id of its own"] += 1
        else:
            keys[kid] = key
    return KeySet(keys, skipped)


def _read_entry(entry: object) -> list[tuple[str, Key]]:
    """Return the id and the key of *entry*, or an empty list for a key that `read_keys` leaves out."""
    if not isinstance(entry, dict):
        raise KeyInvalid("a key is not an object")
    if entry.get("use", "sig") != "sig" or entry.get("kty") not in ("OKP", "EC", "RSA", "oct"):
        return []
    if entry["kty"] == "oct" or "d" in entry:
        raise KeyInvalid("a key is secret and has been published")
    if _is_unknown(entry.get("crv"), _OF_CURVE) or _is_unknown(entry.get("alg"), ALGORITHMS):
        return []
    kid = entry.get("kid", "")
    if not isinstance(kid, str):
        raise KeyInvalid("a key has an id that is not text")
    return [(kid, _read_key(entry))]


def _is_unknown(name: object, known: Container[str]) -> bool:
    return isinstance(name, str) and name not in known  # a value that is not text is malformed, not unknown


def _read_key(entry: Mapping[str, Any]) -> Key:
    kty = entry["kty"]
    algorithms = _OF_RSA if kty == "RSA" else _OF_CURVE.get(str(entry.get("crv")), ())
    if "alg" in entry and kty != "OKP":  # EdDSA and Ed25519 are two names of one algorithm
        algorithms = tuple(name for name in algorithms if name == entry["alg"])
    if not algorithms:
        raise KeyInvalid("a key's type, curve and algorithm do not fit together")
    try:
        value = ALGORITHMS[algorithms[0]].from_jwk(dict(entry))
    except (PyJWTError, ValueError, TypeError, KeyError) as error:
        raise KeyInvalid("a key is malformed") from error
    if kty == "RSA" and value.key_size < RSA_BITS_MIN:
        raise KeyInvalid(f"an RSA key has less than {RSA_BITS_MIN} bits")
    return Key(value, frozenset(algorithms))


class StaticKeys:
    """Keys from the settings. A mistake in them stops the start, so that the operator corrects it."""

    def __init__(self, document: bytes) -> None:
        found = read_keys(document)
        for reason in found.skipped:
            raise KeySetInvalid(reason)
        if not found.keys:
            raise KeySetInvalid("the document has no keys")
        self._keys = found.keys

    async def open(self) -> None:
        """There is nothing to fetch."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def key(self, kid: str) -> Key:
        if kid not in self._keys:
            raise KeyUnknown
        return self._keys[kid]


class FetchedKeys:
    """The keys at a URL, renewed in the background while requests use them.

    A known key is returned at once, unless the last fetch ended more than `IDLE_MAX_S` ago.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._found = KeySet({}, Counter())
        self._fetched_at = -STALE_MAX_S
        self._tried_at = -COOL_DOWN_S
        self._ended_at = -IDLE_MAX_S  # the last fetch, whether it succeeded or failed
        self._failed = False
        self._sought_at = -COOL_DOWN_S  # when an unknown key id last led to a fetch
        self._fetching: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    async def open(self) -> None:
        """Begin to fetch the keys, without waiting for them."""
        import httpx  # 2 MB, which only a service that fetches keys pays for

        # No redirects: only the setting decides where keys come from.
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
        """Return the key with the id *kid*; "" means the only key of a set, if that key has no id.

        Raises:
            KeyUnknown: the issuer answered within the last `COOL_DOWN_S` and has no such key.
            KeysUnavailable: the keys cannot be fetched.
        """
        if kid in self._found.keys:
            if time.monotonic() - self._fetched_at <= FRESH_S:
                return self._found.keys[kid]
            fetching = self._begin_fetch()
            if fetching and time.monotonic() - self._ended_at > IDLE_MAX_S:
                await asyncio.shield(fetching)
            if self._knows(kid):
                return self._found.keys[kid]
        for _ in range(2):  # a fetch that was under way may have begun before the key was made
            if fetching := self._begin_fetch(seeking=True):
                await asyncio.shield(fetching)  # shared: cancelling one request must not cancel it
            if self._knows(kid):
                return self._found.keys[kid]
        raise KeysUnavailable if self._failed else KeyUnknown

    def _knows(self, kid: str) -> bool:
        return kid in self._found.keys and time.monotonic() - self._fetched_at < STALE_MAX_S

    def _begin_fetch(self, *, seeking: bool = False) -> "asyncio.Task[None] | None":
        """Return the running fetch, or begin one; None while fetches are throttled.

        After a failed fetch none begins for `COOL_DOWN_S`. Otherwise only look-ups of unknown key ids,
        *seeking*, are throttled; the fetch at startup and renewals do not count.
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
        import httpx

        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                found = read_keys(await self._download())
        except (httpx.HTTPError, httpx.InvalidURL, KeySetInvalid, TimeoutError, OSError) as error:
            self._failed, self._ended_at = True, time.monotonic()
            metrics.keys_fetched(ok=False)
            log.warning("keys cannot be fetched", url=self._url, reason=str(error) or type(error).__name__)
            return
        if not found.keys:
            log.warning("issuer has no keys", url=self._url)
        elif found.keys.keys() != self._found.keys.keys():
            log.info("keys fetched", url=self._url, kids=sorted(found.keys))
        if found.skipped and found.skipped != self._found.skipped:
            log.warning("keys skipped", url=self._url, reasons=dict(found.skipped))
        self._found, self._failed = found, False
        self._fetched_at = self._ended_at = time.monotonic()
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
