"""Paths as clients send them: probes, and encoded slashes (`%2F`) in the parts of a path.

An encoded slash does not split the path, and is encoded again in links.

`/api/a%2Fb/tasks` has the tasks of the user `a/b`. The server decodes a path as a whole, after which `%2F`
looks like any other slash (RFC 3986, section 2.2).
"""

from typing import Annotated
from urllib.parse import quote, unquote, unquote_to_bytes

from fastapi import Path
from pydantic import BeforeValidator
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.types import Scope

from schemas import ID_MAX, digits

TaskId = Annotated[int, Path(ge=1, le=ID_MAX), BeforeValidator(digits)]

# Stands for an encoded slash until the path has been split. No client can send it: bytes that are not UTF-8
# are decoded as U+FFFD.
_SLASH = "\udc2f"

PROBES = (b"/health", b"/health/ready")  # never refused: a restart may depend on their answer


def is_probe(raw_path: bytes) -> bool:
    """Return whether *raw_path*, as it was sent, is that of a probe, with or without a slash at the end."""
    return raw_path.removesuffix(b"/") in PROBES


def is_monitoring(scope: Scope) -> bool:
    """Return whether *scope* is a probe or a scrape of the metrics."""
    return is_probe(scope["raw_path"]) or scope["path"].removesuffix("/") == "/metrics"


def decode(raw_path: bytes) -> str:
    """Return the path that *raw_path* encodes, with its encoded slashes marked."""
    parts = raw_path.decode("latin-1").split("/")
    return "/".join(unquote(part).replace("/", _SLASH) for part in parts)


class PartConvertor(StringConvertor):
    """A part of the path, which may contain slashes."""

    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")


class TaskConvertor(StringConvertor):
    """Any part but the fixed names beside it. An invalid id matches too, so that it gets 422, not 404."""

    regex = "(?!(?:stats|bulk|changes|events|restore|trash)(?:/|$))[^/]+"


register_url_convertor("part", PartConvertor())
register_url_convertor("task", TaskConvertor())


def normalize(scope: Scope) -> bool:
    """Keep encoded slashes and drop one at the end; return False if nothing can be at the path of *scope*.

    `/api/alice/tasks/` is answered as `/api/alice/tasks`: a redirect would repeat the Host header that a
    stranger sent. `/api/alice/tasks%0A` is nothing, though `$`, with which the patterns of the routes end,
    would take it. Nor is a path that is not UTF-8: invalid
    bytes decode to U+FFFD, so many paths would name one user. The path is changed in place.
    """
    if b"%2" in scope["raw_path"] and b"%2F" in scope["raw_path"].upper():  # the first test is the faster
        scope["path"] = decode(scope["raw_path"])
    if scope["path"].endswith("/") and scope["path"] != "/":
        scope["path"] = scope["path"][:-1]
    if "\ufffd" in scope["path"] and not _is_utf8(scope["raw_path"]):
        return False
    return not scope["path"].endswith("\n")


def _is_utf8(raw_path: bytes) -> bool:
    try:
        unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        return False
    return True


def quoted_path(scope: Scope) -> str:
    """Return the path of *scope* as a client has to send it."""
    return "%2F".join(quote(part) for part in scope["path"].split(_SLASH))
