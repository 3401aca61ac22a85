"""Sessions of local accounts: the tokens that a sign-in yields, and how long they can be renewed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from starlette.requests import Request

from auth.passwords import Passwords, TooManyPasswords
from auth.sign_in_throttle import SignInThrottle
from database.statements import Row
from errors import Unavailable
from web.client_addresses import client_address

YEAR_9999_ENDS = 253_402_300_799  # where `datetime` ends; `exp` and JWT_EXPIRATION may lie beyond


@dataclass(frozen=True)
class LocalAccounts:
    """What sign-up and sign-in need besides the database. *issue* makes a token from an id and other claims.

    A session is all tokens from one sign-in: each carries its time, and none outlives `session_max_age_s`.
    """

    passwords: Passwords
    throttle: SignInThrottle
    issue: Callable[..., str] = field(repr=False)  # it holds the secret
    token_lifetime_s: int
    session_max_age_s: int

    @property
    def first_lifetime_s(self) -> int:
        """The lifetime of the token that a sign-in returns."""
        return min(self.token_lifetime_s, self.session_max_age_s)

    def first_token(self, account: Row) -> str:
        now, ended_at = datetime.now(UTC), account["sessions_ended_at"]
        # `ended_at` may come from a clock that is ahead of ours, and a new session must begin after it.
        began_at = max(now, ended_at + timedelta(microseconds=1)) if ended_at else now
        return self._token(account, began_at.timestamp(), self.first_lifetime_s)

    def next_token(self, caller: "Caller") -> str:
        left_s = caller.signed_in_at + self.session_max_age_s - time.time()
        return self._token(caller.account, caller.signed_in_at, min(self.token_lifetime_s, left_s))

    def _token(self, account: Row, signed_in_at: float, lifetime_s: float) -> str:
        return self.issue(
            account["id"],
            lifetime_s=lifetime_s,
            email=account["email"],
            name=account["name"],
            auth_time=signed_in_at,
        )

    def has_ended(self, account: Row, signed_in_at: float) -> bool:
        """Return whether the session that began at *signed_in_at* is too old, or was ended by the user."""
        ended_at = account["sessions_ended_at"]
        too_old = time.time() >= signed_in_at + self.session_max_age_s
        return too_old or bool(ended_at and utc_time(signed_in_at) <= ended_at)

    @contextmanager
    def slot(self, request: Request) -> Iterator[None]:
        """Hold a slot for checking the password in *request*.

        Raises:
            Unavailable: too many are waiting.
        """
        try:
            with self.passwords.slot(client_address(request.scope)):
                yield
        except TooManyPasswords as error:
            raise Unavailable from error


@dataclass(frozen=True)
class Caller:
    """The calling account and its token, which is still valid."""

    account: Row
    token: str = field(repr=False)
    signed_in_at: float
    expires_at: float


def utc_time(seconds: float) -> datetime:
    return datetime.fromtimestamp(min(max(seconds, 0), YEAR_9999_ENDS), UTC)
