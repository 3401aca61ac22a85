"""The service as its own process, as an operator starts it, and its commands in this process."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import uvicorn

import main

PROJECT = Path(__file__).parent.parent
START_TIMEOUT_S = 30
RUN_TIMEOUT_S = 180  # ten times what Schemathesis takes on an idle machine
STOP_TIMEOUT_S = 15

may_be_started = True  # in a test, only if it is marked `process`

# For a service under load: coverage would halve its speed, and other tests cover the same lines.
UNMEASURED = {"COVERAGE_PROCESS_CONFIG": ""}


class Service:
    def __init__(self, process: "subprocess.Popen[str]", output: Path, errors: Path) -> None:
        self.process = process
        self._output, self._errors = output, errors

    @property
    def printed(self) -> list[str]:
        return self._output.read_text().splitlines()

    @property
    def logged(self) -> str:
        return self._errors.read_text()

    def wait_for(self, address: str, path: str = "/health") -> None:
        """Return once the service at *address* responds to *path* with a success."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{address}{path}").raise_for_status()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the service did not start: {self.logged}")

    def wait_until_started(self) -> None:
        """Return once this service has started; another process may respond at the same address."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Application startup complete" not in self.logged:
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the service did not start: {self.logged}")
            time.sleep(0.05)

    def stop(self) -> int:
        """Ask the service to stop, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def _assert_marked() -> None:
    assert may_be_started, "a test that starts the service as a process is marked `process`"


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return an environment with *settings*, without settings of this machine."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "SYSTEMROOT")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
    return kept | {"DATA_DIR": str(folder / "data"), "PYTHONPATH": str(PROJECT)} | settings


# Socket activation as by systemd: the socket is descriptor 3, and LISTEN_PID is the service's process id.
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
os.execv(sys.argv[2], sys.argv[2:])
"""


def running_service(
    folder: Path, *command: str, python: str = sys.executable, **settings: str
) -> contextlib.AbstractContextManager[Service]:
    """Start *python* with *command*, by default `main.py`, in *folder*, which has no `.env` file."""
    program = [python, *(command or (str(PROJECT / "main.py"),))]
    return _running(folder, program, settings)


def running_service_on(
    listening: socket.socket, folder: Path, *command: str, **settings: str
) -> contextlib.AbstractContextManager[Service]:
    """Start *command*, by default `main.py`, on an open listening socket, which other processes may share."""
    descriptor = listening.fileno()
    program = command or (sys.executable, str(PROJECT / "main.py"))
    return _running(
        folder, [sys.executable, "-c", HAND_OVER, str(descriptor), *program], settings, descriptor
    )


@contextlib.contextmanager
def _running(folder: Path, program: list[str], settings: dict[str, str], *passed: int) -> Iterator[Service]:
    _assert_marked()
    output, errors = folder / "output.txt", folder / "errors.txt"
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            program,
            cwd=folder,
            env=environment(folder, **settings),
            stdout=out,
            stderr=err,
            text=True,
            pass_fds=passed,
        )
    try:
        yield Service(process, output, errors)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def run(folder: Path, *command: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run `python` with *command* in *folder* to its end."""
    _assert_marked()
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )


def command(folder: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run `main.py` with *arguments* in *folder* as `run` does, but in this process, which is faster.

    The command may fail with an invalid setting, but it must not start the server.
    """
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, environment(folder, **settings), clear=True),
        mock.patch.object(uvicorn.Server, "run", side_effect=AssertionError("this is a server")),
        contextlib.chdir(folder),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main.main(list(arguments))
        except SystemExit as ending:
            code = int(ending.code or 0)
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def printed_token(folder: Path, user_id: str = "alice", **settings: str) -> str:
    """Return the token that `main.py token` prints, with the secret of the service in *folder*."""
    return command(folder, "token", user_id, **settings).stdout.strip()
