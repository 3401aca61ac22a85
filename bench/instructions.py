"""Instructions and cache misses of a request: `uv run --group bench bench/instructions.py`.

Needs valgrind (Debian: apt-get install valgrind). A clock differs by 15 % between two runs on a busy machine,
these figures by 1 %, so they tell what a small change is worth. Requests go in at the protocol and answers
come out at the transport: there are no sockets to clients, but PostgreSQL is real. System calls do not count.
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from auth import tokens
from bench.run import BARE, LABELS, SECRET, TASKS_PER_USER, USERS, seed, seed_sqlite
from tests.postgres import running_server

SERVERS = {
    "floor": {},
    "this service": BARE,
    "this service, default": {"ENVIRONMENT": "production", "RATE_LIMIT": "1000000/minute"},
    "this service, SQLite": BARE,
}
OPERATIONS = {
    "one": ("GET", "/{task}", ""),
    "list": ("GET", "?limit=20", ""),
    "list200": ("GET", "?limit=200", ""),
    "create": ("POST", "", '{"title": "Buy milk", "description": "Two bottles of it"}'),
    "complete": ("PATCH", "/{task}/complete", ""),
}
CONNECTIONS, WARM_UP = 32, 2_500
# The first caches of usual processors, and half a MiB of the second.
CACHES = ("--cache-sim=yes", "--I1=32768,8,64", "--D1=32768,8,64", "--LL=524288,8,64")


class Client(asyncio.Transport):
    """The transport of one connection, which sends the next request after each answer."""

    def __init__(self, on_answer: Callable[["Client"], None]) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 8000)})
        self.protocol: Any = None
        self._on_answer = on_answer
        self._left = 0  # bytes of the answer

    def write(self, data: Any) -> None:
        if not self._left:
            assert data[9:10] == b"2", data
            head = data.partition(b"\r\n\r\n")[0]
            length = re.search(rb"content-length: (\d+)", head)
            assert length, head
            self._left = len(head) + 4 + int(length[1])
        self._left -= len(data)
        if not self._left:
            self._on_answer(self)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing is buffered."""

    pause_reading = resume_reading = close = abort = lambda _: None


async def answer_requests(server: str, operation: str, count: int) -> None:
    """Answer requests, the last *count* of them with Valgrind counting."""
    loop = asyncio.get_running_loop()
    app, protocol = _server(server)
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False, proxy_headers=False)
    config.load()
    await LifespanOn(config).startup()
    requests = _requests(operation)
    left, done = 0, loop.create_future()

    def send(client: Client) -> None:
        nonlocal left
        if left == 0:
            if not done.done():
                done.set_result(None)
            return
        left -= 1
        client.protocol.data_received(requests())

    async def run(number: int) -> None:
        nonlocal left, done
        left, done = number, loop.create_future()
        for client in clients:
            send(client)
        await done
        await asyncio.sleep(0.1)  # the last answers of other connections

    clients = [Client(partial(loop.call_soon, send)) for _ in range(CONNECTIONS)]
    for client in clients:
        client.protocol = protocol(config, ServerState(), {})
        client.protocol.connection_made(client)
    await run(WARM_UP)
    _valgrind("--instr=on")
    await run(count)
    _valgrind("--instr=off")
    _valgrind("--dump")
    os._exit(0)  # closing everything would take a minute


def _server(name: str) -> tuple[Any, Callable[..., Any]]:
    if name == "floor":
        from bench import floor

        return floor.app, HttpToolsProtocol
    import main
    from config import load_settings
    from observability import logs
    from server.connections import Connections
    from server.protocol import Protocol

    settings = load_settings()
    logs.configure(settings.resolved_log_level, settings.resolved_log_format)
    connections = Connections(limit=CONNECTIONS, limit_per_client=CONNECTIONS, proxies=[])
    return main.create_app(settings), partial(Protocol, connections=connections)


def _requests(operation: str) -> Callable[[], bytes]:
    method, path, body = OPERATIONS[operation]
    users = [f"user{number + 1:04}" for number in range(USERS)]
    bearers = [tokens.issue(user, SECRET, 86_400) for user in users]
    random = Random(1)

    def request() -> bytes:
        user = random.randrange(USERS)
        target = path.format(task=user * TASKS_PER_USER + 1 + random.randrange(TASKS_PER_USER))
        head = f"{method} /api/{users[user]}/tasks{target} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Authorization: Bearer {bearers[user]}\r\n\r\n{body}".encode()

    return request


def _valgrind(option: str) -> None:
    subprocess.run(["callgrind_control", option, str(os.getpid())], check=True, capture_output=True)


def measure(server: str, operation: str, count: int, url: str, folder: Path) -> dict[str, float]:
    """Return thousands of instructions, and misses of each cache, of one request."""
    out = folder / f"{server}.{operation}"
    program = [sys.executable, __file__, "--inside", server, operation, "--requests", str(count)]
    tool = [
        "valgrind",
        "-q",
        "--tool=callgrind",
        "--instr-atstart=no",
        *CACHES,
        f"--callgrind-out-file={out}",
    ]
    settings = {
        "DATABASE_URL": url,
        "DATA_DIR": str(folder),
        "BETTER_AUTH_SECRET": SECRET,
        "PYTHONHASHSEED": "0",
    }
    done = subprocess.run(
        [*tool, *program],
        env=os.environ | settings | SERVERS[server],
        capture_output=True,
        text=True,
        check=False,
    )
    dump = out.with_name(f"{out.name}.1")
    if not dump.exists():
        raise RuntimeError(f"{server}, {operation}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    text = dump.read_text()
    names = re.search(r"^events: (.*)$", text, re.MULTILINE)
    totals = re.search(r"^totals: (.*)$", text, re.MULTILINE)
    assert names
    assert totals
    found = dict(zip(names[1].split(), map(int, totals[1].split()), strict=True))
    return {
        "instructions": found["Ir"] / 1000 / count,
        "I1": found["I1mr"] / count,
        "D1": (found["D1mr"] + found["D1mw"]) / count,
        "L2": (found["ILmr"] + found["DLmr"] + found["DLmw"]) / count,
    }


def main_() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=1_000)
    parser.add_argument("--servers", nargs="*", default=list(SERVERS), choices=SERVERS)
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), choices=OPERATIONS)
    options = parser.parse_args()
    if options.inside:
        import uvloop

        uvloop.run(answer_requests(*options.inside, options.requests))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(running_server())
        url = server.url_of(asyncio.run(server.create_database()))
        asyncio.run(seed(url, USERS))
        lite = seed_sqlite(folder / "tasks.db", USERS) if "this service, SQLite" in options.servers else ""
        print(f"{'':42}{'thousand instructions':>22}{'misses: I1':>12}{'D1':>8}{'L2':>8}")
        for operation in options.operations:
            for name in options.servers:
                row = measure(name, operation, options.requests, lite if "SQLite" in name else url, folder)
                print(f"{name:24}{LABELS[operation]:18}", end="")
                print(
                    f"{row['instructions']:22.1f}{row['I1']:12.0f}{row['D1']:8.0f}{row['L2']:8.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main_()
