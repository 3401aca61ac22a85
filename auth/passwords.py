"""Passwords of local accounts: hashed and checked by bcrypt, off the event loop and in bounded numbers."""

import asyncio
import base64
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from pwdlib.hashers.bcrypt import BcryptHasher

ROUNDS = 12  # OWASP's password storage cheat sheet asks for at least 10
THREADS = 2  # bcrypt releases the GIL, so more threads would take the cores that requests need
WAITING_MAX = 16
PER_ADDRESS_MAX = 8  # so that one address cannot make all others wait

T = TypeVar("T")


class TooManyPasswords(Exception):
    """Too many passwords are waiting, in all or from one address; one more would wait too long."""


class Passwords:
    """Hashes and checks passwords. Callers take a slot first."""

    def __init__(self, hasher: BcryptHasher | None = None, *, waiting_max: int = WAITING_MAX) -> None:
        self._hasher = hasher or BcryptHasher(ROUNDS)
        # Matches no password and is as slow to check as any hash: 22 characters of salt, 31 of digest.
        self._dummy_hash = f"$2b${self._hasher.rounds:02}${'.' * (22 + 31)}"
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="passwords")
        self._slots = THREADS + waiting_max
        self._held: Counter[str] = Counter()

    @contextmanager
    def slot(self, address: str) -> Iterator[None]:
        """Hold one of the slots for running and waiting checks, for a client at *address*.

        Raises:
            TooManyPasswords: there is none left, or none for this address.
        """
        if not self._slots or self._held[address] >= PER_ADDRESS_MAX:
            raise TooManyPasswords
        self._slots -= 1
        self._held[address] += 1
        try:
            yield
        finally:
            self._slots += 1
            self._held[address] -= 1
            self._held += Counter()  # drops zero counts

    async def hash(self, password: str) -> str:
        return await self._run(lambda: self._hasher.hash(_prepared(password)))

    async def check(self, password: str, password_hash: str | None) -> bool:
        """Return whether *password* matches *password_hash*; without a hash, False after the same time."""
        against = password_hash or self._dummy_hash
        return await self._run(lambda: self._hasher.verify(_prepared(password), against))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _prepared(password: str) -> bytes:
    """Return 64 bytes of ASCII for a password of any length.

    bcrypt reads 72 bytes and, in some versions, none after U+0000. A digest depends on every byte, and its
    base64 has no zero byte. As in Better Auth, NFKC makes an é the same from every keyboard.
    """
    text = unicodedata.normalize("NFKC", password)
    return base64.b64encode(hashlib.sha384(text.encode(errors="surrogatepass")).digest())
