"""Which of our routes answers a request, found by its method and the parts of its path.

The framework tries one pattern after another, through several layers of included routers. Requests that the
table does not know (health, metrics, documentation, 404, 405) are left to the framework.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi.routing import RouteContext, iter_route_contexts
from starlette.convertors import Convertor
from starlette.routing import BaseRoute
from starlette.types import Scope

from web.direct_route import DirectRoute

_ANY_PART = "[^/]+"


class _Parameter(NamedTuple):
    position: int
    name: str
    convertor: Convertor[Any]
    pattern: re.Pattern[str] | None  # None where any part will do


class _Entry(NamedTuple):
    literals: list[tuple[int, str]]
    parameters: list[_Parameter]
    route: DirectRoute
    context: RouteContext

    def values(self, parts: list[str]) -> dict[str, Any] | None:
        """Return the values of the path's parameters, or None if *parts* are not of this route."""
        for position, text in self.literals:
            if parts[position] != text:
                return None
        values = {}
        for position, name, convertor, pattern in self.parameters:
            part = parts[position]
            if not part or (pattern and not pattern.fullmatch(part)):
                return None
            values[name] = convertor.convert(part)
        return values


class RouteTable:
    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._entries: dict[tuple[str, int], list[_Entry]] = defaultdict(list)  # in the order of declaration
        for context in iter_route_contexts(routes):
            if isinstance(context.original_route, DirectRoute):
                parts = (context.path_format or "").split("/")
                for method in context.methods or ():
                    self._entries[method, len(parts)].append(_entry(context, context.original_route, parts))

    def find(self, scope: Scope) -> DirectRoute | None:
        """Return the route of *scope*, with the path's parameters in it, or None if it is the framework's."""
        if scope.get("root_path") or "fastapi.telemetry" in scope:  # its spans are named by the framework
            return None
        parts = scope["path"].split("/")
        for entry in self._entries.get((scope["method"], len(parts)), ()):
            if (values := entry.values(parts)) is not None:
                scope["path_params"] = values
                scope["fastapi"] = {"effective_route_context": entry.context}  # as the framework notes it
                return entry.route
        return None


def _entry(context: RouteContext, route: DirectRoute, parts: list[str]) -> _Entry:
    literals, parameters = [], []
    for position, part in enumerate(parts):
        if part.startswith("{"):
            name = part[1:-1]
            convertor = context.param_convertors[name]
            pattern = None if convertor.regex == _ANY_PART else re.compile(convertor.regex)
            parameters.append(_Parameter(position, name, convertor, pattern))
        else:
            literals.append((position, part))
    return _Entry(literals, parameters, route, context)
