"""Expiring counters for limits: in memory, or in a Redis that processes on several machines share."""

import asyncio
import math
import mmap
import secrets
import time
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from typing import TypeVar

import structlog
from limits.aio.storage import RedisStorage, Storage

import tls

KEYS_MAX = 100_000  # nearly all of so many have an entry of their own
TIMEOUT_S = 0.25  # for a call of Redis, which usually takes less than a millisecond
RETRY_S = 2.0  # after a failed call, until Redis is tried again
CONNECTIONS_MAX = 32

_ENTRY = Struct("=QdI")  # a digest of the key, when the count expires, the count
_CHOICES = 16  # entries that a key may have, one after the other
_SECRET_BYTES = 16  # at the end of the table
_ENTRIES = 2 * KEYS_MAX
_TABLE_BYTES = (_ENTRIES + _CHOICES) * _ENTRY.size + _SECRET_BYTES

Answer = TypeVar("Answer")


class LocalStorage(Storage):
    """Counters in a table of fixed size in memory, which workers may share.

    A count that two workers raise in the same microsecond may miss one of the two.
    """

    STORAGE_SCHEME = None

    def __init__(self, file: Path | None = None) -> None:
        """Make a table, or share the one in *file*, which `create_table` has made.

        Raises:
            OSError: *file* cannot be read and written.
        """
        super().__init__()
        if file is None:
            self._table = mmap.mmap(-1, _TABLE_BYTES)
            self._table[-_SECRET_BYTES:] = secrets.token_bytes(_SECRET_BYTES)
        else:
            with file.open("r+b") as shared:
                self._table = mmap.mmap(shared.fileno(), _TABLE_BYTES)
        # With a secret, so that nobody can choose keys which share an entry.
        self._hash = blake2b(self._table[-_SECRET_BYTES:], digest_size=8)

    @property
    def base_exceptions(self) -> tuple[type[Exception], ...]:
        return ()

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        offset, digest, expires_at, count = self._find(key)
        if not count:
            expires_at = time.time() + expiry
        count += amount
        _ENTRY.pack_into(self._table, offset, digest, expires_at, count)
        return count

    async def get(self, key: str) -> int:
        return self._find(key)[3]

    async def get_expiry(self, key: str) -> float:
        return self._find(key)[2]

    async def clear(self, key: str) -> None:
        offset, digest, *_ = self._find(key)
        _ENTRY.pack_into(self._table, offset, digest, 0.0, 0)

    async def check(self) -> bool:
        return True

    async def reset(self) -> None:
        self._table[:-_SECRET_BYTES] = bytes(_TABLE_BYTES - _SECRET_BYTES)

    async def close(self) -> None:
        """Nothing is open."""

    def _find(self, key: str) -> tuple[int, int, float, int]:
        """Return the offset of the entry of *key*, its digest, when its count expires, and the count.

        A key without an entry gets an expired one or, of those that it may have, the one that expires first.
        """
        hashed = self._hash.copy()
        hashed.update(key.encode(errors="replace"))
        digest = int.from_bytes(hashed.digest(), "big")
        start = digest % _ENTRIES * _ENTRY.size
        soonest, chosen = math.inf, start
        for offset in range(start, start + _CHOICES * _ENTRY.size, _ENTRY.size):
            found, expires_at, count = _ENTRY.unpack_from(self._table, offset)
            if found == digest:
                return offset, digest, expires_at, count if expires_at > time.time() else 0
            if expires_at < soonest:
                soonest, chosen = expires_at, offset
        return chosen, digest, 0.0, 0


def create_table(file: Path) -> None:
    """Make an empty table in *file* for the `LocalStorage` of several workers."""
    file.write_bytes(bytes(_TABLE_BYTES - _SECRET_BYTES) + secrets.token_bytes(_SECRET_BYTES))


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


def connect(url: str | None, file: Path | None = None) -> Counters:
    """Return the counters in the Redis at *url* or, without one, in the table in *file* or a new one."""
    local = LocalStorage(file)
    return SharedStorage(url, local) if url else local
