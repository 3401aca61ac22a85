"""Authentication: verifies the bearer token and compares its user with the one in the path."""

from typing import Annotated

from fastapi import Depends, Path, Request
from fastapi.security import HTTPBearer

from auth import jwks
from auth.tokens import Claims, TokenInvalid
from errors import Forbidden, InvalidToken, Unauthorized, Unavailable
from observability import metrics
from observability.logs import BoundedLog
from queries.owner import Owner
from services import services_of
from web.request_state import header_values, request_id, state_of

_log = BoundedLog("security")


class UserAccess(HTTPBearer):
    """The dependency of every task operation, and the security scheme behind Swagger UI's Authorize button.

    It reads the header itself, because `HTTPBearer` takes the first of several Authorization headers.
    """

    async def __call__(  # type: ignore[override] # it returns the owner, not credentials
        self, request: Request, user_id: Annotated[str, Path(description="The `sub` of your token.")]
    ) -> Owner:
        """Return the verified caller as the owner of the path's tasks.

        Raises:
            Unauthorized: there is no acceptable token.
            Forbidden: the token is another user's.
            Unavailable: the issuer's keys cannot be fetched.
            QuotaExceeded: the caller has sent too many requests.
        """
        claims = await verify(request, bearer_token(request))
        if claims.sub != user_id:
            metrics.token_refused("Token is another user's")
            _log.warning(
                "access denied",
                reason="the token is another user's",
                sub=claims.sub,
                user_id=user_id,
                request_id=request_id(request.scope),
            )
            raise Forbidden
        services = services_of(request)
        purge = services.purge
        return Owner(
            user_id,
            services.database,
            services.tasks_max,
            has_trash=purge.trash_days > 0,
            on_change=services.streams.changed,
            on_delete=purge.deleters.add,
        )


async def verify(request: Request, token: str) -> Claims:
    """Return the claims of *token*, which was sent with *request*.

    Raises:
        InvalidToken: it is not acceptable.
        Unavailable: the issuer's keys cannot be fetched.
        QuotaExceeded: its user has sent too many requests.
    """
    services = services_of(request)
    try:
        claims = await services.verifier.verify(token)
    except TokenInvalid as error:
        raise refusal(request, str(error)) from error
    except jwks.KeysUnavailable as error:
        raise Unavailable(retry_after_s=jwks.RETRY_AFTER_S) from error
    state = state_of(request.scope)
    state["user_id"] = claims.sub  # for the access log
    state["expires_at"] = claims.exp + services.verifier.leeway_s
    await services.rate_limits.count_user(request.scope, claims.sub)
    return claims


def refusal(request: Request, reason: str) -> InvalidToken:
    """Count and log the refusal of the token of *request*, and return the problem to raise."""
    metrics.token_refused(reason)
    _log.warning("token refused", reason=reason, request_id=request_id(request.scope))
    return InvalidToken(reason)


def bearer_token(request: Request) -> str:
    """Return the token of the one Authorization header.

    Raises:
        Unauthorized: there is none, more than one, or another scheme.
    """
    values = header_values(request.scope, b"authorization")
    if not values:
        raise Unauthorized
    if len(values) > 1:
        raise Unauthorized("There is more than one Authorization header")
    sent: str = values[0].decode("latin-1")
    scheme, _, token = sent.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthorized("The Authorization header must be: Bearer <token>")
    return token.strip()


verify_user_access = UserAccess(
    scheme_name="bearer", bearerFormat="JWT", description="The JWT of your front end's session."
)
OwnerDep = Annotated[Owner, Depends(verify_user_access)]
