import json
import re
from pathlib import Path

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
    assert named == {each["name"] for each in parameters} - {"user_id"}


def test_readmes_example_has_every_member_of_a_task() -> None:
    line = next(line for line in README.splitlines() if line.startswith('{"id":1,'))

    assert set(json.loads(line)) == set(TaskOut.model_fields)


def test_contributors_read_the_floors_that_are_checked() -> None:
    text = (PROJECT / "CLAUDE.md").read_text()
    rows = re.findall(r"^\| \d \| (.*) \|$", text, re.MULTILINE)

    rooms = [set(re.findall(r"`([a-z_]+)(?:/\*|/env\.py)?`", row)) for row in rows]
    assert [found - {"config"} for found in rooms] == [floor - {"config"} for floor in FLOORS]


def test_security_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", (PROJECT / "SECURITY.md").read_text()))
    sources = "".join(path.read_text() for path in (PROJECT / "tests").glob("test_*.py"))

    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_readme_maps_every_module() -> None:
    mapped = set(re.findall(r"`([a-z_]+\.py|[a-z]+/)`", README.partition("## Map\n")[2]))
    modules = {path.name for path in PROJECT.glob("*.py")}

    assert modules - mapped == set()
    assert {name for name in mapped if not (PROJECT / name).exists()} == set()
