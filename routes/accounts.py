"""/api/auth: accounts that this service keeps itself, in the shapes of Better Auth.

A front end that is written for Better Auth works with them, and needs no change when the accounts move to a
real Better Auth server.
"""

import hashlib
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from auth.local_accounts import Caller, LocalAccounts, utc_time
from auth.problem_formats import (
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
from auth.sign_in_throttle import TooManyAttempts
from database.statements import Row
from errors import (
    ContentTooLarge,
    QuotaExceeded,
    RequestTimeout,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
    responses,
)
from middleware.auth import bearer_token, refusal, verify
from models import is_email
from observability import metrics
from observability.logs import BoundedLog
from queries import accounts
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
from services import services_of
from web.answers import JSONAnswer
from web.client_addresses import client_address
from web.direct_route import BODY_PROBLEMS, DirectRoute, read_body
from web.request_state import request_id

PASSWORD_MIN, PASSWORD_MAX = 8, 128
TOKEN_PATH = "/auth/token"  # noqa: S105 - an address

_log = BoundedLog("security")


class BetterAuthRoute(DirectRoute):
    def get_route_handler(self) -> Handler:
        return extending(super().get_route_handler(), better_auth_members)


class OAuthRoute(DirectRoute):
    def get_route_handler(self) -> Handler:
        return extending(super().get_route_handler(), oauth_members)


async def _local_accounts(request: Request) -> LocalAccounts:
    found = services_of(request).local_accounts
    assert found is not None  # noqa: S101 - without them these routes are not mounted
    return found


async def _caller(request: Request) -> Caller:
    """Return the calling account and its token.

    Raises:
        Unauthorized: the token is missing, not acceptable or an issuer's, or its account does not exist (any
            more), or its session has ended.
        Unavailable: the issuer's keys or the database cannot be reached.
    """
    token = bearer_token(request)
    claims = await verify(request, token)
    if not claims.by_secret:  # an issuer's short-lived token must not become a long-lived one of ours
        raise refusal(request, "Token issuer is not accepted")
    account = await accounts.account_of_id(services_of(request).database, claims.sub)
    if account is None:
        raise refusal(request, "Token belongs to no account")
    if claims.auth_time is None:
        raise refusal(request, "Token does not say when its user signed in")
    local = await _local_accounts(request)
    if local.has_ended(account, claims.auth_time):
        raise refusal(request, "Session has ended: sign in again")
    return Caller(account, token, claims.auth_time, claims.exp)


async def _caller_if_any(request: Request) -> Caller | None:
    try:
        return await _caller(request)
    except Unauthorized:
        return None


async def _form(request: Request) -> dict[str, str]:
    """Return a form's parameters: empty ones are left out, repeated ones refused (RFC 6749, section 3.2)."""
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


LocalAccountsDep = Annotated[LocalAccounts, Depends(_local_accounts)]
CallerDep = Annotated[Caller, Depends(_caller)]
CallerIfAnyDep = Annotated[Caller | None, Depends(_caller_if_any)]

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
async def sign_up(local: LocalAccountsDep, request: Request, body: SignUp) -> Response:
    """Make an account and answer with a token of it. The `id` is the `user_id` of your tasks."""
    await services_of(request).rate_limits.count_address(request.scope)
    if not is_email(body.email):
        raise MalformedEmail
    if _length(body.password) < PASSWORD_MIN:
        raise PasswordTooShort
    if _length(body.password) > PASSWORD_MAX:
        raise PasswordTooLong
    with local.slot(request):
        password_hash = await local.passwords.hash(body.password)
    account = await accounts.create_account(
        services_of(request).database,
        name=body.name,
        email=body.email,
        image=body.image,
        password_hash=password_hash,
    )
    if account is None:
        raise UserAlreadyExists
    return _with_session(SignedUp(token=local.first_token(account), user=_user(account)))


@router.post(
    "/sign-in/email",
    response_model=SignedIn,
    responses=responses(InvalidEmail, InvalidEmailOrPassword, TooManyRequests, Unprocessable, *BODY_PROBLEMS),
)
async def sign_in(local: LocalAccountsDep, request: Request, body: SignIn) -> Response:
    """Answer with a token of the account that has this e-mail and this password."""
    account = await _sign_in(local, request, body.email, body.password)
    return _with_session(SignedIn(token=local.first_token(account), user=_user(account)))


@router.get("/token", response_model=Token, responses=responses(Unauthorized), openapi_extra=BY_TOKEN)
async def get_token(local: LocalAccountsDep, caller: CallerDep) -> Response:
    """Exchange a token that is still good for a fresh one of the same session."""
    return _json(Token(token=local.next_token(caller)))


@router.get("/get-session", response_model=CurrentSession | None, openapi_extra=BY_TOKEN_IF_ANY)
async def get_session(local: LocalAccountsDep, caller: CallerIfAnyDep, request: Request) -> Response:
    """Say whose token this is; `null` without one that is still good."""
    if caller is None:
        return _json(None)
    session = CurrentSession(session=_session(request, caller), user=_user(caller.account))
    return _json(session, {"set-auth-jwt": local.next_token(caller)})


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
    local: LocalAccountsDep, form: Annotated[dict[str, str], Depends(_form)], request: Request
) -> Response:
    """Answer as OAuth's password grant does (RFC 6749, section 4.3): what the Authorize button asks for."""
    if form.get("grant_type", "password") != "password":
        raise UnsupportedGrantType
    if not {"grant_type", "username", "password"} <= form.keys():
        raise InvalidRequest
    try:
        account = await _sign_in(local, request, form["username"], form["password"])
    except BetterAuthProblem as error:
        raise InvalidGrant from error
    token = AccessToken(access_token=local.first_token(account), expires_in=local.first_lifetime_s)
    return _json(token, {"Pragma": "no-cache"})  # RFC 6749, section 5.1


async def _sign_in(local: LocalAccounts, request: Request, email: str, password: str) -> Row:
    await services_of(request).rate_limits.count_address(request.scope)
    if not is_email(email):
        raise InvalidEmail
    if _length(password) > PASSWORD_MAX:
        raise PasswordTooLong
    about = (email.lower(), client_address(request.scope))
    account = await accounts.account_of_email(services_of(request).database, email)
    try:
        # Counted within the slot: bcrypt slows every counted attempt down, which bounds the counters too.
        with local.slot(request):
            await local.throttle.count(*about)
            is_right = await local.passwords.check(password, account["password_hash"] if account else None)
    except TooManyAttempts as error:
        _log_failure(request, "too many attempts")
        raise TooManyRequests(retry_after_s=error.retry_after_s) from error
    if account is None or not is_right:
        _log_failure(request, "wrong password" if account else "unknown e-mail")
        raise InvalidEmailOrPassword
    await local.throttle.forget(*about)
    return account


async def _end_sessions(request: Request, caller: Caller) -> None:
    # The caller's session may have begun by a clock that is ahead of this one.
    until = max(datetime.now(UTC), utc_time(caller.signed_in_at))
    await accounts.end_sessions(services_of(request).database, caller.account["id"], until)


def _length(password: str) -> int:
    """Return the length as JavaScript, and so Better Auth, counts it."""
    return len(password.encode("utf-16-le", errors="surrogatepass")) // 2


def _log_failure(request: Request, reason: str) -> None:
    metrics.sign_in_failed(reason)
    _log.warning("failed sign-in", reason=reason, request_id=request_id(request.scope))


def _user(account: Row) -> AccountOut:
    return AccountOut.model_validate(account)


def _session(request: Request, caller: Caller) -> SessionOut:
    """Return the session that *caller*'s token stands for; the database has none."""
    created_at = utc_time(caller.signed_in_at)
    return SessionOut(
        id=hashlib.sha256(caller.token.encode()).hexdigest()[:32],
        user_id=caller.account["id"],
        token=caller.token,
        expires_at=utc_time(caller.expires_at),
        created_at=created_at,
        updated_at=created_at,
        ip_address=request.client.host if request.client else "",
        user_agent=request.headers.get("user-agent", ""),
    )


def _with_session(answer: SignedUp) -> Response:
    return _json(answer, {"set-auth-token": answer.token})


def _json(answer: BaseModel | None, headers: dict[str, str] | None = None) -> Response:
    content = answer.model_dump_json(by_alias=True) if answer else "null"
    return JSONAnswer(content.encode(), 200, headers)
