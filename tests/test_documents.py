import ast
import json
import re
from pathlib import Path

import pytest
from fastapi import FastAPI

from config import Settings
from main import create_app
from schemas import TaskOut
from tests.conftest import settings_for
from tests.test_architecture import FLOORS

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text()
DEFAULTS_IN_WORDS = {
    "DATABASE_URL": "SQLite in `DATA_DIR`",
    "MIGRATE_ON_START": "true for SQLite",
    "BETTER_AUTH_SECRET": "made once, embedded only",
    "BETTER_AUTH_SECRETS": "none",
    "BETTER_AUTH_URL": "none",
    "JWKS_URL": "from `BETTER_AUTH_URL`",
    "JWKS": "none",
    "JWT_ISSUER": "from `BETTER_AUTH_URL`",
    "JWT_AUDIENCE": "from `BETTER_AUTH_URL`",
    "JWT_ALGORITHMS": "all that fit the keys",
    "CURSOR_SECRET": "the shared secrets",
    "LOCAL_ACCOUNTS": "true when nothing says who signs",
    "LOG_FORMAT": "`console`",
    "METRICS_PORT": "none",
    "METRICS_TOKEN": "none",
    "TRUSTED_PROXIES": "none",
    "RATE_LIMIT_STORAGE_URL": "none",
}


def _rows(heading: str) -> list[list[str]]:
    section = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def test_readme_lists_every_setting_with_its_default() -> None:
    table = {name.strip("`"): default for name, default, _ in _rows("Settings")}

    assert set(table) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else str(field.default)
        assert table[name.upper()] == DEFAULTS_IN_WORDS.get(name.upper(), f"`{default}`")


def test_the_example_lists_every_setting_with_its_default() -> None:
    lines = re.findall(r"^#?([A-Z_]+)=(.*)$", (PROJECT / ".env.example").read_text(), re.MULTILINE)

    assert {name for name, _ in lines} == {name.upper() for name in Settings.model_fields}
    for name, value in lines:
        default = Settings.model_fields[name.lower()].default
        assert value == ("" if default is None else str(default).lower() if default is not None else "")


def test_readme_lists_every_endpoint(app: FastAPI) -> None:
    assert _table_of_endpoints("Endpoints") == _endpoints(app)


def test_readme_lists_every_endpoint_of_local_accounts(app: FastAPI, database_url: str) -> None:
    with_accounts = create_app(settings_for(database_url, local_accounts=True))

    assert _table_of_endpoints("Local accounts") == _endpoints(with_accounts) - _endpoints(app)


def _table_of_endpoints(heading: str) -> set[tuple[str, str]]:
    return {(method, path.strip("`")) for method, path, _ in _rows(heading)}


def _endpoints(app: FastAPI) -> set[tuple[str, str]]:
    return {
        (method.upper(), path) for path, operations in app.openapi()["paths"].items() for method in operations
    }


def test_readme_names_every_parameter_of_the_list(app: FastAPI) -> None:
    section = README.partition("The list is filtered by")[2].partition("`PATCH`")[0]
    parameters = app.openapi()["paths"]["/api/{user_id}/tasks"]["get"]["parameters"]

    named = set(re.findall(r"`([a-z_]+)`", section))
    assert named == {each["name"] for each in parameters if each["in"] == "query"}


def test_readmes_example_has_every_member_of_a_task() -> None:
    line = next(line for line in README.splitlines() if line.startswith('{"id":1,'))

    assert set(json.loads(line)) == set(TaskOut.model_fields)


def test_claude_md_lists_the_floors_that_are_checked() -> None:
    text = (PROJECT / "CLAUDE.md").read_text()
    rows = re.findall(r"^\| \d+ \| (.*) \|$", text, re.MULTILINE)

    assert [set(re.findall(r"`([a-z_]+)`", row)) for row in rows] == FLOORS


Function = ast.FunctionDef | ast.AsyncFunctionDef


def _collected() -> dict[str, Function]:
    """Return the functions that pytest collects as tests, by name."""
    modules = [ast.parse(path.read_text()) for path in sorted((PROJECT / "tests").glob("test_*.py"))]
    found = [node for module in modules for node in module.body if isinstance(node, Function)]
    return {each.name: each for each in found if each.name.startswith("test_")}


def _can_fail(test: Function) -> bool:
    """Whether *test* is never skipped and asserts: by itself, by `raises` or by an `assert_…` helper."""
    marks = " ".join(map(ast.unparse, test.decorator_list))
    claims = [
        node
        for node in ast.walk(test)
        if (isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant))
        or (isinstance(node, ast.Call) and re.search(r"(^|\.)(_?assert_\w+|raises)$", ast.unparse(node.func)))
    ]
    return bool(claims) and not re.search(r"mark\.(skip|xfail)", marks)


def test_security_names_tests_that_are_run_and_can_fail() -> None:
    table = (PROJECT / "SECURITY.md").read_text().partition("## Threats\n")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    named = [re.findall(r"`(test_[a-z0-9_]+)`", row.split(" | ")[-1]) for row in rows]
    collected = _collected()

    assert len(rows) > 15
    assert [row for row, names in zip(rows, named, strict=True) if not names] == []
    names = {name for names in named for name in names}
    assert {name for name in names if name not in collected} == set()
    assert {name for name in names if not _can_fail(collected[name])} == set()


@pytest.mark.parametrize(
    "source",
    [
        "def test_nothing():\n    pass",
        "def test_nothing():\n    assert True",
        "def test_nothing():\n    print('assert 1 == 2')",
        "@pytest.mark.skip\ndef test_nothing():\n    assert answer == 1",
        "@pytest.mark.xfail(reason='later')\nasync def test_nothing():\n    assert answer == 1",
    ],
)
def test_a_test_that_cannot_fail_is_noticed(source: str) -> None:
    (test,) = ast.parse(source).body

    assert isinstance(test, Function)
    assert not _can_fail(test)


def test_readme_maps_every_module() -> None:
    mapped = set(re.findall(r"`([a-z_]+\.py|[a-z]+/)`", README.partition("## Map\n")[2]))
    packages = {path.parent for path in PROJECT.glob("*/__init__.py")} - {PROJECT / "bench"}
    folders = {PROJECT, *packages} - {
        PROJECT / name for name in ("middleware", "migrations", "routes", "tests")
    }
    modules = {path.name for folder in folders for path in folder.glob("*.py")} - {"__init__.py"}

    assert mapped >= modules | {f"{path.name}/" for path in packages}
    assert {name for name in mapped if not any(PROJECT.glob(f"**/{name}"))} == set()


def test_documents_name_files_that_exist() -> None:
    files = {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("*/**/*.*")}
    for document in (*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")):
        text = document.read_text()
        named = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|yml|lua))`", text))
        assert named <= files, (document.name, named - files)
