"""Expiring counters for limits: in memory, or in a Redis that processes on several machines share."""

import asyncio
import mmap
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from hashlib import blake2b
from typing import IO, TypeVar

import structlog
from limits.aio.storage import RedisStorage, Storage

import tls

KEYS_MAX = 100_000  # over 99.9 % of so many have an entry of their own
TIMEOUT_S = 0.25  # for a call of Redis, which usually takes less than a millisecond
RETRY_S = 2.0  # after a failed call, until Redis is tried again
CONNECTIONS_MAX = 32
CLOCK_TOLERANCE_S = 1.0  # between workers that count in the same window
CACHED_DIGESTS_MAX = 1024  # of some 250 bytes each

_PROBES = 16  # consecutive entries at which a key may be (linear probing)
_SECRET_BYTES = 16  # at the end of the table
_ENTRIES = 2 * KEYS_MAX
_ENTRY_WORDS = 3  # a digest of the key, when the count expires, and the count
_EXPIRY, _COUNT = 1, 2
_TABLE_BYTES = 8 * _ENTRY_WORDS * _ENTRIES + _SECRET_BYTES

Answer = TypeVar("Answer")


class LocalStorage(Storage):
    """Counters in a table of fixed size in memory, which workers may share.

    They take no lock. Of counts of one key by several workers at the same moment some may be lost: 0.2 % of
    those of workers that do nothing else.
    """

    STORAGE_SCHEME = None

    def __init__(self, file: int | None = None) -> None:
        """Make a table, or share the one in the file with this descriptor, which `create_table` has made."""
        super().__init__()
        table = memoryview(mmap.mmap(-1 if file is None else file, _TABLE_BYTES))
        if file is None:
            table[-_SECRET_BYTES:] = secrets.token_bytes(_SECRET_BYTES)
        # Each word is aligned and written at once, so that no other worker reads half of one.
        self._words = table[:-_SECRET_BYTES].cast("Q")
        self._seconds = table[:-_SECRET_BYTES].cast("d")  # the same memory, for expiries
        # Keyed by a secret, so that clients cannot choose keys that collide.
        self._hash = blake2b(table[-_SECRET_BYTES:], digest_size=8)
        self._digest = lru_cache(CACHED_DIGESTS_MAX)(self._compute_digest)

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        return ()

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        return self.add(key, expiry, amount)

    def add(self, key: str, expiry: float, amount: int = 1) -> int:
        """Do what `incr` does. Not a coroutine, as nothing here waits."""
        digest = self._digest(key)
        entry = self._find(digest)
        now = time.time()
        # A later expiry is one from before the clock was set back.
        if entry is not None and now < self._seconds[entry + _EXPIRY] <= now + expiry + CLOCK_TOLERANCE_S:
            count = self._words[entry + _COUNT] + amount
            self._words[entry + _COUNT] = count
            return count
        if entry is None:
            entry = self._free(digest)
        # The count first: until the expiry is written, other workers take the entry for an expired one.
        self._words[entry + _COUNT], self._seconds[entry + _EXPIRY] = amount, now + expiry
        self._words[entry] = digest
        return amount

    async def get(self, key: str) -> int:
        entry = self._find(self._digest(key))
        if entry is None or self._seconds[entry + _EXPIRY] <= time.time():
            return 0
        return self._words[entry + _COUNT]

    async def get_expiry(self, key: str) -> float:
        entry = self._find(self._digest(key))
        return self._seconds[entry + _EXPIRY] if entry is not None else time.time()

    async def clear(self, key: str) -> None:
        entry = self._find(self._digest(key))
        if entry is not None:
            self._seconds[entry + _EXPIRY] = 0.0

    async def check(self) -> bool:
        return True

    async def reset(self) -> None:
        for entry in range(0, _ENTRY_WORDS * _ENTRIES, _ENTRY_WORDS):
            self._seconds[entry + _EXPIRY] = 0.0

    async def close(self) -> None:
        """Nothing is open."""

    def _compute_digest(self, key: str) -> int:
        hashed = self._hash.copy()
        hashed.update(key.encode(errors="replace"))
        return int.from_bytes(hashed.digest(), "big")

    def _find(self, digest: int) -> int | None:
        """Return the index of the first word of the entry with *digest*, or None."""
        entries = _entries(digest)
        if self._words[entries.start] == digest:  # nearly always
            return entries.start
        digests = self._words[entries.start : entries.stop : _ENTRY_WORDS].tolist()
        return entries[digests.index(digest)] if digest in digests else None

    def _free(self, digest: int) -> int:
        """Return an unused or expired entry or, of those that a key may have, the one that expires first."""
        entries = _entries(digest)
        expiries = self._seconds[entries.start + _EXPIRY : entries.stop : _ENTRY_WORDS].tolist()
        return entries[expiries.index(min(expiries))]


def _entries(digest: int) -> range:
    """Return the indices of the first words of the entries that a key with *digest* may have."""
    start = digest % (_ENTRIES - _PROBES) * _ENTRY_WORDS
    return range(start, start + _PROBES * _ENTRY_WORDS, _ENTRY_WORDS)


def create_table() -> IO[bytes]:
    """Return an unnamed file with an empty table, for the `LocalStorage` of several workers."""
    if sys.platform == "linux":  # in memory, so that the kernel writes nothing to a disk
        file: IO[bytes] = os.fdopen(os.memfd_create("counters"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    file.truncate(_TABLE_BYTES)
    file.seek(-_SECRET_BYTES, os.SEEK_END)
    file.write(secrets.token_bytes(_SECRET_BYTES))
    file.flush()
    return file


class SharedStorage(Storage):
    """Counters in a Redis. While it fails, *local* counts, and one call per `RETRY_S` tries it again."""

    STORAGE_SCHEME = None

    def __init__(self, url: str, local: LocalStorage) -> None:
        # Only a start with a Redis pays for the import.
        from redis.asyncio import BlockingConnectionPool
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        super().__init__(url)
        of_tls = {"ssl_min_version": tls.MINIMUM_VERSION} if url.startswith("rediss:") else {}
        self._pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS_MAX,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # for a connection that was closed while idle
            **of_tls,
        )
        self._shared = RedisStorage(
            f"async+{url}",
            implementation="redispy",
            connection_pool=self._pool,  # type: ignore[arg-type] # as its documentation says
        )
        self._failures: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self._local = local
        self._ask_again_at: float | None = None  # None while it answers
        self._log = structlog.get_logger("counts")

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return self._failures

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        return await self._ask(lambda storage: storage.incr(key, expiry, amount))

    async def get(self, key: str) -> int:
        return await self._ask(lambda storage: storage.get(key))

    async def get_expiry(self, key: str) -> float:
        return await self._ask(lambda storage: storage.get_expiry(key))

    async def clear(self, key: str) -> None:
        await self._ask(lambda storage: storage.clear(key))

    async def check(self) -> bool:
        return await self._ask(lambda storage: storage.check())

    async def reset(self) -> int | None:
        return await self._ask(lambda storage: storage.reset())

    async def close(self) -> None:
        await self._pool.disconnect()

    async def _ask(self, question: Callable[[Storage], Awaitable[Answer]]) -> Answer:
        was_lost = self._ask_again_at is not None
        if self._ask_again_at is not None:
            if time.monotonic() < self._ask_again_at:
                return await question(self._local)
            self._ask_again_at = time.monotonic() + RETRY_S  # only this request tries again
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await question(self._shared)
        except self._failures as error:
            self._lose(error)
            return await question(self._local)
        if was_lost:
            self._ask_again_at = None
            self._log.info("redis is back", doing="the counts are shared again")
        return answer

    def _lose(self, error: Exception) -> None:
        if self._ask_again_at is None:
            # The error's text may contain an address, and its class is enough.
            self._log.warning(
                "redis is gone", reason=type(error).__name__, doing="each machine counts for itself"
            )
        self._ask_again_at = time.monotonic() + RETRY_S


Counters = LocalStorage | SharedStorage


def connect(url: str | None, file: int | None = None) -> Counters:
    """Return the counters in the Redis at *url* or, without one, those of `LocalStorage`."""
    local = LocalStorage(file)
    return SharedStorage(url, local) if url else local
