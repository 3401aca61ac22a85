"""JSON that means one thing only: UTF-8, each member once, finite numbers (RFC 8259, RFC 7493)."""

import json
from typing import Any


class NotStrictJson(ValueError):
    """Holds a clause that completes "the body ...", for instance "has a member twice"."""


def loads(text: bytes) -> Any:
    """Parse *text*.

    Raises:
        NotStrictJson: two parsers could read *text* differently.
    """
    try:
        return _DECODER.decode(text.decode())
    except UnicodeDecodeError as error:
        raise NotStrictJson("is not valid UTF-8") from error
    except json.JSONDecodeError as error:
        raise NotStrictJson(f"is not valid JSON at character {error.pos}") from error
    except NotStrictJson:
        raise
    except ValueError as error:  # Python refuses integers of more than 4,300 digits
        raise NotStrictJson("has a number that is too long") from error
    except RecursionError as error:
        raise NotStrictJson("is nested too deeply") from error


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise NotStrictJson("has a member twice")
    return members


def _constant(name: str) -> float:
    raise NotStrictJson(f"has the number {name}, which JSON does not know")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise NotStrictJson("has a number that is too large")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_members, parse_constant=_constant, parse_float=_finite)
