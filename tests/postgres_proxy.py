"""A TCP proxy in front of PostgreSQL that records the statements and counts the round trips."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

_SSL_REQUEST = 80877103


class Proxy:
    """Records what clients send, by the protocol in PostgreSQL's manual, chapter 55."""

    def __init__(self, url: str, delay_s: float = 0.0) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._parts = parts
        self._delay_s = delay_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self._swallowed: set[asyncio.Task[None] | None] = set()
        self._on_loss: Callable[[], Awaitable[None]] | None = None
        self._cuts_next = False
        self.port = 0
        self.statements: list[str] = []
        self.round_trips = 0

    @property
    def url(self) -> str:
        """The database's URL through the proxy."""
        user = f"{self._parts.username}@" if self._parts.username else ""
        return self._parts._replace(netloc=f"{user}127.0.0.1:{self.port}").geturl()

    def swallow(self, *, new_ones_too: bool = False) -> None:
        """Drop all data of the current connections, as a router does that has lost their state."""
        self._swallowed |= self._tasks
        if new_ones_too:
            self.hold()

    def lose_next_answer(self, then: Callable[[], Awaitable[None]]) -> None:
        """Drop the server's response to the next statement, call *then* and cut the connection."""
        self._on_loss = then

    def cut_after_next_statement(self) -> None:
        """Cut the connection after the next statement is sent; the server may still run it."""
        self._cuts_next = True

    def hold(self) -> None:
        """Accept connections but forward nothing until `release`."""
        self._passing.clear()

    def release(self) -> None:
        self._passing.set()

    def clear(self) -> None:
        self.statements.clear()
        self.round_trips = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._passing.wait()
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:  # the server is down: close the client's connection too
            writer.transport.abort()
            return
        upstream = asyncio.create_task(self._upstream(reader, server_writer))
        downstream = asyncio.create_task(self._downstream(server_reader, writer))
        self._tasks |= {upstream, downstream}
        await asyncio.wait({upstream, downstream}, return_when=asyncio.FIRST_COMPLETED)
        for stream in (writer, server_writer):
            stream.close()
        await asyncio.gather(upstream, downstream, return_exceptions=True)
        self._tasks -= {upstream, downstream}

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _upstream(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        names: dict[bytes, str] = {}
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            started = False
            while True:
                kind = await reader.readexactly(1) if started else b""
                head = await reader.readexactly(4)
                body = await reader.readexactly(struct.unpack("!i", head)[0] - 4)
                if started:
                    self._note(kind, body, names)
                elif struct.unpack("!i", body[:4])[0] != _SSL_REQUEST:
                    started = True
                if asyncio.current_task() in self._swallowed:
                    continue
                server.write(kind + head + body)
                await server.drain()
                if self._cuts_next and kind == b"S":
                    self._cuts_next = False
                    return

    async def _downstream(self, server: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await server.read(65536):
                if self._on_loss:
                    then, self._on_loss = self._on_loss, None
                    await then()
                    return
                await asyncio.sleep(self._delay_s)
                if asyncio.current_task() in self._swallowed:
                    continue
                writer.write(data)
                await writer.drain()

    def _note(self, kind: bytes, body: bytes, names: dict[bytes, str]) -> None:
        match kind:
            case b"P":
                name, sql = body.split(b"\0")[:2]
                names[name] = sql.decode()
            case b"B":
                self.statements.append(names[body.split(b"\0")[1]])
            case b"Q":
                self.statements.append(body.rstrip(b"\0").decode())
                self.round_trips += 1
            case b"S":
                self.round_trips += 1


@asynccontextmanager
async def running_proxy(url: str, delay_s: float = 0.0) -> AsyncIterator[Proxy]:
    proxy = Proxy(url, delay_s)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        await proxy.stop()
