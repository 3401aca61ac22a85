"""Runs uvicorn: its sockets, its signals and its shutdown."""

import atexit
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from server.connections import Connections
from server.protocol import Protocol

STARTUP_FAILURE = 3  # uvicorn's exit code
SD_LISTEN_FDS_START = 3
END_S = 0.5  # for threads after the last connection has closed; then the process exits anyway


def serve(
    app: FastAPI,
    host: str,
    port: int,
    connections: Connections,
    *,
    proxies: list[str],
    shutdown_grace_s: int,
    sockets: list[socket.socket] | None = None,
    on_started: Callable[[str], None] | None = None,
    on_stopping: Callable[[], None] | None = None,
    on_signal: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal asks to stop; requests that have begun are finished first.

    It listens on *sockets*, on those that systemd passes, or at *host* and *port*. *on_started* is called
    with the address once it listens, *on_stopping* before it waits for requests to finish, and *on_signal*
    at once, even during the startup.
    """
    config = uvicorn.Config(
        app,
        host,
        port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=shutdown_grace_s,
        server_header=False,
        http=partial(Protocol, connections=connections),  # type: ignore[arg-type] # uvicorn only calls it
        ws="none",
        # By default uvicorn trusts every client on this machine.
        proxy_headers=bool(proxies),
        forwarded_allow_ips=proxies,
    )
    server = _Server(config, on_started, on_stopping, on_signal)
    # uvicorn shuts down in order and then raises the signal again, but a requested stop is a success. An
    # earlier signal kills the process (-15), which has accepted nothing by then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    server.run(sockets or inherited_sockets())
    if not server.started:
        raise SystemExit(STARTUP_FAILURE)


class _Server(uvicorn.Server):
    """Reports its address once it listens, and ends the process even if a thread hangs."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_started: Callable[[str], None] | None,
        on_stopping: Callable[[], None] | None,
        on_signal: Callable[[], None] | None,
    ) -> None:
        super().__init__(config)
        self._on_started, self._on_stopping, self._on_signal = on_started, on_stopping, on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._on_signal:
            self._on_signal()

    async def serve(self, sockets: Any = None) -> None:
        await super().serve(sockets)
        # A thread that waits for a lock of SQLite or for DNS cannot be interrupted. Ending it loses nothing,
        # because the database rolls back what has not been committed.
        leaving = threading.Timer(END_S, os._exit, [0 if self.started else STARTUP_FAILURE])
        leaving.daemon = True
        leaving.start()
        atexit.register(leaving.cancel)  # all threads have ended
        logging.shutdown()  # flushes buffered lines, which `os._exit` would lose

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started:
            self._on_started(address_of(self.servers[0].sockets[0]))

    async def shutdown(self, sockets: Any = None) -> None:
        if self._on_stopping:
            self._on_stopping()
        await super().shutdown(sockets)


def address_of(listening: Any) -> str:
    """Return the URL at which the socket *listening* is reached."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def inherited_sockets() -> list[socket.socket] | None:
    """Return the sockets that systemd passes (sd_listen_fds(3)), so that processes can share one address."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", 0))
    return [socket.socket(fileno=SD_LISTEN_FDS_START + number) for number in range(count)] or None
