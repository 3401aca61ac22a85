"""What `/openapi.json` says beyond what the framework reads off the routes."""

from typing import Any

from fastapi import FastAPI

from errors import PROBLEM_SCHEMA


def install(app: FastAPI) -> None:
    """Add the schema that every error refers to."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            generate()["components"]["schemas"]["Problem"] = PROBLEM_SCHEMA
        assert app.openapi_schema is not None  # noqa: S101 - for the type checker
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign] # the framework's own way to extend it
