from typing import Any

import httpx
import pytest
from fastapi import FastAPI

OPERATIONS = {
    "health": ("get", "/health", {"200"}),
    "list_tasks": ("get", "/api/{user_id}/tasks", {"200", "401", "403", "422", "503"}),
    "create_task": ("post", "/api/{user_id}/tasks", {"201", "401", "403", "408", "413", "415", "422", "503"}),
    "get_task": ("get", "/api/{user_id}/tasks/{task_id}", {"200", "401", "403", "404", "422", "503"}),
    "update_task": (
        "put",
        "/api/{user_id}/tasks/{task_id}",
        {"200", "401", "403", "404", "408", "413", "415", "422", "503"},
    ),
    "delete_task": ("delete", "/api/{user_id}/tasks/{task_id}", {"204", "401", "403", "404", "422", "503"}),
    "complete_task": (
        "patch",
        "/api/{user_id}/tasks/{task_id}/complete",
        {"200", "401", "403", "404", "408", "413", "415", "422", "503"},
    ),
}


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def test_the_operations_and_their_ids_are_stable(document: dict[str, Any]) -> None:
    found = {
        operation["operationId"]: (method, path, set(operation["responses"]))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }

    assert found == OPERATIONS


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for operations in document["paths"].values() for operation in operations.values()]


def test_every_operation_is_described(document: dict[str, Any]) -> None:
    assert len(_operations(document)) == 7
    for operation in _operations(document):
        assert operation["summary"]
        assert operation["description"]
        for status, answer in operation["responses"].items():
            assert answer["description"], (operation["operationId"], status)


def test_every_error_has_the_problem_schema(document: dict[str, Any]) -> None:
    errors = [
        (int(status), answer["content"]["application/problem+json"])
        for operation in _operations(document)
        for status, answer in operation["responses"].items()
        if status >= "400"
    ]

    assert len(errors) == sum(len(statuses) - 1 for _, _, statuses in OPERATIONS.values())
    reference = {"$ref": "#/components/schemas/Problem"}
    for status, content in errors:
        assert content["schema"] == reference
        assert content["example"]["status"] == status
    assert document["components"]["schemas"]["Problem"]["required"] == [
        "type",
        "title",
        "status",
        "detail",
        "instance",
    ]


def test_every_task_operation_asks_for_the_bearer_token(document: dict[str, Any]) -> None:
    for operation in _operations(document):
        is_open = operation["operationId"] == "health"
        assert operation.get("security", []) == ([] if is_open else [{"bearer": []}])
    scheme = document["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")


def test_bodies_have_examples(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    assert schemas["TaskCreate"]["examples"] == [{"title": "Buy milk", "description": "Two bottles"}]
    assert schemas["TaskUpdate"]["properties"]["title"]["examples"] == ["Buy oat milk"]
    assert schemas["Completion"]["properties"]["completed"]["examples"] == [True]


def test_an_update_promises_no_defaults(document: dict[str, Any]) -> None:
    for name in ("TaskUpdate", "Completion"):
        schema = document["components"]["schemas"][name]
        assert "required" not in schema
        assert not any("default" in field for field in schema["properties"].values())


def test_no_reference_leads_nowhere(document: dict[str, Any]) -> None:
    found: list[str] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            found.extend([part["$ref"]] if "$ref" in part else [])
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for value in part:
                walk(value)

    walk(document)

    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


async def test_the_document_is_served(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    answer = await client.get("/openapi.json")

    assert answer.json() == document
