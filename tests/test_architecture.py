import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).parent.parent

# As in CLAUDE.md: each floor imports only from floors below.
FLOORS = [
    {"errors", "observability", "refusals", "tls"},
    {"database"},
    {"db", "models"},
    {"schemas"},
    {"web"},
    {"auth", "queries"},
    {"config", "live", "server"},
    {"commands", "migrations", "services"},
    {"middleware"},
    {"routes"},
    {"main"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
PACKAGES = {path.parent.name for path in PROJECT.glob("*/__init__.py")} - {"bench", "tests"}
INDEPENDENT = {"routes"}  # modules of these packages do not import one another
READERS_OF_CONFIG = {"main.py", "commands.py", "services.py", "migrations/env.py"}


def _imports() -> dict[str, set[str]]:
    """Return, for each file of the project, the paths of the project's files that it imports."""
    files = {
        path.relative_to(PROJECT).as_posix(): path
        for path in PROJECT.rglob("*.py")
        if path.relative_to(PROJECT).parts[0].removesuffix(".py") in FLOOR
    }
    return {
        name: {
            file
            for module in _imported_names(ast.parse(path.read_text()))
            if (file := f"{module.replace('.', '/')}.py") in files
        }
        for name, path in files.items()
    }


def _imported_names(tree: ast.Module) -> set[str]:
    """Return the possible modules of each import: `a` and `a.b` for `from a import b`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def _room(file: str) -> str:
    return file.split("/")[0].removesuffix(".py")


def test_every_module_and_package_has_a_floor() -> None:
    modules = {path.stem for path in PROJECT.glob("*.py")}

    assert modules | PACKAGES | {"migrations"} == FLOOR.keys()


def test_imports_go_to_lower_floors_only() -> None:
    imports = _imports()
    assert sum(map(len, imports.values())) > 200

    for file, imported in imports.items():
        own = _room(file)
        inside = set() if own in INDEPENDENT else {own}
        rooms = {_room(other) for other in imported} - inside
        assert [room for room in rooms if FLOOR[room] >= FLOOR[own]] == [], file


def test_imports_have_no_cycle() -> None:
    assert len(list(TopologicalSorter(_imports()).static_order())) > 60


def test_every_package_init_holds_only_a_docstring() -> None:
    for package in PACKAGES:
        tree = ast.parse((PROJECT / package / "__init__.py").read_text())
        assert len(tree.body) == 1, package
        assert ast.get_docstring(tree), package


def test_only_the_listed_entry_points_import_config() -> None:
    assert {file for file, imported in _imports().items() if "config.py" in imported} == READERS_OF_CONFIG


def test_no_module_shadows_the_standard_library() -> None:
    assert FLOOR.keys().isdisjoint(sys.stdlib_module_names)
