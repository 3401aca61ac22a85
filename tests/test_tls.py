"""TLS handshakes of real clients, on a Python without a default minimum version, like Debian's."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import asyncpg
import pytest

from auth.jwks import FetchedKeys, KeysUnavailable
from database import urls
from web.counters import LocalStorage, SharedStorage


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLContext]:
    """The SSL contexts of all handshakes that are started."""
    used: list[ssl.SSLContext] = []
    new, wrap_bio = ssl.SSLContext.__new__, ssl.SSLContext.wrap_bio

    def new_without_minimum(*args: Any, **options: Any) -> ssl.SSLContext:
        context: ssl.SSLContext = new(*args, **options)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        return context

    def recorded(context: ssl.SSLContext, *args: Any, **options: Any) -> ssl.SSLObject:
        used.append(context)
        return wrap_bio(context, *args, **options)

    monkeypatch.setattr(ssl.SSLContext, "__new__", new_without_minimum)
    monkeypatch.setattr(ssl.SSLContext, "wrap_bio", recorded)
    return used


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """A listener that accepts TLS, as PostgreSQL does, and then disconnects."""

    async def agree(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(8) == b"\0\0\0\x08\x04\xd2\x16\x2f":  # SSLRequest
            writer.write(b"S")
            await reader.read(1)
        writer.close()

    server = await asyncio.start_server(agree, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def _ask_database(port: int, sslmode: str) -> None:
    target = urls.parse(f"postgresql://alice@127.0.0.1:{port}/tasks?sslmode={sslmode}")
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        await asyncpg.connect(**target.arguments)


async def _ask_issuer(port: int) -> None:
    keys = FetchedKeys(f"https://127.0.0.1:{port}/jwks")
    await keys.open()
    with pytest.raises(KeysUnavailable):
        await keys.key("any")
    await keys.close()


async def _ask_redis(port: int) -> None:
    storage = SharedStorage(f"rediss://127.0.0.1:{port}", LocalStorage())
    await storage.incr("alice", 60)
    await storage.close()


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda port: _ask_database(port, "prefer"), id="database, preferred"),
        pytest.param(lambda port: _ask_database(port, "require"), id="database, required"),
        pytest.param(lambda port: _ask_database(port, "verify-full"), id="database, verified"),
        pytest.param(_ask_issuer, id="issuer"),
        pytest.param(_ask_redis, id="redis"),
    ],
)
async def test_every_client_wants_at_least_tls_1_2(
    ask: Callable[[int], Awaitable[None]], port: int, used: list[ssl.SSLContext]
) -> None:
    await ask(port)

    assert used
    assert {context.minimum_version for context in used} == {ssl.TLSVersion.TLSv1_2}
