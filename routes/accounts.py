"""/api/auth: accounts that this service keeps itself, in the shapes of Better Auth.

A front end that is written for Better Auth signs people up and in here, and finds nothing changed when the
accounts move to a real one.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

import accounts
import metrics
from attempts import Attempts, TooManyAttempts
from db import Row
from errors import (
    ContentTooLarge,
    QuotaExceeded,
    RequestTimeout,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    request_id,
    responses,
)
from logs import BoundedLog
from middleware.auth import bearer_token, refusal, verify
from middleware.dialects import (
    FORM,
    BetterAuthProblem,
    Handler,
    InvalidEmail,
    InvalidEmailOrPassword,
    InvalidGrant,
    InvalidRequest,
    MalformedEmail,
    NotAForm,
    PasswordTooLong,
    PasswordTooShort,
    UnsupportedGrantType,
    UserAlreadyExists,
    better_auth_members,
    extending,
    oauth_members,
)
from middleware.direct_route import DirectRoute, read_body
from middleware.rate_limit import client_address
from models import is_email
from passwords import Passwords, TooManyPasswords
from schemas import (
    AccessToken,
    AccountOut,
    CurrentSession,
    SessionOut,
    SessionsRevoked,
    SignedIn,
    SignedOut,
    SignedUp,
    SignIn,
    SignUp,
    Token,
)

PASSWORD_MIN, PASSWORD_MAX = 8, 128
TOKEN_PATH = "/auth/token"  # noqa: S105 - an address
YEAR_9999_ENDS = 253_402_300_799  # nothing keeps `exp` and JWT_EXPIRATION from going beyond

_log = BoundedLog("security")


class BetterAuthRoute(DirectRoute):
    def get_route_handler(self) -> Handler:
        return extending(super().get_route_handler(), better_auth_members)


class OAuthRoute(DirectRoute):
    def get_route_handler(self) -> Handler:
        return extending(super().get_route_handler(), oauth_members)


@dataclass(frozen=True)
class AccountKeeper:
    """What signing up and in needs beside the database; *issue* makes a token of an id and further claims.

    A session is all tokens that come from one sign-in: each carries its time, and none outlives its end.
    """

    passwords: Passwords
    attempts: Attempts
    issue: Callable[..., str] = field(repr=False)  # it holds the secret
    token_lifetime_s: int
    session_max_age_s: int

    @property
    def first_lifetime_s(self) -> int:
        """How long the token lives that answers a sign-in."""
        return min(self.token_lifetime_s, self.session_max_age_s)

    def first_token(self, account: Row) -> str:
        now, ended_at = datetime.now(UTC), account["sessions_ended_at"]
        # Another process's clock may be ahead: what begins after an end must also look so.
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
        return too_old or bool(ended_at and _time(signed_in_at) <= ended_at)

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
    """Who is calling: an account, by a token that is still good."""

    account: Row
    token: str = field(repr=False)
    signed_in_at: float
    expires_at: float


async def _keeper(request: Request) -> AccountKeeper:
    keeper: AccountKeeper = request.app.state.account_keeper
    return keeper


async def _caller(request: Request) -> Caller:
    """Return who is calling.

    Raises:
        Unauthorized: there is no acceptable token, or it is an issuer's, or of no account (any more), or of a
            session that has ended.
        Unavailable: the issuer's keys or the database cannot be reached.
    """
    token = bearer_token(request)
    claims = await verify(request, token)
    if not claims.by_secret:  # an issuer's short-lived token is not to become a long one of ours
        raise refusal(request, "Token issuer is not accepted")
    account = await accounts.account_of_id(request.app.state.database, claims.sub)
    if account is None:
        raise refusal(request, "Token belongs to no account")
    if claims.auth_time is None:
        raise refusal(request, "Token does not say when its user signed in")
    keeper = await _keeper(request)
    if keeper.has_ended(account, claims.auth_time):
        raise refusal(request, "Session has ended: sign in again")
    return Caller(account, token, claims.auth_time, claims.exp)


async def _caller_if_any(request: Request) -> Caller | None:
    try:
        return await _caller(request)
    except Unauthorized:
        return None


async def _form(request: Request) -> dict[str, str]:
    """Return a form's parameters: no value is no parameter, and none comes twice (RFC 6749, section 3.2)."""
    body = await read_body(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != FORM:
        raise NotAForm
    try:
        parameters = parse_qsl(body.decode(), errors="strict")
    except ValueError as error:
        raise InvalidRequest from error
    if len(dict(parameters)) != len(parameters):
        raise InvalidRequest
    return dict(parameters)


KeeperDep = Annotated[AccountKeeper, Depends(_keeper)]
CallerDep = Annotated[Caller, Depends(_caller)]
CallerIfAnyDep = Annotated[Caller | None, Depends(_caller_if_any)]

BODY_PROBLEMS = (RequestTimeout, ContentTooLarge, UnsupportedMediaType)
BY_TOKEN: dict[str, Any] = {"security": [{"bearer": []}]}
BY_TOKEN_IF_ANY: dict[str, Any] = {"security": [{}, *BY_TOKEN["security"]]}
BY_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            FORM: {
                "schema": {
                    "type": "object",
                    "required": ["grant_type", "username", "password"],
                    "properties": {
                        "grant_type": {"type": "string", "enum": ["password"]},
                        "username": {"type": "string", "description": "The e-mail address."},
                        "password": {"type": "string", "format": "password"},
                    },
                }
            }
        },
    }
}

router = APIRouter(
    prefix="/auth",
    tags=["accounts"],
    route_class=BetterAuthRoute,
    responses=responses(QuotaExceeded, Unavailable),
)
token_router = APIRouter(
    tags=["accounts"], route_class=OAuthRoute, responses=responses(QuotaExceeded, Unavailable)
)


@router.post(
    "/sign-up/email",
    response_model=SignedUp,
    responses=responses(PasswordTooShort, UserAlreadyExists, *BODY_PROBLEMS),
)
async def sign_up(keeper: KeeperDep, request: Request, body: SignUp) -> Response:
    """Make an account and answer with a token of it. The `id` is the `user_id` of your tasks."""
    await request.app.state.rate_limits.count_address(request.scope)
    if not is_email(body.email):
        raise MalformedEmail
    if _length(body.password) < PASSWORD_MIN:
        raise PasswordTooShort
    if _length(body.password) > PASSWORD_MAX:
        raise PasswordTooLong
    with keeper.slot(request):
        password_hash = await keeper.passwords.hash(body.password)
    account = await accounts.create_account(
        request.app.state.database,
        name=body.name,
        email=body.email,
        image=body.image,
        password_hash=password_hash,
    )
    if account is None:
        raise UserAlreadyExists
    return _with_session(SignedUp(token=keeper.first_token(account), user=_user(account)))


@router.post(
    "/sign-in/email",
    response_model=SignedIn,
    responses=responses(InvalidEmail, InvalidEmailOrPassword, TooManyRequests, Unprocessable, *BODY_PROBLEMS),
)
async def sign_in(keeper: KeeperDep, request: Request, body: SignIn) -> Response:
    """Answer with a token of the account that has this e-mail and this password."""
    account = await _sign_in(keeper, request, body.email, body.password)
    return _with_session(SignedIn(token=keeper.first_token(account), user=_user(account)))


@router.get("/token", response_model=Token, responses=responses(Unauthorized), openapi_extra=BY_TOKEN)
async def get_token(keeper: KeeperDep, caller: CallerDep) -> Response:
    """Exchange a token that is still good for a fresh one of the same session."""
    return _json(Token(token=keeper.next_token(caller)))


@router.get("/get-session", response_model=CurrentSession | None, openapi_extra=BY_TOKEN_IF_ANY)
async def get_session(keeper: KeeperDep, caller: CallerIfAnyDep, request: Request) -> Response:
    """Say whose token this is; `null` without one that is still good."""
    if caller is None:
        return _json(None)
    session = CurrentSession(session=_session(request, caller), user=_user(caller.account))
    return _json(session, {"set-auth-jwt": keeper.next_token(caller)})


@router.post("/sign-out", response_model=SignedOut, openapi_extra=BY_TOKEN_IF_ANY)
async def sign_out(caller: CallerIfAnyDep, request: Request) -> Response:
    """End all sessions of the token's account, so that none is renewed; without a token, only answer.

    Tokens that have been issued are good for tasks until they expire.
    """
    if caller is not None:
        await _end_sessions(request, caller)
    return _json(SignedOut())


@router.post(
    "/revoke-sessions",
    response_model=SessionsRevoked,
    responses=responses(Unauthorized),
    openapi_extra=BY_TOKEN,
)
async def revoke_sessions(caller: CallerDep, request: Request) -> Response:
    """End all sessions of the account, also this one, so that none is renewed.

    Tokens that have been issued are good for tasks until they expire.
    """
    await _end_sessions(request, caller)
    return _json(SessionsRevoked())


@token_router.post(
    TOKEN_PATH,
    response_model=AccessToken,
    responses=responses(InvalidGrant, TooManyRequests, RequestTimeout, ContentTooLarge, NotAForm),
    openapi_extra=BY_FORM,
)
async def grant_token(
    keeper: KeeperDep, form: Annotated[dict[str, str], Depends(_form)], request: Request
) -> Response:
    """Answer as OAuth's password grant does (RFC 6749, section 4.3): what the Authorize button asks for."""
    if form.get("grant_type", "password") != "password":
        raise UnsupportedGrantType
    if not {"grant_type", "username", "password"} <= form.keys():
        raise InvalidRequest
    try:
        account = await _sign_in(keeper, request, form["username"], form["password"])
    except BetterAuthProblem as error:
        raise InvalidGrant from error
    token = AccessToken(access_token=keeper.first_token(account), expires_in=keeper.first_lifetime_s)
    return _json(token, {"Pragma": "no-cache"})  # RFC 6749, section 5.1


async def _sign_in(keeper: AccountKeeper, request: Request, email: str, password: str) -> Row:
    await request.app.state.rate_limits.count_address(request.scope)
    if not is_email(email):
        raise InvalidEmail
    if _length(password) > PASSWORD_MAX:
        raise PasswordTooLong
    about = (email.lower(), client_address(request.scope))
    account = await accounts.account_of_email(request.app.state.database, email)
    try:
        # Nothing is counted that bcrypt does not slow down: so the counts, too, are bounded.
        with keeper.slot(request):
            await keeper.attempts.count(*about)
            is_right = await keeper.passwords.check(password, account["password_hash"] if account else None)
    except TooManyAttempts as error:
        _log_failure(request, "too many attempts")
        raise TooManyRequests(retry_after_s=error.retry_after_s) from error
    if account is None or not is_right:
        _log_failure(request, "wrong password" if account else "unknown e-mail")
        raise InvalidEmailOrPassword
    await keeper.attempts.forget(*about)
    return account


async def _end_sessions(request: Request, caller: Caller) -> None:
    # The caller's session may have begun by a clock that is ahead of this one.
    until = max(datetime.now(UTC), _time(caller.signed_in_at))
    await accounts.end_sessions(request.app.state.database, caller.account["id"], until)


def _length(password: str) -> int:
    """Return the length as JavaScript, and so Better Auth, counts it."""
    return len(password.encode("utf-16-le", errors="surrogatepass")) // 2


def _log_failure(request: Request, reason: str) -> None:
    metrics.sign_in_failed(reason)
    _log.warning("failed sign-in", reason=reason, request_id=request_id(request.scope))


def _user(account: Row) -> AccountOut:
    return AccountOut.model_validate(account)


def _session(request: Request, caller: Caller) -> SessionOut:
    """Return the session that *caller*'s token stands for; there is none in the database."""
    created_at = _time(caller.signed_in_at)
    return SessionOut(
        id=hashlib.sha256(caller.token.encode()).hexdigest()[:32],
        user_id=caller.account["id"],
        token=caller.token,
        expires_at=_time(caller.expires_at),
        created_at=created_at,
        updated_at=created_at,
        ip_address=request.client.host if request.client else "",
        user_agent=request.headers.get("user-agent", ""),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(min(max(seconds, 0), YEAR_9999_ENDS), UTC)


def _with_session(answer: SignedUp) -> Response:
    return _json(answer, {"set-auth-token": answer.token})


def _json(answer: BaseModel | None, headers: dict[str, str] | None = None) -> Response:
    content = answer.model_dump_json(by_alias=True) if answer else "null"
    return Response(content, 200, headers, "application/json")
