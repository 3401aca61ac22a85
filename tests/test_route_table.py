import random
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import RouteContext, iter_route_contexts

from main import create_app
from tests.conftest import settings_for
from web.direct_route import DirectRoute
from web.route_table import RouteTable

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
PARTS = (
    "", "api", "v1", "auth", "token", "sign-up", "email", "alice", "a\udc2fb", "tasks", "stats", "statsx",
    "bulk", "3", "x", "complete", "{task_id}", "a\nb", "trash", "restore", "changes", "events",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    url = f"sqlite:///{tmp_path_factory.mktemp('routes') / 'tasks.db'}"
    return create_app(settings_for(url, local_accounts=True))


def scope_of(method: str, path: str, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, **more}


def _by_patterns(
    contexts: list[RouteContext], method: str, path: str
) -> tuple[object, dict[str, Any]] | None:
    """Route as the framework does: the first declared route whose pattern matches."""
    for context in contexts:
        matched = context.path_regex.match(path) if context.path_regex else None
        if matched and method in (context.methods or ()):
            if not isinstance(context.original_route, DirectRoute):
                return None
            convertors = context.param_convertors
            return context.original_route, {
                name: convertors[name].convert(value) for name, value in matched.groupdict().items()
            }
    return None


@pytest.mark.no_cover  # coverage of the same lines many times is slow
def test_the_table_routes_as_the_patterns_do(built: FastAPI) -> None:
    table, choose = RouteTable(built.routes), random.Random(1)
    paths = {
        "/".join(["", *(choose.choice(PARTS) for _ in range(choose.randint(1, 6)))]) for _ in range(4_000)
    }
    paths |= {
        "/".join(["", *prefix, user, "tasks", *rest])
        for prefix in (["api"], ["api", "v1"])
        for user in PARTS
        for rest in ([], *([part] for part in PARTS), *([part, end] for part in PARTS for end in PARTS))
    }
    contexts = list(iter_route_contexts(built.routes))
    found = 0

    for path in paths:
        for method in METHODS:
            scope = scope_of(method, path)
            route = table.find(scope)
            expected = _by_patterns(contexts, method, path)
            assert (route and (route, scope["path_params"])) == expected, (method, path)
            found += route is not None

    assert found > 500


@pytest.mark.parametrize("more", [{"root_path": "/behind"}, {"fastapi.telemetry": object()}])
def test_root_path_and_telemetry_scopes_are_left_to_the_framework(
    built: FastAPI, more: dict[str, Any]
) -> None:
    table = RouteTable(built.routes)

    assert table.find(scope_of("GET", "/api/alice/tasks")) is not None
    assert table.find(scope_of("GET", "/api/alice/tasks", **more)) is None


def test_every_operation_but_health_is_in_the_table(built: FastAPI) -> None:
    table = RouteTable(built.routes)
    left = {
        f"{method.upper()} {path}"
        for path, operations in built.openapi()["paths"].items()
        for method in operations
        if table.find(scope_of(method.upper(), path)) is None
    }

    assert left == {"GET /health", "GET /health/ready"}
