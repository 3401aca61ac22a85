"""The parent of workers, which serve one address together: it starts, replaces and stops them."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from server.run import STARTUP_FAILURE, address_of, inherited_sockets
from server.worker import Worker

START_TIMEOUT_S = 60.0
HEALTHY_S = 10.0  # a worker that has run for this long is replaced at once when it dies
RETRY_MAX_S = 30.0  # between two attempts to start a worker
STOP_MARGIN_S = 3.0  # beyond the grace that workers observe themselves; then they are killed
BACKLOG = 2048  # as uvicorn's
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2, as a container sees its own

_log = structlog.get_logger("workers")


def cores() -> int:
    """Return how many cores this process may use, by its affinity and its control group's quota."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no quota is "max"
        quota, period = map(int, CPU_QUOTA.read_text().split())
        number = min(number, math.ceil(quota / period))
    return number


def run(
    program: Sequence[str],
    count: int,
    host: str,
    port: int,
    *,
    folder: Path,
    counters: int,
    shutdown_grace_s: float,
    on_started: Callable[[str], None] | None = None,
) -> int:
    """Run *count* workers until a signal asks to stop, and return the exit code.

    A worker is *program* with `Worker.arguments`. *on_started* is called with the address once the first one
    serves. SIGHUP replaces one after the other: the old one stops when the new one, which reads code and
    settings anew, serves. In a terminal it stops them, as it means that the terminal has been closed.
    """
    workers = _Workers(program, folder, counters, shutdown_grace_s + STOP_MARGIN_S)
    return asyncio.run(workers.run(count, host, port, on_started))


class _Process:
    """A worker's process, and the socket whose end tells the worker that its parent is gone."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self._process, self._control = process, control

    @property
    def id(self) -> int:
        return self._process.pid

    async def is_ready(self) -> bool:
        """Wait until the worker serves or has ended, and return whether it serves."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_TIMEOUT_S):
                return bool(await asyncio.get_running_loop().sock_recv(self._control, 1))
        return False

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        code = await self._process.wait()
        self._control.close()
        return code

    async def end(self, timeout_s: float) -> int:
        """Ask the process to stop, and kill it if it does not within *timeout_s*."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        self._signal(signal.SIGKILL)
        return await self.wait()

    def _signal(self, number: int) -> None:
        # `Process.send_signal` may collect an exit code, which asyncio then does not find.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.id, number)


@dataclass
class _Slot:
    """A worker's number and sockets, which its successor takes over, and the worker at present."""

    number: int
    sockets: Sequence[socket.socket]
    host: str
    port: int | None  # None: all slots share the sockets
    current: _Process | None = None
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def open(self) -> None:
        if not self.sockets and self.port is not None:
            self.sockets = await _bind(self.host, self.port, reuse_port=True)

    def close(self) -> None:
        for each in self.sockets:
            each.close()
        self.sockets = []


class _Workers:
    def __init__(self, program: Sequence[str], folder: Path, counters: int, end_timeout_s: float) -> None:
        self._program, self._folder, self._counters = program, folder, counters
        self._end_timeout_s = end_timeout_s
        self._slots: list[_Slot] = []
        self._processes: set[_Process] = set()
        self._asked_to_replace = asyncio.Event()

    async def run(self, count: int, host: str, port: int, on_started: Callable[[str], None] | None) -> int:
        try:
            self._slots = await _slots(count, host, port)
        except OSError as error:
            _log.error("cannot listen", host=host, port=port, reason=error.strerror)
            return STARTUP_FAILURE
        loop, this = asyncio.get_running_loop(), asyncio.current_task()
        assert this is not None  # noqa: S101 - a coroutine runs in a task
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, this.cancel)
        loop.add_signal_handler(
            signal.SIGHUP, this.cancel if _is_in_a_terminal() else self._asked_to_replace.set
        )
        try:
            return await self._run(on_started)
        except asyncio.CancelledError:  # by a signal
            return 0
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, lambda: None)
            for slot in self._slots:
                slot.close()  # so that no client connects to a port without a worker
            await asyncio.gather(*(each.end(self._end_timeout_s) for each in self._processes))

    async def _run(self, on_started: Callable[[str], None] | None) -> int:
        """Start one worker, which may migrate or find a mistake in the settings, and then the others."""
        first = self._slots[0]
        process = await self._spawn(first)
        if not await process.is_ready():
            return await process.end(self._end_timeout_s) or STARTUP_FAILURE
        first.current = process
        address = address_of(first.sockets[0])
        _log.info("serving", address=address, workers=len(self._slots))
        if on_started:
            on_started(address)
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._keep(slot))
            group.create_task(self._replace_when_asked())
        raise AssertionError("the tasks do not end")

    async def _keep(self, slot: _Slot) -> None:
        """Start a worker at *slot* whenever there is none."""
        delay_s = 0.0
        while True:
            if slot.current is None:
                await asyncio.sleep(delay_s)
                delay_s = min(max(1.0, 2 * delay_s), RETRY_MAX_S)
                async with slot.changing:
                    if slot.current is None:
                        slot.current = await self._start(slot)
                    if slot.current is None and slot.port is not None:
                        slot.close()  # the other workers get its connections
                continue
            process, since = slot.current, asyncio.get_running_loop().time()
            code = await process.wait()
            if slot.current is process:  # else it was replaced
                _log.error("worker died", worker=slot.number, pid=process.id, code=code)
                slot.current = None
            if asyncio.get_running_loop().time() - since > HEALTHY_S:
                delay_s = 0.0

    async def _replace_when_asked(self) -> None:
        while True:
            await self._asked_to_replace.wait()
            self._asked_to_replace.clear()
            for slot in self._slots:
                async with slot.changing:
                    successor = await self._start(slot)
                    if successor is None:
                        _log.error("workers are not replaced", worker=slot.number)
                        break
                    former, slot.current = slot.current, successor
                if former:
                    await former.end(self._end_timeout_s)
            else:
                _log.info("workers are replaced")

    async def _start(self, slot: _Slot) -> _Process | None:
        """Start a worker at *slot* and return it once it serves, or None if it does not."""
        try:
            await slot.open()
            process = await self._spawn(slot)
        except OSError as error:
            _log.error("worker cannot be started", worker=slot.number, reason=error.strerror)
            return None
        if await process.is_ready():
            return process
        code = await process.end(self._end_timeout_s)
        _log.error("worker did not start", worker=slot.number, pid=process.id, code=code)
        return None

    async def _spawn(self, slot: _Slot) -> _Process:
        ours, control = socket.socketpair()
        ours.setblocking(False)
        listening = tuple(each.fileno() for each in slot.sockets)
        worker = Worker(
            slot.number, len(self._slots), self._folder, self._counters, control.fileno(), listening
        )
        with control:
            process = _Process(
                await asyncio.create_subprocess_exec(
                    *self._program, *worker.arguments, pass_fds=worker.descriptors
                ),
                ours,
            )
        self._processes.add(process)
        asyncio.create_task(process.wait()).add_done_callback(lambda _: self._processes.discard(process))
        return process


async def _slots(count: int, host: str, port: int) -> list[_Slot]:
    """Return the slots of *count* workers.

    Where the kernel spreads connections over the sockets of one port, each slot has its own. With a shared
    one, of 32 connections that a proxy opens at once most go to the same worker.
    """
    if shared := inherited_sockets():
        return [_Slot(number, shared, host, None) for number in range(1, count + 1)]
    # Without `reuse_port`, so that a second service is refused here.
    found = await _bind(host, port, reuse_port=False)
    port = found[0].getsockname()[1]
    if sys.platform != "linux":
        return [_Slot(number, found, host, None) for number in range(1, count + 1)]
    for each in found:
        each.close()
    slots = [_Slot(number, [], host, port) for number in range(1, count + 1)]
    for slot in slots:
        await slot.open()
    for each in slots[0].sockets:
        each.listen(BACKLOG)  # from now on a second service is refused, though no worker serves yet
    return slots


def _is_in_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


async def _bind(host: str, port: int, *, reuse_port: bool) -> list[socket.socket]:
    """Return the sockets that a server at *host* and *port* listens on; they do not listen yet.

    Raises:
        OSError: there is no such address, or it is in use.
    """
    server = await asyncio.get_running_loop().create_server(
        asyncio.Protocol, host, port, reuse_port=reuse_port, start_serving=False
    )
    try:
        return [socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets]
    finally:
        server.close()
