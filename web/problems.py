"""Problem details (RFC 9457): turns refusals and validation errors into problems, and renders them."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

import refusals
from errors import (
    MEDIA_TYPE,
    NOTHING_HERE,
    Conflict,
    FieldError,
    Gone,
    NotFound,
    Overloaded,
    PreconditionFailed,
    Problem,
    TooManyRequests,
    Unprocessable,
    invalid_parameter,
    title,
)
from observability import metrics
from refusals import Refusal
from web import etags
from web.request_state import request_id, state_of

KEYS_RETRY_S = 3600  # each of the keys expires a day after its request


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
        state_of(scope)["overloaded"] = True  # the protocol then pauses the connection
    return Response(msgspec.json.encode(problem), error.status_code, dict(error.headers or {}), MEDIA_TYPE)


KNOWN = (HTTPException, Refusal, RequestValidationError)  # everything else is a crash


def answer(scope: Scope, error: Exception) -> Response:
    """Return the answer to an error that is one of `KNOWN`."""
    match error:
        case Refusal():
            return render(scope, problem_of(error))
        case RequestValidationError():
            return render(scope, unprocessable(error))
        case HTTPException():
            return render(scope, error)
    raise TypeError(f"no answer to {type(error).__name__}")


def install(app: FastAPI) -> None:
    """Let *app* answer every known error, its own and the framework's, as a problem."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            error.headers = {"Allow": ", ".join(_allowed(app, request.scope["path"]))}
        return answer(request.scope, error)

    for kind in KNOWN:
        app.add_exception_handler(kind, handle)


def problem_of(refusal: Refusal) -> Problem:
    """Return the answer to *refusal*."""
    match refusal:
        case refusals.TaskNotFound():
            return NotFound()
        case refusals.VersionConflict():
            tag = etags.write(refusal.task["version"])
            return PreconditionFailed(headers={"ETag": tag}, etag=tag)
        case refusals.TooManyTasks():
            return Conflict(f"There would be more tasks than the {refusal.limit} that you may have")
        case refusals.OperationRefused():
            problem = problem_of(refusal.refusal)
            problem.extensions = {"index": refusal.index} | problem.extensions
            problem.headers = None  # they would describe one task
            return problem
        case refusals.KeyInUse():
            sentence = "A request with this Idempotency-Key is still running"
            return Conflict(sentence, headers={"Retry-After": "1"})
        case refusals.KeyReused():
            return invalid_parameter("Idempotency-Key", "was used for another request")
        case refusals.ChangesForgotten():
            metrics.sync_token_expired()
            return Gone()
        case refusals.TooManyKeys():
            return TooManyRequests(
                "You have sent as many Idempotency-Keys as are kept for a day. "
                "Please try again later or without one.",
                retry_after_s=KEYS_RETRY_S,
            )
    raise TypeError(f"no problem for {type(refusal).__name__}")


def unprocessable(error: RequestValidationError) -> Unprocessable:
    """Return the problem that names each of the framework's validation errors."""
    return Unprocessable([_field_error(mistake) for mistake in error.errors()])


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
    # A part in angle brackets names one of several models; it is no member of the body.
    members = (str(part) for part in path if not str(part).startswith("<"))
    escaped = (part.replace("~", "~0").replace("/", "~1") for part in members)
    return {"pointer": "".join(f"/{part}" for part in escaped), "detail": detail}


def _clause(mistake: Mapping[str, Any]) -> str:
    """Return what is wrong with a value, without internal names and without the input itself."""
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
