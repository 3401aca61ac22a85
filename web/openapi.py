"""Completes `/openapi.json` with what the framework cannot derive from the routes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from schemas import ID_MAX
from web.answers import JSON
from web.problems import PROBLEM_SCHEMA
from web.request_state import REQUEST_ID_PATTERN

_PROJECT_FILE = Path(__file__).parent.parent / "pyproject.toml"
LICENSE = {"name": "MIT", "identifier": "MIT"}
SERVERS: list[dict[str, Any]] = [{"url": "/", "description": "The origin that serves this document."}]
MERGE_PATCH = "application/merge-patch+json"
_TASK = {"$ref": "#/components/schemas/TaskOut"}
CHALLENGE_PATTERN = r'^Bearer( error="invalid_token", error_description="[ !#-\[\]-~]+")?$'

HEADERS: dict[str, dict[str, Any]] = {
    "Accept-Patch": {
        "required": True,
        "description": "The media types that a patch may have.",
        "example": f"{MERGE_PATCH}, {JSON}",
        "schema": {"type": "string"},
    },
    "ETag": {
        "required": True,
        "description": "For `If-None-Match`, and a task's also for `If-Match`. A task's is its version.",
        "example": '"3"',
        "schema": {"type": "string", "pattern": '^"[0-9]+(-[0-9a-f]+)?"$'},
    },
    "Idempotent-Replayed": {
        "description": "`true` when this is the answer that a request with this key got before.",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Link": {
        "description": 'The next page (RFC 8288), if there is one: `<…>; rel="next"`.',
        "example": '</api/alice/tasks?limit=20&cursor=SomeCursor>; rel="next"',
        "schema": {"type": "string"},
    },
    "Location": {
        "required": True,
        "description": "Where the new task is.",
        "example": "/api/alice/tasks/7",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Retry-After": {
        "description": "In how many seconds the request may succeed.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "WWW-Authenticate": {
        "required": True,
        "description": "How to say who is calling, and why a token was refused (RFC 6750, section 3).",
        "example": 'Bearer error="invalid_token", error_description="Token has expired"',
        "schema": {"type": "string", "pattern": CHALLENGE_PATTERN},
    },
    "X-Request-ID": {
        "required": True,
        "description": "The request's id: the client's own if it sent a plain one.",
        "example": "4c0b5e0d6d3f4f0e9a4a3ce2b6c1a7d8",
        "schema": {"type": "string", "pattern": f"^{REQUEST_ID_PATTERN}$"},
    },
    "X-Total-Count": {
        "description": "How many tasks all pages hold together, if `count=true` asked for it.",
        "schema": {"type": "integer", "minimum": 0},
    },
}


def header(name: str) -> dict[str, Any]:
    """Return the `headers` of an answer in a route's `responses` that has the header *name* of `HEADERS`."""
    return {name: {"$ref": f"#/components/headers/{name}"}}


def install(app: FastAPI, *, token_url: str | None = None) -> None:
    """Let *app* serve the completed document, with the password flow of OAuth if there is a *token_url*."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.version = version()
            document = generate()
            complete(document)
            if token_url:
                _add_password_flow(document, token_url)
        assert app.openapi_schema is not None  # noqa: S101 - for the type checker
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # the framework's own way to extend it


def version() -> str:
    """Return the version of the service, which stands in `pyproject.toml` only."""
    import tomllib  # some 10 ms, which the start does not pay

    return str(tomllib.loads(_PROJECT_FILE.read_text(encoding="utf-8"))["project"]["version"])


def _add_password_flow(document: dict[str, Any], token_url: str) -> None:
    document["components"]["securitySchemes"]["password"] = {
        "type": "oauth2",
        "description": "An account that this service keeps: `username` is its e-mail address.",
        "flows": {"password": {"tokenUrl": token_url, "scopes": {}}},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            if {"bearer": []} in operation["security"]:
                operation["security"] = [*operation["security"], {"password": []}]


def write(document: dict[str, Any]) -> str:
    """Return *document* as it is kept in `openapi.json`."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def complete(document: dict[str, Any]) -> None:
    """Add to *document* what all operations of a kind have in common."""
    # A kind of problem may have its own members (RFC 9457, section 3.2).
    document["components"]["schemas"]["Problem"] = PROBLEM_SCHEMA | {"additionalProperties": True}
    document["components"]["headers"] = HEADERS
    for operation in _operations(document):
        operation["summary"] = operation["summary"].capitalize()
        operation.setdefault("security", [])  # no token is needed
        for parameter in operation.get("parameters", ()):
            _drop_null(parameter["schema"])
        content = operation.get("requestBody", {}).get("content", {})
        if MERGE_PATCH in content:
            content[JSON] = content[MERGE_PATCH]
        for status, answer in operation["responses"].items():
            for name in _headers(operation, status, answer):
                answer.setdefault("headers", {}).update(header(name))
        operation["responses"] = dict(sorted(operation["responses"].items()))
    _link(document)
    _drop_titles(document["paths"])
    for schema in document["components"]["schemas"].values():
        _drop_titles(schema.get("properties", {}))
        _write_whole_numbers(schema)


def _write_whole_numbers(schema: Any) -> None:
    """Make the bounds of numbers integers again: the framework makes floats, and the largest id is none."""
    if isinstance(schema, list):
        for value in schema:
            _write_whole_numbers(value)
    elif isinstance(schema, dict):
        for name, value in schema.items():
            if isinstance(value, float) and value.is_integer():
                schema[name] = min(int(value), ID_MAX)
            else:
                _write_whole_numbers(value)


def _operations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for operations in document["paths"].values():
        yield from operations.values()


def _parameters(operation: dict[str, Any]) -> set[str]:
    return {parameter["name"] for parameter in operation.get("parameters", ())}


def _is_task(answer: dict[str, Any]) -> bool:
    return bool(answer.get("content", {}).get(JSON, {}).get("schema") == _TASK)


def _headers(operation: dict[str, Any], status: str, answer: dict[str, Any]) -> Iterator[str]:
    yield "X-Request-ID"
    is_task = _is_task(answer)
    if is_task or status == "304" or (status == "412" and "If-Match" in _parameters(operation)):
        yield "ETag"
    match status:
        case "201" if is_task:
            yield "Location"
        case "401":
            yield "WWW-Authenticate"
        case "409" if "Idempotency-Key" in _parameters(operation):
            yield "Retry-After"
        case "415" if MERGE_PATCH in operation["requestBody"]["content"]:
            yield "Accept-Patch"
        case "429" | "503":
            yield "Retry-After"


def _link(document: dict[str, Any]) -> None:
    """Link the operations that create and read a task to those that take its id."""
    followers = [
        operation
        for path, operations in document["paths"].items()
        if "/tasks/{task_id}" in path
        for operation in operations.values()
    ]
    for operation in _operations(document):
        for status, answer in operation["responses"].items():
            if status == "201" and _is_task(answer):
                answer["links"] = {
                    follower["operationId"]: {
                        "operationId": follower["operationId"],
                        "parameters": {
                            "user_id": "$request.path.user_id",
                            "task_id": "$response.body#/id",
                        },
                    }
                    for follower in followers
                }
            elif status == "200" and "304" in operation["responses"] and operation in followers:
                answer["links"] = {
                    f"{follower['operationId']}_if_unchanged": {
                        "operationId": follower["operationId"],
                        "parameters": {
                            "user_id": "$request.path.user_id",
                            "task_id": "$request.path.task_id",
                            "If-Match": "$response.header.ETag",
                        },
                    }
                    for follower in followers
                    if "If-Match" in _parameters(follower) and follower is not operation
                }


def _drop_null(schema: dict[str, Any]) -> None:
    """Drop null from an optional parameter, which is left out instead."""
    match schema.get("anyOf"):
        case [kind, {"type": "null"}]:
            del schema["anyOf"]
            schema |= {**kind, **schema}


def _drop_titles(part: Any) -> None:
    """Remove the titles that only repeat a name."""
    if isinstance(part, list):
        for value in part:
            _drop_titles(value)
    elif isinstance(part, dict):
        if isinstance(part.get("title"), str):
            del part["title"]
        for name, value in part.items():
            if name not in ("example", "examples"):
                _drop_titles(value)
