"""The titled blocks of the guides, and how SQL of them is run."""

import re
from urllib.parse import urlsplit

import asyncpg

from tests.service import PROJECT

DEPLOY, CITUS, CELLS = (
    (PROJECT / "docs" / f"{name}.md").read_text() for name in ("deploy", "citus", "cells")
)
_TITLED = re.compile(r"^```\w+ ([^\n]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_BLOCKS: dict[str, str] = dict(_TITLED.findall("\n".join((DEPLOY, CITUS, CELLS))))


def block(title: str) -> str:
    """Return the block of a guide whose fence ends with *title*."""
    return _BLOCKS[title]


def url_as(role: str, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()


async def execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()
