"""Every problem that the API can answer with, as RFC 9457, and the handlers that render them."""

import random
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, TypedDict

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

MEDIA_TYPE = "application/problem+json"
# The names of RFC 9110, which Python's table knows only from 3.13 on.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
NOTHING_HERE = "There is nothing at this address"
SENTENCES_MAX = 10
ERRORS_MAX = 100  # 100 operations with ten mistakes each would be an answer larger than its request
_ids = random.Random()  # noqa: S311 - no secret, and a third of the time
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._~+/=:-]{1,128}")


class FieldError(TypedDict, total=False):
    """One mistake: `pointer` (RFC 6901) into the body, or the name of a `parameter`."""

    pointer: str
    parameter: str
    detail: str


class Problem(HTTPException):
    """An answer that is not a success. `detail` is one string, fit to show a person."""

    status = 500
    sentence = "Something went wrong on our side. Please try again."

    def __init__(
        self,
        detail: str | None = None,
        *,
        errors: Iterable[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(self.status, detail or self.sentence, headers)
        self.errors = list(errors)
        self.extensions = self.members() | members

    @classmethod
    def members(cls) -> dict[str, Any]:
        """Return the members of this kind beyond the standard's (RFC 9457, section 3.2)."""
        return {}


class InternalError(Problem):
    """A bug: its cause is in the log, under the request's id."""


class Unauthorized(Problem):
    status = 401
    sentence = "Not authenticated"

    def __init__(self, detail: str | None = None, *, challenge: str = "Bearer") -> None:
        super().__init__(detail, headers={"WWW-Authenticate": challenge})


class InvalidToken(Unauthorized):
    """A token was sent and is refused; *detail* has neither quotes nor characters beyond ASCII."""

    def __init__(self, detail: str) -> None:
        # RFC 6750, section 3.1
        super().__init__(detail, challenge=f'Bearer error="invalid_token", error_description="{detail}"')


class Forbidden(Problem):
    status = 403
    sentence = "Access denied"


class NotFound(Problem):
    status = 404
    sentence = "Task not found"


class Conflict(Problem):
    """What is asked for cannot be done now."""

    status = 409
    sentence = "There would be more tasks than you may have"


class PreconditionFailed(Problem):
    status = 412
    sentence = "The task has changed since you read it"


class RequestTimeout(Problem):
    status = 408
    sentence = "The request body did not arrive in time"


class ContentTooLarge(Problem):
    status = 413
    sentence = "The request body is too large"


class UnsupportedMediaType(Problem):
    status = 415
    sentence = "The request body must be JSON: send Content-Type: application/json"


class Unprocessable(Problem):
    """Mistakes in what was sent, each named."""

    status = 422

    def __init__(self, errors: list[FieldError], **members: Any) -> None:
        sentences = [f"{_name(error)}: {error['detail']}" for error in errors[:SENTENCES_MAX]]
        if len(errors) > SENTENCES_MAX:
            sentences.append(f"and {len(errors) - SENTENCES_MAX} more")
        super().__init__("; ".join(sentences), errors=errors[:ERRORS_MAX], **members)


class TooManyRequests(Problem):
    status = 429
    sentence = "Too many requests. Please try again later."

    def __init__(self, detail: str | None = None, *, retry_after_s: int, **members: Any) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)}, **members)


class QuotaExceeded(TooManyRequests):
    """More requests than a policy admits (draft-ietf-httpapi-ratelimit-headers-10, section 4)."""

    def __init__(self, policy: str, *, retry_after_s: int) -> None:
        super().__init__(None, retry_after_s=retry_after_s, **{"violated-policies": [policy]})

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"type": "https://iana.org/assignments/http-problem-types#quota-exceeded"}


class Unavailable(Problem):
    """The database or the issuer cannot be reached; the request may succeed in *retry_after_s* seconds.

    `lost` tells that a connection broke in the middle of a statement: nobody knows whether it was done.
    """

    status = 503
    sentence = "The service is temporarily unavailable. Please try again."
    lost = False

    def __init__(self, detail: str | None = None, *, retry_after_s: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})


class Overloaded(Unavailable):
    """More is asked for than can be done in time."""

    sentence = "The service is busy. Please try again."


class NotMigrated(Unavailable):
    """The database lacks tables or columns of ours, until somebody migrates it."""


def request_id(scope: Scope) -> str:
    """Return the id of this request: the client's `X-Request-ID` if it is a plain one, else a new one."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        is_plain = _REQUEST_ID.fullmatch(sent)
        state["request_id"] = sent.decode() if is_plain else f"{_ids.getrandbits(128):032x}"
    return str(state["request_id"])


def render(scope: Scope, error: HTTPException) -> Response:
    """Return *error* as `application/problem+json`."""
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": title(error.status_code),
        "status": error.status_code,
        "detail": _sentence(error),
        "instance": request_id(scope),
    }
    if errors := getattr(error, "errors", None):
        problem["errors"] = errors
    problem |= getattr(error, "extensions", {})
    if isinstance(error, Overloaded):
        scope["state"]["overloaded"] = True  # protocol.py lets such a connection rest
    return Response(orjson.dumps(problem), error.status_code, dict(error.headers or {}), MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Let *app* answer every error, its own and the framework's, through `render`."""

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 405:
            error.headers = {"Allow": ", ".join(_allowed(app, request.scope["path"]))}
        return render(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return render(request.scope, unprocessable(error))


def unprocessable(error: RequestValidationError) -> Unprocessable:
    """Return the problem that names each of the framework's mistakes."""
    return Unprocessable([_field_error(mistake) for mistake in error.errors()])


def invalid_parameter(name: str, detail: str) -> Unprocessable:
    """Return the refusal of one header or parameter of the query."""
    return Unprocessable([{"parameter": name, "detail": detail}])


def responses(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """Return the entries of an OpenAPI operation for *problems*; `openapi.install` adds the schema."""
    return {
        problem.status: {
            "description": title(problem.status),
            "content": {
                MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": _example(problem)}
            },
        }
        for problem in problems
    }


def _example(problem: type[Problem]) -> dict[str, Any]:
    example: dict[str, Any] = {
        "type": "about:blank",
        "title": title(problem.status),
        "status": problem.status,
        "detail": problem.sentence,
        "instance": "4c0b5e0d6d3f4f0e9a4a3ce2b6c1a7d8",
        **problem.members(),
    }
    if problem is Unprocessable:
        mistake = "must be 1 to 200 characters"
        example |= {"detail": f"title: {mistake}", "errors": [{"pointer": "/title", "detail": mistake}]}
    if problem is PreconditionFailed:
        example["etag"] = '"3"'
    return example


PROBLEM_SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "An error, as RFC 9457. `detail` is one sentence that can be shown to a person.",
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string", "description": "The request's id, as in `X-Request-ID`."},
        "errors": {
            "type": "array",
            "description": "Each mistake: `pointer` into the body, or the name of a `parameter`.",
            "items": {
                "type": "object",
                "required": ["detail"],
                "oneOf": [{"required": ["pointer"]}, {"required": ["parameter"]}],
                "properties": {
                    "pointer": {"type": "string"},
                    "parameter": {"type": "string"},
                    "detail": {"type": "string"},
                },
            },
        },
        "etag": {"type": "string", "description": "With 412: the task's `ETag` now."},
        "index": {
            "type": "integer",
            "minimum": 0,
            "description": "Which of several operations could not be done, so that none was.",
        },
    },
}


def _allowed(app: FastAPI, path: str) -> list[str]:
    """Return the methods that *path* has; the framework names those of the first route only."""
    routes = [route for route in iter_route_contexts(app.routes) if isinstance(route.original_route, Route)]
    methods = {method for route in routes if route.path_regex.match(path) for method in route.methods or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))


def title(status: int) -> str:
    """Return the name of *status*, the same with every Python."""
    return _TITLES.get(status) or HTTPStatus(status).phrase


def _sentence(error: HTTPException) -> str:
    if isinstance(error, Problem) or error.detail != HTTPStatus(error.status_code).phrase:
        return error.detail
    return {
        404: NOTHING_HERE,
        405: "This method is not allowed at this address",
    }.get(error.status_code, error.detail)


def _field_error(mistake: Mapping[str, Any]) -> FieldError:
    place, *path = mistake["loc"]
    detail = _clause(mistake)
    if place != "body":
        return {"parameter": str(path[0]) if path else str(place), "detail": detail}
    # In angle brackets stands which of several models it is, which is no member of the body.
    members = (str(part) for part in path if not str(part).startswith("<"))
    escaped = (part.replace("~", "~0").replace("/", "~1") for part in members)
    return {"pointer": "".join(f"/{part}" for part in escaped), "detail": detail}


def _name(error: FieldError) -> str:
    if "parameter" in error:
        return error["parameter"] or "query"  # `?=x` has a parameter without a name
    return error["pointer"].lstrip("/") or "body"


def _clause(mistake: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, in words that name nothing of ours and repeat no input."""
    ctx = mistake.get("ctx", {})
    if mistake["type"].endswith("_type") and mistake.get("input") is None:
        return "must not be null"
    match mistake["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return "is not a parameter of this operation"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type" | "string_unicode":
            return "must be text"
        case "int_type" | "int_parsing" | "int_parsing_size" | "int_from_float":
            return "must be a whole number"
        case "greater_than_equal":
            return f"must be at least {ctx['ge']}"
        case "less_than_equal":
            return f"must be at most {ctx['le']}"
        case "literal_error":
            return f"must be {ctx['expected']}"
        case "list_type" | "tuple_type":
            return "must be a list"
        case "too_short":
            return f"must have at least {ctx['min_length']} element"
        case "too_long":
            return f"must have at most {ctx['max_length']} elements"
        case "model_type" | "model_attributes_type" | "dict_type":
            return "must be a JSON object"
        case _:
            return str(mistake["msg"])
