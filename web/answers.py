"""JSON responses, encoded without validation: the database's values are valid already."""

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from database.statements import Row
from web import etags

JSON = "application/json"
PAGE_MAX_BYTES = 1024 * 1024  # an answer stays in memory until its client has read it
_CONTENT_TYPE = (b"content-type", JSON.encode())


class JSONAnswer(Response):
    """*body*, which is encoded already. Starlette's own way of building the headers takes 4 µs."""

    def __init__(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), _CONTENT_TYPE]
        for name, value in (headers or {}).items():
            self.raw_headers.append((name.lower().encode(), value.encode("latin-1")))


dump = msgspec.json.Encoder().encode


def json_answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> JSONAnswer:
    return JSONAnswer(dump(content), status, headers)


def task_answer(row: Row, status: int = 200, headers: Mapping[str, str] | None = None) -> JSONAnswer:
    return json_answer(row, status, {"ETag": etags.write(row["version"]), **(headers or {})})


def dump_page(items: list[Any]) -> tuple[bytes, int]:
    """Return the JSON array of the first *items* that fit into a page, at least one, and their number."""
    body = dump(items)
    if len(body) <= PAGE_MAX_BYTES:
        return body, len(items)
    parts: list[bytes] = []
    size = 1
    for part in map(dump, items):
        size += len(part) + 1
        if size > PAGE_MAX_BYTES and parts:
            break
        parts.append(part)
    return b"[" + b",".join(parts) + b"]", len(parts)
