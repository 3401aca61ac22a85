"""Adds to our problem details the members that Better Auth's and OAuth's clients expect."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from errors import Problem, Unauthorized, Unprocessable, UnsupportedMediaType, title
from web.problems import unprocessable

FORM = "application/x-www-form-urlencoded"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class BetterAuthProblem(Problem):
    """A problem that Better Auth has too. `message` is its wording, where that differs from `detail`."""

    code: str
    message: str | None = None

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"message": cls.message or cls.sentence, "code": cls.code}


class InvalidEmailOrPassword(BetterAuthProblem, Unauthorized):
    sentence = "Invalid email or password"
    code = "INVALID_EMAIL_OR_PASSWORD"


class InvalidEmail(BetterAuthProblem):
    status = 400
    sentence = "Invalid email"
    code = "INVALID_EMAIL"


class MalformedEmail(BetterAuthProblem):
    status = 400
    sentence = "Invalid email address"
    code = "VALIDATION_ERROR"
    message = "[body.email] Invalid email address"


class PasswordTooShort(BetterAuthProblem):
    status = 400
    sentence = "Password too short"
    code = "PASSWORD_TOO_SHORT"


class PasswordTooLong(BetterAuthProblem):
    status = 400
    sentence = "Password too long"
    code = "PASSWORD_TOO_LONG"


class UserAlreadyExists(BetterAuthProblem):
    status = 422
    sentence = "User already exists. Use another email."
    code = "USER_ALREADY_EXISTS_USE_ANOTHER_EMAIL"


class OAuthProblem(Problem):
    """An error of RFC 6749, section 5.2."""

    status = 400
    code: str

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"error": cls.code, "error_description": cls.sentence}


class InvalidGrant(OAuthProblem):
    sentence = "Invalid email or password"
    code = "invalid_grant"


class InvalidRequest(OAuthProblem):
    sentence = "The form must have grant_type, username and password, each once"
    code = "invalid_request"


class UnsupportedGrantType(OAuthProblem):
    sentence = "The grant_type must be password"
    code = "unsupported_grant_type"


class NotAForm(UnsupportedMediaType):
    sentence = f"The request body must be a form: send Content-Type: {FORM}"


def better_auth_members(problem: Problem) -> dict[str, str]:
    """Return the members that Better Auth's client passes on to the front end."""
    is_mistake = isinstance(problem, Unprocessable)
    code = "VALIDATION_ERROR" if is_mistake else title(problem.status_code).upper().replace(" ", "_")
    return {"message": problem.detail, "code": code}


def oauth_members(problem: Problem) -> dict[str, str]:
    """Return the members that RFC 6749, section 5.2, requires."""
    # `temporarily_unavailable` comes from section 4.1.2.1; the other codes have classes above.
    error = "temporarily_unavailable" if problem.status_code in (429, 503) else "invalid_request"
    return {"error": error, "error_description": problem.detail}


def extending(handle: Handler, members: Callable[[Problem], dict[str, str]]) -> Handler:
    """Return *handle* with *members* added to every problem that it raises; a problem's own members win."""

    async def handle_and_extend(request: Request) -> Response:
        try:
            return await handle(request)
        except RequestValidationError as error:
            problem = unprocessable(error)
            problem.extensions = members(problem)
            raise problem from error
        except Problem as problem:
            problem.extensions = members(problem) | problem.extensions
            raise

    return handle_and_extend
