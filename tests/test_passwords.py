import asyncio
import threading
from contextlib import ExitStack

import pytest
from pwdlib.hashers.bcrypt import BcryptHasher

from auth.passwords import PER_ADDRESS_MAX, ROUNDS, THREADS, Passwords, TooManyPasswords

QUICK = 4  # bcrypt's minimum

DIFFERENT = {
    "in the 73rd byte": ("a" * 72 + "b", "a" * 72 + "c"),
    "in the last of 128 bytes": ("a" * 127 + "b", "a" * 127 + "c"),
    "after U+0000": ("correct\0horse", "correct\0donkey"),
    "in the number of U+0000": ("correct\0", "correct"),
    "in a lone surrogate": ("correct\ud800", "correct\udfff"),
    "in case": ("correct horse", "Correct horse"),
    "in being there at all": ("", "\0"),
}


class WatchedHasher(BcryptHasher):
    """Records the hashes that it checked against, and the threads."""

    def __init__(self, rounds: int = QUICK) -> None:
        super().__init__(rounds)
        self.checked: list[str] = []
        self.threads: set[str] = set()

    def verify(self, password: str | bytes, hash: str | bytes) -> bool:  # noqa: A002 - the library's name
        self.checked.append(str(hash))
        self.threads.add(threading.current_thread().name)
        return super().verify(password, hash)


@pytest.fixture
def hasher() -> WatchedHasher:
    return WatchedHasher()


@pytest.fixture
def passwords(hasher: WatchedHasher) -> Passwords:
    return Passwords(hasher)


async def test_a_password_verifies_against_its_own_hash_only(passwords: Passwords) -> None:
    password_hash = await passwords.hash("correct horse")

    assert "correct horse" not in password_hash
    assert await passwords.check("correct horse", password_hash)
    assert not await passwords.check("wrong horse", password_hash)
    assert await passwords.hash("correct horse") != password_hash


async def test_a_hash_is_bcrypt_with_the_expected_rounds() -> None:
    assert (await Passwords().hash("correct horse")).startswith(f"$2b${ROUNDS}$")


@pytest.mark.parametrize(("password", "other"), DIFFERENT.values(), ids=DIFFERENT)
async def test_passwords_that_differ_anywhere_are_different(
    passwords: Passwords, password: str, other: str
) -> None:
    password_hash = await passwords.hash(password)

    assert await passwords.check(password, password_hash)
    assert not await passwords.check(other, password_hash)


async def test_passwords_are_normalized_unicode(passwords: Passwords) -> None:
    password_hash = await passwords.hash("caf\u00e9 con leche")

    assert await passwords.check("cafe\u0301 con leche", password_hash)


async def test_a_password_of_a_megabyte_is_hashed_like_any_other(passwords: Passwords) -> None:
    assert await passwords.check("a" * 1_000_000, await passwords.hash("a" * 1_000_000))


async def test_checking_without_a_hash_costs_as_much_as_with_one(
    passwords: Passwords, hasher: WatchedHasher
) -> None:
    password_hash = await passwords.hash("correct horse")

    assert not await passwords.check("wrong horse", password_hash)
    assert not await passwords.check("wrong horse", None)

    somebodys, nobodys = hasher.checked
    assert hasher.identify(nobodys)
    assert not hasher.check_needs_rehash(nobodys)
    assert (nobodys[:7], len(nobodys)) == (somebodys[:7], len(somebodys))


async def test_hashing_runs_in_threads_and_not_on_the_event_loop(
    passwords: Passwords, hasher: WatchedHasher
) -> None:
    await asyncio.gather(*(passwords.check("correct horse", None) for _ in range(8)))

    assert len(hasher.threads) <= THREADS
    assert all(name.startswith("passwords") for name in hasher.threads)


def test_there_are_as_many_slots_as_may_run_and_wait() -> None:
    passwords = Passwords(WatchedHasher(), waiting_max=1)

    with passwords.slot("1.2.3.4"), passwords.slot("1.2.3.4"):
        with passwords.slot("1.2.3.4"), pytest.raises(TooManyPasswords), passwords.slot("1.2.3.4"):
            pass
        with passwords.slot("1.2.3.4"):  # the slot was released
            pass


def test_one_address_leaves_slots_for_others() -> None:
    passwords = Passwords(WatchedHasher(), waiting_max=100)

    with ExitStack() as held:
        for _ in range(PER_ADDRESS_MAX):
            held.enter_context(passwords.slot("1.2.3.4"))
        with pytest.raises(TooManyPasswords), passwords.slot("1.2.3.4"):
            pass
        with passwords.slot("5.6.7.8"):
            pass
    with passwords.slot("1.2.3.4"):  # the slot was released
        pass
    assert passwords._held == {}


def test_a_slot_is_released_after_an_exception() -> None:
    passwords = Passwords(WatchedHasher(), waiting_max=1 - THREADS)

    for _ in range(2):
        with pytest.raises(RuntimeError), passwords.slot("1.2.3.4"):
            raise RuntimeError

    with passwords.slot("1.2.3.4"):
        pass
