"""The service as its own process, the way people start it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

PROJECT = Path(__file__).parent.parent
START_TIMEOUT_S = 30
RUN_TIMEOUT_S = 180  # Schemathesis takes a tenth of that, where nothing else runs
STOP_TIMEOUT_S = 15


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

    def wait_for(self, address: str) -> None:
        """Return when the service answers at *address*."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{address}/health").raise_for_status()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the service did not start: {self.logged}")

    def stop(self) -> int:
        """Ask the service to stop, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """Return an environment that holds *settings* and nothing that this machine may have set."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "SYSTEMROOT")}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
    return kept | {"DATA_DIR": str(folder / "data"), "PYTHONPATH": str(PROJECT)} | settings


@contextlib.contextmanager
def running_service(folder: Path, *command: str, **settings: str) -> Iterator[Service]:
    """Start `python` with *command*, by default `main.py`, in *folder*, which has no `.env`."""
    output, errors = folder / "output.txt", folder / "errors.txt"
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *(command or (str(PROJECT / "main.py"),))],
            cwd=folder,
            env=environment(folder, **settings),
            stdout=out,
            stderr=err,
            text=True,
        )
    try:
        yield Service(process, output, errors)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(STOP_TIMEOUT_S)


def run(folder: Path, *command: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    """Run `python` with *command* in *folder* to its end."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        check=False,
    )
