"""Whether requests can be served: the database answers, and its schema is as new as this code needs."""

import ast
import asyncio
from pathlib import Path

from sqlalchemy import String, column, func, select, table

from database.base import Database
from database.statements import PerDatabase, named
from errors import NotMigrated, Unavailable

TIMEOUT_S = 1.2  # so that a probe is answered within 2 s, whatever the database does
AWAY = "The database cannot be used right now"
OUTDATED = "The database's schema is not migrated: run alembic upgrade head"
VERSIONS = Path(__file__).parent.parent / "migrations" / "versions"

_TABLE = "task_schema_version"
_SELECT_REVISION = named("schema_version", select(column("version_num", String())).select_from(table(_TABLE)))
_FIND_TABLE = PerDatabase(
    named("find_schema_version", select(func.to_regclass(_TABLE).is_not(None).label("exists"))),
    named(
        "find_schema_version",
        select((func.count() > 0).label("exists"))
        .select_from(table("sqlite_master"))
        .where(column("name") == _TABLE),
    ),
    writes=False,
)


class Readiness:
    def __init__(self, database: Database, versions: Path = VERSIONS) -> None:
        self._database = database
        self._outdated = outdated_revisions(versions)
        self._looking: asyncio.Task[str | None] | None = None
        self.is_awaited = True  # by a start

    async def not_ready_reason(self) -> str | None:
        """Return why requests cannot be served, or None. Concurrent callers share one check."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        return await asyncio.shield(self._looking)

    def stop_waiting(self) -> None:
        """End the wait of a start. A handler of signals may call it."""
        self.is_awaited = False

    async def is_migrated(self) -> bool:
        """Return whether the schema is as new as this code needs.

        It looks for the table first, because reading one that is missing would be logged as a failure.
        """
        async with asyncio.timeout(TIMEOUT_S):
            [found] = await self._database.all(_FIND_TABLE)
        return found["exists"] and await self.not_ready_reason() is None

    async def _look(self) -> str | None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                rows = await self._database.all(_SELECT_REVISION)
        except NotMigrated:
            return OUTDATED
        except (Unavailable, TimeoutError):
            return AWAY
        # An unknown revision is a newer one, because migrations run before the code that needs them.
        return OUTDATED if not rows or rows[0]["version_num"] in self._outdated else None


def outdated_revisions(versions: Path) -> frozenset[str]:
    """Return every revision that has a successor; asking Alembic would take half a second."""
    found = (_assigned(path.read_text(encoding="utf-8"), "down_revision") for path in versions.glob("*.py"))
    return frozenset(revision for revision in found if revision)


def _assigned(source: str, name: str) -> str | None:
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign)  # noqa: S101 - for the type checker
            value: str | None = ast.literal_eval(node.value)
            return value
    return None
