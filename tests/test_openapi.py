import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from main import create_app
from tests.conftest import settings_for

OPERATIONS = {
    "health": ("get", "/health", {"200"}),
    "ready": ("get", "/health/ready", {"200", "503"}),
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

BODY_ERRORS = {"408", "413", "415", "503"}
ACCOUNT_OPERATIONS = {
    "sign_up": ("post", "/api/auth/sign-up/email", {"200", "400", "422"} | BODY_ERRORS),
    "sign_in": ("post", "/api/auth/sign-in/email", {"200", "400", "401", "422", "429"} | BODY_ERRORS),
    "get_token": ("get", "/api/auth/token", {"200", "401", "503"}),
    "get_session": ("get", "/api/auth/get-session", {"200", "503"}),
    "grant_token": ("post", "/api/auth/token", {"200", "400", "429"} | BODY_ERRORS),
}


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


@pytest.fixture
def document_with_accounts(database_url: str) -> dict[str, Any]:
    return create_app(settings_for(database_url, local_accounts=True)).openapi()


def _found(document: dict[str, Any]) -> dict[str, tuple[str, str, set[str]]]:
    return {
        operation["operationId"]: (method, path, set(operation["responses"]))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def test_the_operations_and_their_ids_are_stable(
    document: dict[str, Any], document_with_accounts: dict[str, Any]
) -> None:
    assert _found(document) == OPERATIONS
    assert _found(document_with_accounts) == OPERATIONS | ACCOUNT_OPERATIONS


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for operations in document["paths"].values() for operation in operations.values()]


def test_every_operation_is_described(document_with_accounts: dict[str, Any]) -> None:
    assert len(_operations(document_with_accounts)) == 12
    for operation in _operations(document_with_accounts):
        assert operation["summary"]
        assert operation["description"]
        for status, answer in operation["responses"].items():
            assert answer["description"], (operation["operationId"], status)


def test_every_error_has_the_problem_schema(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
    errors = [
        (int(status), answer["content"]["application/problem+json"])
        for operation in _operations(document)
        for status, answer in operation["responses"].items()
        if status >= "400"
    ]

    expected = OPERATIONS | ACCOUNT_OPERATIONS
    assert len(errors) == sum(len(statuses) - 1 for _, _, statuses in expected.values())
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
        is_open = operation["operationId"] in ("health", "ready")
        assert operation.get("security", []) == ([] if is_open else [{"bearer": []}])
    scheme = document["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")


def test_a_password_is_another_way_to_a_token(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
    either: list[dict[str, list[str]]] = [{"bearer": []}, {"password": []}]
    secured = {operation["operationId"]: operation.get("security") for operation in _operations(document)}

    assert {name for name, schemes in secured.items() if schemes is None} == {
        "health",
        "ready",
        "sign_up",
        "sign_in",
        "grant_token",
    }
    assert secured["get_session"] == [{}, *either]
    assert all(schemes == either for name, schemes in secured.items() if schemes and name != "get_session")
    password = document["components"]["securitySchemes"]["password"]
    assert (password["type"], password["flows"]) == (
        "oauth2",
        {"password": {"tokenUrl": "/api/auth/token", "scopes": {}}},
    )
    (form,) = document["paths"]["/api/auth/token"]["post"]["requestBody"]["content"]
    assert form == "application/x-www-form-urlencoded"


def test_the_account_is_described_as_it_is_sent(document_with_accounts: dict[str, Any]) -> None:
    schemas = document_with_accounts["components"]["schemas"]

    assert {"emailVerified", "createdAt", "updatedAt"} < set(schemas["AccountOut"]["properties"])
    assert {"userId", "expiresAt", "ipAddress"} < set(schemas["SessionOut"]["properties"])
    refused = document_with_accounts["paths"]["/api/auth/sign-in/email"]["post"]["responses"]["401"]
    assert refused["content"]["application/problem+json"]["example"]["code"] == "INVALID_EMAIL_OR_PASSWORD"


def test_without_accounts_nothing_is_said_of_them(document: dict[str, Any]) -> None:
    assert set(document["components"]["securitySchemes"]) == {"bearer"}
    assert not any(name in json.dumps(document) for name in ("password", "AccountOut", "/api/auth"))


def test_bodies_have_examples(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
    schemas = document["components"]["schemas"]

    assert schemas["TaskCreate"]["examples"] == [{"title": "Buy milk", "description": "Two bottles"}]
    assert schemas["TaskUpdate"]["properties"]["title"]["examples"] == ["Buy oat milk"]
    assert schemas["Completion"]["properties"]["completed"]["examples"] == [True]
    assert schemas["SignUp"]["examples"][0].keys() == {"name", "email", "password"}
    assert schemas["SignIn"]["examples"][0].keys() == {"email", "password"}


def test_an_update_promises_no_defaults(document: dict[str, Any]) -> None:
    for name in ("TaskUpdate", "Completion"):
        schema = document["components"]["schemas"][name]
        assert "required" not in schema
        assert not any("default" in field for field in schema["properties"].values())


def test_no_reference_leads_nowhere(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
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
