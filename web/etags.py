"""Entity tags (RFC 9110, section 8.8.3): a task's is its version, a list's contains its owner's revision."""

import hashlib
import re
from functools import lru_cache
from typing import Any

from errors import invalid_parameter
from schemas import TaskOut

LIST_MAX = 4096  # characters of a header; a list's tag has at most 38
TAGS_MAX = 100  # each that names a version becomes a value of the statement

_TAG = r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"'
# A tag may contain commas, and elements may be empty (RFC 9110, section 5.6.1.2). Matching takes linear time,
# because the text between two tags matches in one way only: white space, the first comma, and the rest.
_LIST = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
# The same for the OpenAPI document, in characters that every client can send.
LIST_PATTERN = r'^(\*|(W/)?"[!#-~]*"(, ?(W/)?"[!#-~]*")*)$'
_VERSION = re.compile("[1-9][0-9]{0,8}")


def write(version: int) -> str:
    return f'"{version}"'


@lru_cache(256)
def _fingerprint(*query: Any) -> str:
    # A release with another field answers the same query differently.
    seen = repr((*query, *TaskOut.model_fields)).encode(errors="surrogatepass")
    return hashlib.blake2b(seen, digest_size=8).hexdigest()


def of_list(revision: int, *query: Any) -> str:
    """Return the tag of what *query* finds among the tasks of an owner in *revision*."""
    return f'"{revision}-{_fingerprint(*query)}"'


def expected_versions(if_match: str | None) -> list[int] | None:
    """Return the versions that an If-Match allows; None for any.

    Raises:
        Unprocessable: the header is no list of entity tags.
    """
    if if_match is None or if_match.strip() == "*":
        return None
    # If-Match compares strongly: a weak tag never matches (section 13.1.1).
    return [int(tag) for weak, tag in _tags("If-Match", if_match) if not weak and _VERSION.fullmatch(tag)]


def is_known(tag: str, if_none_match: str | None) -> bool:
    """Return whether an If-None-Match names *tag*, so that the client has it already.

    Raises:
        Unprocessable: the header is no list of entity tags.
    """
    if if_none_match is None:
        return False
    if if_none_match.strip() == "*":
        return True
    return tag[1:-1] in {opaque for _, opaque in _tags("If-None-Match", if_none_match)}


def _tags(header: str, value: str) -> list[tuple[str, str]]:
    if len(value) > LIST_MAX:
        raise invalid_parameter(header, f"must be at most {LIST_MAX} characters")
    if not _LIST.fullmatch(value):
        raise invalid_parameter(header, 'must be entity tags like "3"')
    tags = re.findall(_TAG, value)
    if len(tags) > TAGS_MAX:
        raise invalid_parameter(header, f"must be at most {TAGS_MAX} entity tags")
    return tags
