"""The problems that requests are answered with (RFC 9457); `web/problems.py` renders them."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, TypedDict

from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
# The names of RFC 9110, which Python has only from 3.13 on.
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
NOTHING_HERE = "There is nothing at this address"
SENTENCES_MAX = 10
ERRORS_MAX = 100  # 100 operations with ten mistakes each would be an answer larger than its request


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
    """The request conflicts with the present state."""

    status = 409
    sentence = "There would be more tasks than you may have"


class PreconditionFailed(Problem):
    status = 412
    sentence = "The task has changed since you read it"


class Gone(Problem):
    """The sync token has expired: tombstones after it have been dropped."""

    status = 410
    sentence = "Too much has changed since then. Please load everything again."

    @classmethod
    def members(cls) -> dict[str, Any]:
        return {"type": "urn:problem:sync-token-expired"}


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
    """Mistakes in the request, each named."""

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

    `lost`: a connection broke during a statement, which may or may not have been committed.
    """

    status = 503
    sentence = "The service is temporarily unavailable. Please try again."
    lost = False

    def __init__(self, detail: str | None = None, *, retry_after_s: int = 1) -> None:
        super().__init__(detail, headers={"Retry-After": str(retry_after_s)})


class Overloaded(Unavailable):
    """There are more requests than can be answered in time."""

    sentence = "The service is busy. Please try again."


class NotMigrated(Unavailable):
    """The database lacks tables or columns of ours until it is migrated."""


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


def title(status: int) -> str:
    """Return the name of *status*, which is the same in every version of Python."""
    return _TITLES.get(status) or HTTPStatus(status).phrase


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


def _name(error: FieldError) -> str:
    if "parameter" in error:
        return error["parameter"] or "query"  # `?=x` has a parameter without a name
    return error["pointer"].lstrip("/") or "body"
