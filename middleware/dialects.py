"""Problems that other readers understand too, by the members that they look for."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError

from errors import Problem, Unprocessable, title, unprocessable

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class BetterAuthProblem(Problem):
    """A refusal that Better Auth has too; `message` is its wording where `detail` has another."""

    code: str
    message: str | None = None

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"message": cls.message or cls.sentence, "code": cls.code}


class OAuthProblem(Problem):
    """A refusal of RFC 6749, section 5.2."""

    status = 400
    code: str

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"error": cls.code, "error_description": cls.sentence}


def better_auth_members(problem: Problem) -> dict[str, str]:
    """Return what Better Auth's client hands on."""
    is_mistake = isinstance(problem, Unprocessable)
    code = "VALIDATION_ERROR" if is_mistake else title(problem.status_code).upper().replace(" ", "_")
    return {"message": problem.detail, "code": code}


def oauth_members(problem: Problem) -> dict[str, str]:
    """Return what RFC 6749, section 5.2, wants."""
    # Of the registered codes the first one asks to come back; the others are problems of their own above.
    error = "temporarily_unavailable" if problem.status_code in (429, 503) else "invalid_request"
    return {"error": error, "error_description": problem.detail}


def extending(handle: Handler, members: Callable[[Problem], dict[str, str]]) -> Handler:
    """Return *handle* with *members* in every problem that does not bring its own."""

    async def handle_and_extend(request: Request) -> Response:
        try:
            return await handle(request)
        except RequestValidationError as error:
            problem = unprocessable(error)
            problem.extensions = members(problem)
            raise problem from error
        except Problem as problem:
            problem.extensions = problem.extensions or members(problem)
            raise

    return handle_and_extend
