"""How long a start takes: `uv run --group bench bench/start.py`.

CPU and wall time from the start of the process to the first answered `/health`, and the costliest imports.
There are no development packages, as in the Dockerfile.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from bench.run import cpu_s
from bench.runtimes import installed
from tests.postgres import free_port
from tests.service import running_service

ROUNDS = 7


def start(python: str, folder: Path) -> tuple[float, float]:
    """Return the CPU seconds and the seconds until the service answers."""
    port, began = free_port(), time.perf_counter()
    with running_service(folder, python=python, PORT=str(port)) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        return cpu_s(service.process.pid), time.perf_counter() - began


def imports(python: str) -> list[tuple[str, float]]:
    """Return the top-level packages that take longest to import, with their milliseconds."""
    output = subprocess.run(
        [python, "-X", "importtime", "-c", "import main"],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    own: dict[str, float] = {}
    for line in output.splitlines()[1:]:
        microseconds, _, name = line.removeprefix("import time:").split("|")
        package = name.strip().split(".")[0]
        own[package] = own.get(package, 0) + int(microseconds) / 1000
    return sorted(own.items(), key=lambda item: -item[1])[:10]


def report(python: str, folder: Path) -> None:
    first, again = [], []
    for number in range(ROUNDS):
        (data := folder / str(number)).mkdir()
        first.append(start(python, data))
        again.append(start(python, data))
    results = {
        f"{label}, {unit}": round(statistics.median(values), 2)
        for label, runs in (("first start (makes the schema)", first), ("later start", again))
        for unit, values in zip(("CPU s", "s"), zip(*runs, strict=True), strict=True)
    }
    print(json.dumps(results, indent=2))
    print("\nimports, ms in each package's own modules:")
    for package, milliseconds in imports(python):
        print(f"{package:20}{milliseconds:8.1f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        programs = installed(sys.executable, Path(name) / "environment")
        report(str(programs / "python"), Path(name))
