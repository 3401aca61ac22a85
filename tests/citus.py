"""A database that Citus distributes, set up as `docs/citus.md` says."""

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import asyncpg

import db
from server.startup import migrate
from tests.guides import block, execute, url_as

SHARDS = 4
ROLES = ("tasks_migration", "tasks_service")


@dataclass
class Cluster:
    """Nodes as a superuser reaches them, the coordinator first."""

    servers: list[str]
    has_database: bool = False

    @classmethod
    def at(cls, url: str) -> "Cluster":
        """Return the cluster whose nodes are the hosts of *url*: `postgresql://postgres@one:5432,two:5432`."""
        scheme, _, rest = url.partition("://")
        user, _, hosts = rest.partition("/")[0].rpartition("@")
        return cls([f"{scheme}://{user}@{host}/postgres" for host in hosts.split(",")])

    @property
    def nodes(self) -> list[str]:
        return [urlsplit(server)._replace(path="/tasks").geturl() for server in self.servers]

    @property
    def url(self) -> str:
        return self.nodes[0]

    def url_as(self, role: str) -> str:
        return url_as(role, self.url)

    async def run(self, title: str, role: str | None = None) -> None:
        """Run a block of the guides on the coordinator, with the addresses of this cluster's nodes."""
        statements = block(title)
        for number, server in enumerate(self.servers, 1):
            address = urlsplit(server)
            here = f"'{address.hostname}', {address.port or 5432}"
            statements = statements.replace(f"'10.0.0.{number}', 5432", here)
        assert "10.0.0." not in statements, f"the guide has more nodes than TEST_CITUS_URL: {statements}"
        connection = await asyncpg.connect(self.url_as(role) if role else self.url)
        try:
            for statement in statements.split(";\n")[:-1]:  # each its own transaction, as psql runs them
                await connection.execute(statement)
        finally:
            await connection.close()

    async def rows(self, query: str) -> list[Any]:
        """Return what a superuser sees on the coordinator."""
        connection = await asyncpg.connect(self.url)
        try:
            return [tuple(row) for row in await connection.fetch(query)]
        finally:
            await connection.close()

    async def make_database(self) -> None:
        """Make the database `tasks` and its roles anew, once in this process."""
        if self.has_database:
            return
        self.has_database = True
        await self._drop()
        for server, node in zip(self.servers, self.nodes, strict=True):
            await execute(server, "CREATE DATABASE tasks")
            await execute(node, block("on every node"))
        await self.run("nodes")
        # Few shards, because moving each takes some seconds.
        await execute(self.url, f"ALTER DATABASE tasks SET citus.shard_count = {SHARDS}")
        await self.run("before migrating")
        await asyncio.to_thread(migrate, db.connect(self.url_as("tasks_migration"), pool_size=1))
        await self.run("after migrating", "tasks_migration")
        await self.run("distributing", "tasks_migration")

    async def _drop(self) -> None:
        for server in self.servers:
            await execute(server, "DROP DATABASE IF EXISTS tasks WITH (FORCE)")
        for server in self.servers:
            for role in ROLES:
                await execute(server, f"DROP ROLE IF EXISTS {role}")
