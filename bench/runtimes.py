"""This service on other Pythons, event loops and HTTP servers: `uv run --group bench bench/runtimes.py`.

Takes the interpreters of pyenv, or those that are named, and compares loops and servers on the last one. Each
gets an environment without development packages, as the Dockerfile makes it. Options and output are as those
of `run.py`; shares are of the first one.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from bench import run

GRANIAN = "granian==2.8.9"
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
WITHOUT_UVLOOP = (
    "import runpy, sys; sys.modules['uvloop'] = None; runpy.run_path('main.py', run_name='__main__')"
)
BY_GRANIAN = ["--interface=asgi", "--http=1", "--no-ws", "--workers=1", "--loop=uvloop", "main:app"]


def installed(python: str, folder: Path, *more: str) -> Path:
    """Install what the service needs and *more* for an interpreter, and return the environment's programs."""
    sync = ["uv", "sync", "--quiet", "--frozen", "--no-dev", "--compile-bytecode", "--python", python]
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": str(folder)}
    subprocess.run(sync, cwd=HERE.parent, env=environment, check=True)
    programs = folder / "bin"
    if more:
        install = ["uv", "pip", "install", "--quiet", "--python", programs / "python", *more]
        subprocess.run(install, check=True)
    return programs


def servers(pythons: list[str], folder: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    found = {}
    for number, path in enumerate(pythons):
        programs = installed(path, folder / str(number), GRANIAN)
        python = str(programs / "python")
        shown = subprocess.run(
            [python, "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        found[shown] = [python, "main.py"]
    uvicorn = [python, "-m", "uvicorn", "--no-access-log", "--log-level", "warning", "main:app"]
    found |= {
        f"{shown}, plain loop": [python, "-c", WITHOUT_UVLOOP],
        f"{shown}, uvicorn's HTTP": uvicorn,
        f"{shown}, Granian": [str(programs / "granian"), *BY_GRANIAN],
    }
    return {name: (command, run.BARE) for name, command in found.items()}


def main_() -> None:
    found = [str(path) for path in sorted(PYENV.glob("versions/3.1[1-9].*/bin/python"))]
    parser = run.arguments(__doc__)
    parser.add_argument("--pythons", nargs="*", default=found or [sys.executable])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run.SERVERS = servers(options.pythons, Path(name))
        run.report(run.measure(list(run.SERVERS), options))


if __name__ == "__main__":
    main_()
