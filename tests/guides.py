"""The blocks of SQL in the guides, and how they are run."""

import re
from urllib.parse import urlsplit

import asyncpg

from tests.service import PROJECT

DEPLOY, CITUS = ((PROJECT / "docs" / f"{name}.md").read_text() for name in ("deploy", "citus"))
_BLOCK = re.compile(r"^```sql (.+)\n((?:.*\n)*?)```$", re.MULTILINE)
_SQL: dict[str, str] = dict(_BLOCK.findall(DEPLOY) + _BLOCK.findall(CITUS))


def sql(title: str) -> str:
    return _SQL[title]


def url_as(role: str, url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{parts.hostname}:{parts.port}").geturl()


async def execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()
