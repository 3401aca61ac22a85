"""A real pgbouncer in transaction mode, as behind Neon's `-pooler` hosts."""

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.postgres import Server, free_port, is_root

CONFIGURATION = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
auth_file =
pool_mode = transaction
default_pool_size = 3
max_client_conn = 200
ignore_startup_parameters = extra_float_digits
"""


def program() -> str:
    """Return the path of pgbouncer; skip the test without it, or fail it in CI."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if not found:
        sentence = "pgbouncer is not installed (Debian: apt-get install pgbouncer)"
        if os.environ.get("CI"):
            pytest.fail(sentence)
        pytest.skip(sentence)  # not on PyPI, so the README's test command cannot install it
    return found


@contextlib.asynccontextmanager
async def running_pgbouncer(server: Server, database: str, folder: Path) -> AsyncIterator[str]:
    """Start pgbouncer in front of *server* and yield the URL of *database* through it."""
    target, listen_port = urlsplit(server.url), free_port()
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        CONFIGURATION.format(host=target.hostname, port=target.port, listen_port=listen_port).replace(
            "* =", f"{database} = dbname={database} user={target.username}"
        )
    )
    command = [program(), "--quiet"]
    if is_root():  # pgbouncer refuses to run as root, and reads its file as the other user
        command += ["--user", "nobody"]
        for path in (folder, *folder.parents[:2]):
            path.chmod(0o755)
    with (folder / "pgbouncer.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(*command, configuration, stdout=log, stderr=log)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", listen_port), 1):
                break
            await asyncio.sleep(0.05)
        else:
            raise RuntimeError(f"pgbouncer did not start: {(folder / 'pgbouncer.log').read_text()}")
        yield f"postgresql://{target.username}@127.0.0.1:{listen_port}/{database}"
    finally:
        process.kill()
        await process.wait()
