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

ROUNDS = 12  # what OWASP's password storage cheat sheet asks for at least is 10
THREADS = 2  # bcrypt lets go of the interpreter's lock; requests need a core too
WAITING_MAX = 16
PER_ADDRESS_MAX = 8  # so that one address does not keep all others waiting

T = TypeVar("T")


class TooManyPasswords(Exception):
    """So many passwords wait that one more would wait for too long."""


class Passwords:
    """Hashes and checks passwords; the callers take a slot first."""

    def __init__(self, hasher: BcryptHasher | None = None, *, waiting_max: int = WAITING_MAX) -> None:
        self._hasher = hasher or BcryptHasher(ROUNDS)
        # The hash of no password, as slow to compare with as any other: 22 characters of salt, 31 of digest.
        self._nobodys_hash = f"$2b${self._hasher.rounds:02}${'.' * (22 + 31)}"
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
            self._held += Counter()  # forgets the zeros

    async def hash(self, password: str) -> str:
        return await self._run(lambda: self._hasher.hash(_prepared(password)))

    async def check(self, password: str, password_hash: str | None) -> bool:
        """Return whether *password* is the one of *password_hash*; without one it takes as long to say no."""
        against = password_hash or self._nobodys_hash
        return await self._run(lambda: self._hasher.verify(_prepared(password), against))

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _prepared(password: str) -> bytes:
    """Return 64 characters for any password at all.

    bcrypt reads 72 bytes and, in some versions, none after U+0000. A digest depends on every byte, and its
    base64 has no zero in it. An é is the same from every keyboard (NFKC), as Better Auth has it.
    """
    text = unicodedata.normalize("NFKC", password)
    return base64.b64encode(hashlib.sha384(text.encode(errors="surrogatepass")).digest())
