"""What `/openapi.json` says beyond what the framework reads off the routes."""

from typing import Any

from fastapi import FastAPI

from errors import PROBLEM_SCHEMA


def install(app: FastAPI, *, token_url: str | None = None) -> None:
    """Add the schema that every error refers to and, with *token_url*, the way to a token by password."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            document["components"]["schemas"]["Problem"] = PROBLEM_SCHEMA
            if token_url:
                _add_password_flow(document, token_url)
        assert app.openapi_schema is not None  # noqa: S101 - for the type checker
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # the framework's own way to extend it


def _add_password_flow(document: dict[str, Any], token_url: str) -> None:
    document["components"]["securitySchemes"]["password"] = {
        "type": "oauth2",
        "description": "An account that this service keeps: `username` is its e-mail address.",
        "flows": {"password": {"tokenUrl": token_url, "scopes": {}}},
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            if {"bearer": []} in operation.get("security", ()):
                operation["security"] = [*operation["security"], {"password": []}]
