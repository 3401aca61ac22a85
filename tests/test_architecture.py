import ast
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent

# As in CLAUDE.md: each floor imports only from floors below; `routes` may use `middleware`.
FLOORS = [
    {
        "arrays",
        "attempts",
        "config",
        "errors",
        "logs",
        "metrics",
        "models",
        "passwords",
        "paths",
        "pool",
        "recurring",
        "refusals",
        "request_state",
        "statements",
        "strict_json",
        "task_limit",
        "tls",
    },
    {"connections", "counts", "database_url", "etags", "failures", "fair_share", "heads", "jwks", "schemas"},
    {"base", "cursors", "listing", "problems", "rate_limits", "tokens"},
    {"accounts", "local_accounts", "openapi", "postgres", "protocol", "queries", "readiness", "sqlite"},
    {"bulk", "db", "idempotency", "run", "startup", "telemetry"},
    {"commands", "migrations", "services"},
    {"middleware"},
    {"routes"},
    {"main"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
READERS_OF_CONFIG = {"main.py", "commands.py", "services.py", "migrations/env.py"}


def _imports() -> dict[str, set[str]]:
    """Return, for each of our files, the rooms that it imports."""
    files = [
        path
        for path in PROJECT.rglob("*.py")
        if path.relative_to(PROJECT).parts[0].removesuffix(".py") in FLOOR
    ]
    found = {}
    for path in files:
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {
            name
            for node in nodes
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        rooms = {name.split(".")[0] for name in names} & FLOOR.keys()
        found[path.relative_to(PROJECT).as_posix()] = rooms
    return found


def test_every_module_has_a_floor() -> None:
    assert {path.stem for path in PROJECT.glob("*.py")} <= FLOOR.keys()


def test_imports_lead_downstairs_only() -> None:
    imports = _imports()
    assert len(imports) > 15

    for file, rooms in imports.items():
        own = file.split("/")[0].removesuffix(".py")
        inside = {own} if own == "migrations" else set()  # they share how an index is built
        assert not [room for room in rooms - inside if FLOOR[room] >= FLOOR[own]], file


def test_only_the_entrances_know_the_settings() -> None:
    assert {file for file, rooms in _imports().items() if "config" in rooms} == READERS_OF_CONFIG


def test_no_module_takes_a_name_that_is_taken() -> None:
    own = {path.stem for path in PROJECT.glob("*.py")} | {"middleware", "routes", "migrations"}

    assert own.isdisjoint(sys.stdlib_module_names)
