"""If-Match and If-None-Match (RFC 9110, section 13): their declarations, and the versions that they allow."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Header, Request

from database.statements import Row
from errors import invalid_parameter
from refusals import VersionConflict
from web import etags
from web.request_state import headers_of

IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match",
        description="Only if the task still has one of these `ETag`s; else 412.",
        examples=['"3"'],
        json_schema_extra={"pattern": etags.LIST_PATTERN},
    ),
]
IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match",
        description="Only if the resource has none of these `ETag`s; else 304 for a GET, 412 for a change.",
        examples=['"3"'],
        json_schema_extra={"pattern": etags.LIST_PATTERN},
    ),
]


async def expected_versions(
    if_match: str | None, if_none_match: str | None, read: Callable[[], Awaitable[Row]]
) -> list[int] | None:
    """Return the versions of a task that may be changed; None for any.

    The change itself compares them again: if the task changes in between, it no longer has the version that
    If-None-Match was compared with, and the answer is 412 as well. *read* returns the task, where its version
    is needed, and may raise a refusal.

    Raises:
        VersionConflict: a condition excludes its version (RFC 9110, section 13.2.2).
        Unprocessable: a header is no list of entity tags.
    """
    versions = etags.expected_versions(if_match)
    if if_none_match is None:
        return versions
    row = await read()
    version: int = row["version"]
    if (versions is not None and version not in versions) or etags.is_known(
        etags.write(version), if_none_match
    ):
        raise VersionConflict(row)
    return [version]


def refuse_conditions(request: Request) -> None:
    """Refuse conditions on what has no `ETag`: ignoring them would silently drop the protection.

    Raises:
        Unprocessable: there is one.
    """
    sent = headers_of(request.scope)
    for name in ("If-Match", "If-None-Match"):
        if name.lower().encode() in sent:
            raise invalid_parameter(name, "is for single tasks only")
