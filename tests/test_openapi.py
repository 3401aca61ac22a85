import difflib
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from main import create_app
from schemas import Bulk, TaskCreate
from tests.conftest import Person, settings_for
from web import openapi

EVERY_TASK = {"401", "403", "422", "429", "503"}
BODY = {"408", "413", "415"}
TASKS = "/api/{user_id}/tasks"
OPERATIONS = {
    "health": ("get", "/health", {"200", "429", "503"}),
    "ready": ("get", "/health/ready", {"200", "429", "503"}),
    "list_tasks": ("get", TASKS, {"200", "304"} | EVERY_TASK),
    "create_task": ("post", TASKS, {"201", "409"} | BODY | EVERY_TASK),
    "complete_tasks": ("patch", TASKS, {"200", "409"} | BODY | EVERY_TASK),
    "delete_tasks": ("delete", TASKS, {"200"} | EVERY_TASK),
    "get_stats": ("get", f"{TASKS}/stats", {"200", "304"} | EVERY_TASK),
    "get_changes": ("get", f"{TASKS}/changes", {"200", "410"} | EVERY_TASK),
    "get_events": ("get", f"{TASKS}/events", {"200", "410", "426"} | EVERY_TASK),
    "change_tasks": ("post", f"{TASKS}/bulk", {"200", "207", "404", "409", "412"} | BODY | EVERY_TASK),
    "list_trash": ("get", f"{TASKS}/trash", {"200"} | EVERY_TASK),
    "empty_trash": ("delete", f"{TASKS}/trash", {"200"} | EVERY_TASK),
    "erase_task": ("delete", f"{TASKS}/trash/{{task_id}}", {"200", "204", "404", "412"} | EVERY_TASK),
    "restore_tasks": ("post", f"{TASKS}/restore", {"200", "409"} | BODY | EVERY_TASK),
    "restore_task": ("post", f"{TASKS}/{{task_id}}/restore", {"200", "404", "409", "412"} | EVERY_TASK),
    "get_task": ("get", f"{TASKS}/{{task_id}}", {"200", "304", "404", "412"} | EVERY_TASK),
    "update_task": ("put", f"{TASKS}/{{task_id}}", {"200", "404", "409", "412"} | BODY | EVERY_TASK),
    "patch_task": ("patch", f"{TASKS}/{{task_id}}", {"200", "404", "409", "412"} | BODY | EVERY_TASK),
    "delete_task": ("delete", f"{TASKS}/{{task_id}}", {"200", "204", "404", "412"} | EVERY_TASK),
    "complete_task": (
        "patch",
        f"{TASKS}/{{task_id}}/complete",
        {"200", "404", "409", "412"} | BODY | EVERY_TASK,
    ),
}
PARAMETERS_OF_A_FILTER = {
    "user_id", "status", "completed", "search", "q", "priority", "category", "tags", "due_date_from",
    "due_date_to",
}  # fmt: skip
PARAMETERS = {
    "health": set(),
    "ready": set(),
    "list_tasks": PARAMETERS_OF_A_FILTER
    | {"sort", "sort_by", "order", "limit", "cursor", "count", "If-None-Match"},
    "create_task": {"user_id", "Idempotency-Key"},
    "complete_tasks": PARAMETERS_OF_A_FILTER,
    "delete_tasks": PARAMETERS_OF_A_FILTER,
    "get_stats": {"user_id", "today", "If-None-Match"},
    "get_changes": {"user_id", "since", "limit"},
    "get_events": {"user_id", "since", "Last-Event-ID"},
    "change_tasks": {"user_id", "atomic", "Idempotency-Key"},
    "list_trash": {"user_id", "limit", "cursor"},
    "empty_trash": {"user_id"},
    "erase_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "restore_tasks": {"user_id"},
    "restore_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "get_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "update_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "patch_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "delete_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
    "complete_task": {"user_id", "task_id", "If-Match", "If-None-Match"},
}
# In addition to X-Request-ID, which every response has.
HEADERS_OF_PROBLEMS = {"401": {"WWW-Authenticate"}, "429": {"Retry-After"}, "503": {"Retry-After"}}
HEADERS = {
    ("list_tasks", "200"): {"Link", "X-Total-Count", "ETag"},
    ("list_tasks", "304"): {"ETag"},
    ("get_stats", "200"): {"ETag"},
    ("get_stats", "304"): {"ETag"},
    ("create_task", "201"): {"ETag", "Location", "Idempotent-Replayed"},
    ("create_task", "409"): {"Retry-After"},
    ("change_tasks", "200"): {"Idempotent-Replayed"},
    ("change_tasks", "207"): {"Idempotent-Replayed"},
    ("change_tasks", "409"): {"Retry-After"},
    ("list_trash", "200"): {"Link"},
    ("erase_task", "412"): {"ETag"},
    ("restore_task", "200"): {"ETag"},
    ("restore_task", "412"): {"ETag"},
    ("get_task", "200"): {"ETag"},
    ("get_task", "304"): {"ETag"},
    ("get_task", "412"): {"ETag"},
    ("update_task", "200"): {"ETag"},
    ("update_task", "412"): {"ETag"},
    ("patch_task", "200"): {"ETag"},
    ("patch_task", "412"): {"ETag"},
    ("patch_task", "415"): {"Accept-Patch"},
    ("delete_task", "412"): {"ETag"},
    ("complete_task", "200"): {"ETag"},
    ("complete_task", "412"): {"ETag"},
}
PROJECT = Path(__file__).parent.parent
KEPT = PROJECT / "openapi.json"
REDOCLY = Path(__file__).parent / "redocly"
INSTALL_TIMEOUT_S = 300
LINT_TIMEOUT_S = 60

BODY_ERRORS = {"408", "413", "415", "503"}
ACCOUNT_OPERATIONS = {
    "sign_up": ("post", "/api/auth/sign-up/email", {"200", "400", "422", "429"} | BODY_ERRORS),
    "sign_in": ("post", "/api/auth/sign-in/email", {"200", "400", "401", "422", "429"} | BODY_ERRORS),
    "get_token": ("get", "/api/auth/token", {"200", "401", "429", "503"}),
    "sign_out": ("post", "/api/auth/sign-out", {"200", "429", "503"}),
    "revoke_sessions": ("post", "/api/auth/revoke-sessions", {"200", "401", "429", "503"}),
    "get_session": ("get", "/api/auth/get-session", {"200", "429", "503"}),
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
    assert len(_operations(document_with_accounts)) == len(OPERATIONS | ACCOUNT_OPERATIONS)
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
    assert len(errors) == sum(status >= "400" for _, _, statuses in expected.values() for status in statuses)
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
    assert {"errors", "etag", "index"} < document["components"]["schemas"]["Problem"]["properties"].keys()


def test_every_parameter_is_named_as_it_is_sent(document: dict[str, Any]) -> None:
    found = {
        operation["operationId"]: {parameter["name"] for parameter in operation.get("parameters", ())}
        for operation in _operations(document)
    }

    assert found == PARAMETERS


def test_no_parameter_can_be_null(document: dict[str, Any]) -> None:
    parameters = [each for operation in _operations(document) for each in operation.get("parameters", ())]

    assert [each["name"] for each in parameters if "anyOf" in each["schema"]] == []
    assert all("type" in each["schema"] for each in parameters)


def test_every_header_of_an_answer_is_described(document: dict[str, Any]) -> None:
    found = {
        (operation["operationId"], status): set(answer["headers"]) - {"X-Request-ID"}
        for operation in _operations(document)
        for status, answer in operation["responses"].items()
    }

    for (operation_id, status), headers in found.items():
        assert headers == HEADERS.get((operation_id, status), HEADERS_OF_PROBLEMS.get(status, set()))
    assert HEADERS.keys() < found.keys()
    assert all(
        "X-Request-ID" in answer["headers"]
        for operation in _operations(document)
        for answer in operation["responses"].values()
    )


def test_a_patch_has_two_media_types_and_other_bodies_one(document: dict[str, Any]) -> None:
    found = {
        operation["operationId"]: set(operation["requestBody"]["content"])
        for operation in _operations(document)
        if "requestBody" in operation
    }

    assert found.pop("patch_task") == {"application/json", "application/merge-patch+json"}
    assert len(found) == 6
    assert all(types == {"application/json"} for types in found.values())


def test_links_lead_from_a_task_to_its_operations(document: dict[str, Any]) -> None:
    created = document["paths"][TASKS]["post"]["responses"]["201"]["links"]
    read = document["paths"][f"{TASKS}/{{task_id}}"]["get"]["responses"]["200"]["links"]

    changes = {"update_task", "patch_task", "delete_task", "complete_task", "restore_task"}
    assert {link["operationId"] for link in created.values()} == changes | {"get_task"}
    assert {link["operationId"] for link in read.values()} == changes
    assert "links" not in document["paths"][TASKS]["get"]["responses"]["200"]  # it has no id to follow
    for link in created.values():
        assert link["parameters"]["task_id"] == "$response.body#/id"
    for link in read.values():
        assert link["parameters"]["If-Match"] == "$response.header.ETag"


def test_ids_have_the_bounds_of_the_database(document: dict[str, Any]) -> None:
    in_path = document["paths"][f"{TASKS}/{{task_id}}"]["get"]["parameters"][0]["schema"]
    in_body = document["components"]["schemas"]["Delete"]["properties"]["id"]

    for schema in (in_path, in_body):
        assert (schema["minimum"], schema["maximum"]) == (1, 2**63 - 1)
        assert isinstance(schema["maximum"], int)


KEYS = [
    "a", "a b", "é", '"', '"a', '"a"', '""', '"""', '" "', "\xa0", "\x7f", "a\tb", "x" * 255, "x" * 256,
    f'"{"x" * 255}"', f'"{"x" * 256}"', f'"{"x" * 254}', f'"{"x" * 255}',
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
async def test_an_idempotency_key_is_accepted_if_it_matches_the_documented_pattern(
    document: dict[str, Any], alice: Person, key: str
) -> None:
    parameters = document["paths"][TASKS]["post"]["parameters"]
    pattern = next(each["schema"]["pattern"] for each in parameters if each["name"] == "Idempotency-Key")

    headers = {"Idempotency-Key": key.encode("latin-1")}
    answer = await alice.post(json={"title": "x"}, headers=headers)

    assert answer.status_code == (201 if re.search(pattern, key) else 422)


def test_no_title_repeats_a_name(document: dict[str, Any]) -> None:
    for schema in document["components"]["schemas"].values():
        assert not [name for name, field in schema.get("properties", {}).items() if "title" in field]
    for operation in _operations(document):
        assert operation["summary"] == operation["operationId"].replace("_", " ").capitalize()
        assert not [each for each in operation.get("parameters", ()) if "title" in each["schema"]]
    assert document["components"]["schemas"]["TaskOut"]["title"] == "Task"


def test_every_task_operation_asks_for_the_bearer_token(document: dict[str, Any]) -> None:
    for operation in _operations(document):
        is_open = operation["operationId"] in ("health", "ready")
        assert operation["security"] == ([] if is_open else [{"bearer": []}])
    scheme = document["components"]["securitySchemes"]["bearer"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")


def test_operations_accept_the_bearer_or_the_password_scheme(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
    either: list[dict[str, list[str]]] = [{"bearer": []}, {"password": []}]
    secured = {operation["operationId"]: operation["security"] for operation in _operations(document)}

    assert {name for name, schemes in secured.items() if schemes == []} == {
        "health",
        "ready",
        "sign_up",
        "sign_in",
        "grant_token",
    }
    with_token_if_any = {name for name, schemes in secured.items() if schemes == [{}, *either]}
    assert with_token_if_any == {"get_session", "sign_out"}
    assert all(
        schemes == either for name, schemes in secured.items() if schemes and name not in with_token_if_any
    )
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


def test_without_accounts_the_document_does_not_mention_them(document: dict[str, Any]) -> None:
    assert set(document["components"]["securitySchemes"]) == {"bearer"}
    assert not any(name in json.dumps(document) for name in ("password", "AccountOut", "/api/auth"))


def test_bodies_have_examples(document_with_accounts: dict[str, Any]) -> None:
    document = document_with_accounts
    schemas = document["components"]["schemas"]

    assert [example["title"] for example in schemas["TaskCreate"]["examples"]] == ["Buy milk"]
    assert TaskCreate.model_validate(schemas["TaskCreate"]["examples"][0])
    assert Bulk.model_validate(schemas["Bulk"]["examples"][0])
    assert schemas["TaskUpdate"]["properties"]["title"]["examples"] == ["Buy oat milk"]
    assert schemas["Completion"]["properties"]["completed"]["examples"] == [True]
    assert schemas["SignUp"]["examples"][0].keys() == {"name", "email", "password"}
    assert schemas["SignIn"]["examples"][0].keys() == {"email", "password"}


def test_a_task_always_has_all_its_members(document: dict[str, Any]) -> None:
    schema = document["components"]["schemas"]["TaskOut"]

    assert set(schema["required"]) == set(schema["properties"])
    assert set(schema["examples"][0]) == set(schema["properties"])


def test_only_optional_task_fields_are_nullable(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["TaskOut"]["properties"]

    nullable = {name for name, field in fields.items() if {"type": "null"} in field.get("anyOf", ())}
    assert nullable == {
        "description", "completed_at", "priority", "category", "due_date", "due_time", "recurring",
    }  # fmt: skip
    done = document["components"]["schemas"]["Done"]
    assert not any("anyOf" in field for field in done["properties"].values())
    assert done["required"] == ["status"]


def test_an_update_has_no_defaults_and_no_required_fields(document: dict[str, Any]) -> None:
    for name in ("TaskUpdate", "Completion"):
        schema = document["components"]["schemas"][name]
        assert "required" not in schema
        assert not any("default" in field for field in schema["properties"].values())


def test_every_ref_resolves_to_a_component(document_with_accounts: dict[str, Any]) -> None:
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
        kind, name = reference.removeprefix("#/components/").split("/")
        assert name in document["components"][kind]


async def test_the_document_is_served(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    answer = await client.get("/openapi.json")

    assert answer.json() == document


def test_the_committed_openapi_json_is_the_one_that_is_served(document: dict[str, Any]) -> None:
    kept = KEPT.read_text().splitlines(keepends=True)
    now = openapi.write(document).splitlines(keepends=True)

    changes = "".join(difflib.unified_diff(kept, now, "openapi.json", "what is served"))
    if changes:
        pytest.fail(f"If this is meant, `uv run main.py openapi > openapi.json`:\n{changes}", pytrace=False)


def test_the_document_the_project_and_the_changelog_have_one_version(document: dict[str, Any]) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    newest = re.search(r"^## (\S+)", (PROJECT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert newest
    assert document["info"]["version"] == project["version"] == newest[1]


def test_the_document_names_the_licence_of_the_project(document: dict[str, Any]) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]

    assert document["info"]["license"]["identifier"] == project["license"]


def _redocly() -> list[str]:
    """Install the package of the lock file if necessary, and return the command."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        sentence = "Node.js 20.19 or newer with npm is not installed (https://nodejs.org)"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)  # not on PyPI, so the README's test command cannot install it
    installed, lock = REDOCLY / "node_modules" / ".package-lock.json", REDOCLY / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < lock.stat().st_mtime:
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(
            command, cwd=REDOCLY, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stderr
        installed.touch()  # must be newer than the lock file, or each run would install again
    return [node, str(REDOCLY / "node_modules" / "@redocly" / "cli" / "bin" / "cli.js")]


# Ids are numbers, so that `trash` is none, but Redocly does not look at the types of parameters.
NOT_AMBIGUOUS = (
    "Paths should resolve unambiguously. Found two ambiguous paths: "
    f"`{TASKS}/{{task_id}}/complete` and `{TASKS}/trash/{{task_id}}`."
)


def test_redocly_lint_finds_no_problem(tmp_path: Path) -> None:
    command = [*_redocly(), "lint", "openapi.json", "--extends=recommended", "--format=json"]
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_NOTIFICATIONS": "true"}
    for settings in ({}, {"local_accounts": True}):
        document = create_app(settings_for("sqlite:///never-opened.db", **settings)).openapi()
        (tmp_path / "openapi.json").write_text(openapi.write(document))

        done = subprocess.run(
            command,
            cwd=tmp_path,  # a folder without Redocly configuration
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=LINT_TIMEOUT_S,
            check=False,
        )

        assert "openapi.json: validated" in done.stderr, done.stderr
        found = json.loads(done.stdout)
        assert [problem["message"] for problem in found["problems"]] == [NOT_AMBIGUOUS]
        assert found["totals"] == {"errors": 0, "warnings": 1, "ignored": 0}
