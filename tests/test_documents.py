import re
from pathlib import Path

from fastapi import FastAPI

from config import Settings
from main import create_app
from tests.conftest import settings_for

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
    "LOCAL_ACCOUNTS": "true when embedded",
    "LOG_FORMAT": "`console`",
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


def test_readme_maps_every_module() -> None:
    mapped = set(re.findall(r"`([a-z_]+\.py|[a-z]+/)`", README.partition("## Map\n")[2]))
    modules = {path.name for path in PROJECT.glob("*.py")}

    assert modules - mapped == set()
    assert {name for name in mapped if not (PROJECT / name).exists()} == set()
