"""Routes that read the parameters of their endpoints themselves: the caller first, then path, query and body.

The framework's reading is general, costs a third of a request and parses the body before it authenticates the
caller (docs/decisions/0006). The declarations stay the framework's, and so does the OpenAPI document.
"""

import asyncio
import inspect
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from errors import ContentTooLarge, RequestTimeout, Unprocessable, UnsupportedMediaType, invalid_parameter
from web import strict_json
from web.answers import JSON
from web.request_state import header_values, headers_of, state_of

BODY_PROBLEMS = (RequestTimeout, ContentTooLarge, UnsupportedMediaType)  # of every route that reads a body
NOT_ENCODED = "The request body must not be compressed"
BODY_MAX_BYTES = 64 * 1024
# 64 KiB in this time is 105 kbit/s. The default deadline of a request is longer, so a slow body gets 408.
BODY_TIMEOUT_S = 5.0
ANNOUNCED_MAX = 20  # digits of a Content-Length, which has 64 bits
QUERIES_REMEMBERED = 256  # each takes 2 KB, and users send the same few
QUERY_REMEMBERED_MAX_BYTES = 128  # longer ones rarely repeat

ONCE = "once"  # marks a header whose value may contain commas, so that two could look like one

Reader = Callable[[Request], Any]


class Parameter(NamedTuple):
    """How a parameter of an endpoint is read, and where mistakes in it are."""

    name: str
    place: tuple[str, ...]
    read: Reader
    waits: bool = False  # its reader is a coroutine function


class DirectRoute(APIRoute):
    """A route whose endpoint answers with a `Response` and takes any of these, by annotation:

    - `Annotated[T, Depends(f)]`: the result of `await f(request, ...)`, before everything else; *f*'s other
      parameters are parts of the path as they are,
    - `Annotated[T, Path(...)]`: a part of the path,
    - `Annotated[Model, Query()]`: the query as a frozen model; a repeated parameter becomes a tuple where the
      field is one, otherwise the last value counts, or is refused if the model forbids extra parameters,
    - `Annotated[str | None, Header()]`: a header, joined by commas if it was sent more than once; with `ONCE`
      that is refused,
    - `Request`,
    - anything else: the body, as strict JSON of at most `BODY_MAX_BYTES`; with a default it may be left out.
      `Body(media_type=…)` names one of the `+json` types; then no other is taken besides `application/json`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.answer = self.get_route_handler()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The framework's method opens exit stacks that no dependency of ours uses, and catches what the
        # application catches anyway: 5 % of a request.
        if self.methods and scope["method"] not in self.methods:
            raise HTTPException(405)
        response = await self.answer(Request(scope, receive, send))
        await response(scope, receive, send)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint = self.endpoint
        parameters = _parameters(endpoint)

        async def handle(request: Request) -> Response:
            values, mistakes = {}, []
            for name, place, read, waits in parameters:
                try:
                    values[name] = await read(request) if waits else read(request)
                except ValidationError as error:
                    mistakes += [{**mistake, "loc": (*place, *mistake["loc"])} for mistake in error.errors()]
            if mistakes:
                raise RequestValidationError(mistakes)
            response: Response = await endpoint(**values)
            return response

        return handle


def _parameters(endpoint: Callable[..., Any]) -> list[Parameter]:
    """Return how each parameter of *endpoint* is read, dependencies first."""
    hints = get_type_hints(endpoint, include_extras=True)
    dependencies: list[Parameter] = []
    others: list[Parameter] = []
    for name, parameter in inspect.signature(endpoint).parameters.items():
        hint = hints[name]
        extras = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if dependency := _first(params.Depends, extras):
            reader = _dependency_reader(dependency.dependency)
            dependencies.append(Parameter(name, (), reader, waits=True))
        elif _first(params.Path, extras):
            others.append(Parameter(name, ("path", name), _path_reader(name, hint)))
        elif _first(params.Query, extras):
            others.append(Parameter(name, ("query",), _query_reader(hint)))
        elif hint is Request:
            others.append(Parameter(name, (), _request_reader))
        elif _first(params.Header, extras):
            others.append(Parameter(name, (), _header_reader(name, once=ONCE in extras)))
        else:
            body = _first(params.Body, extras)
            patch_type = body.media_type if body and body.media_type != JSON else None
            reader = _body_reader(hint, parameter.default, patch_type)
            others.append(Parameter(name, ("body",), reader, waits=True))
    return dependencies + others


def _first(kind: type[Any], extras: tuple[Any, ...]) -> Any:
    return next((extra for extra in extras if isinstance(extra, kind)), None)


def _dependency_reader(dependency: Callable[..., Awaitable[Any]]) -> Reader:
    parts = [name for name in inspect.signature(dependency).parameters if name != "request"]

    async def read(request: Request) -> Any:
        return await dependency(request, **{name: request.path_params[name] for name in parts})

    return read


def _request_reader(request: Request) -> Request:
    return request


def _path_reader(name: str, hint: Any) -> Reader:
    validate = TypeAdapter(hint).validator.validate_python

    def read(request: Request) -> Any:
        return validate(request.path_params[name])

    return read


def _query_reader(hint: Any) -> Reader:
    validate = TypeAdapter(hint).validator.validate_python

    model = get_args(hint)[0]
    repeatable = {name for name, field in model.model_fields.items() if get_origin(field.annotation) is tuple}
    strict = model.model_config.get("extra") == "forbid"

    @lru_cache(QUERIES_REMEMBERED)
    def parse(query: bytes) -> Any:
        sent = parse_qsl(query.decode("latin-1"), keep_blank_values=True)
        values: dict[str, Any] = dict(sent)
        if strict and len(sent) > len(values):
            _refuse_repeated([name for name, _ in sent if name not in repeatable])
        for several in repeatable & values.keys():
            values[several] = [value for name, value in sent if name == several]
        return validate(values)

    def read(request: Request) -> Any:
        query = request.scope["query_string"]
        if len(query) > QUERY_REMEMBERED_MAX_BYTES or b"cursor=" in query:
            return parse.__wrapped__(query)
        return parse(query)

    return read


def _refuse_repeated(names: list[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise RequestValidationError(
            [{"type": "repeated", "loc": ("query", name), "msg": "must be sent once"} for name in repeated]
        )


def _header_reader(name: str, *, once: bool) -> Reader:
    field = name.replace("_", "-").encode()

    def read(request: Request) -> str | None:
        found = header_values(request.scope, field)
        if once and len(found) > 1:
            raise invalid_parameter(field.decode().title(), "must be sent once")
        return b", ".join(found).decode("latin-1") if found else None

    return read


def _body_reader(hint: Any, default: Any, patch_type: str | None) -> Reader:
    validate = TypeAdapter(hint).validator.validate_python

    async def read(request: Request) -> Any:
        body = await read_body(request)
        if not body:
            if default is not inspect.Parameter.empty:
                return default
            raise RequestValidationError([{"type": "missing", "loc": ("body",)}])
        if _field(request, b"content-encoding", "identity").strip().lower() != "identity":
            raise UnsupportedMediaType(NOT_ENCODED, headers={"Accept-Encoding": "identity"})
        media_type = _field(request, b"content-type").partition(";")[0].strip().lower()
        if patch_type and media_type not in (patch_type, JSON):
            raise UnsupportedMediaType(headers={"Accept-Patch": f"{patch_type}, {JSON}"})
        if not _is_json(media_type):
            raise UnsupportedMediaType
        try:
            value = strict_json.loads(body)
        except strict_json.NotStrictJson as error:
            raise Unprocessable([{"pointer": "", "detail": str(error)}]) from error
        return validate(value)

    return read


async def read_body(request: Request) -> bytes:
    """Return the body.

    Raises:
        ContentTooLarge: it has more than `BODY_MAX_BYTES`.
        RequestTimeout: it takes longer than `BODY_TIMEOUT_S`.
    """
    announced = _field(request, b"content-length")
    # Python refuses to read numbers of more than 4,300 digits, which are too large anyway.
    if announced.isdecimal() and (len(announced) > ANNOUNCED_MAX or int(announced) > BODY_MAX_BYTES):
        raise ContentTooLarge
    if state_of(request.scope).pop("body_received", False):
        return await _receive(request)  # without a timer
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _receive(request)
    except TimeoutError as error:
        raise RequestTimeout from error


async def _receive(request: Request) -> bytes:
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_MAX_BYTES:
            raise ContentTooLarge
    return bytes(body)


def _field(request: Request, name: bytes, default: str = "") -> str:
    value = headers_of(request.scope).get(name)
    return default if value is None else str(value, "latin-1")


def _is_json(media_type: str) -> bool:
    return media_type == JSON or (media_type.startswith("application/") and media_type.endswith("+json"))
