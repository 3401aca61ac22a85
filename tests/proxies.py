"""HAProxy and nginx with the configurations of `docs/cells.md`, between the users and the cells."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.guides import block
from tests.postgres import free_port, is_root

START_TIMEOUT_S = 60

# Stands for Debian's nginx.conf around the page's part, in a folder of the test.
NGINX = """
{user}
daemon off;
worker_processes 2;
pid {folder}/pid;
error_log {folder}/log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/tasks.conf;
}}
"""


class Proxy:
    """A proxy with the page's configuration in *folder*, before cells with a process at each of *ports*."""

    name: str  # of the program
    package: str
    title: str  # of the page's block
    default_cell: tuple[str, str]  # how the configuration names it
    reload_signal: signal.Signals
    line_end = ""  # of the map

    def __init__(self, folder: Path, ports: Sequence[Sequence[int]]) -> None:
        self._folder, self._ports = folder, ports
        self._port = free_port()
        self.address = f"http://127.0.0.1:{self._port}"
        self.users = folder / "users.map"
        self.log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def program(cls) -> str:
        """Return the path of the program; skip the test without it, or fail it in CI."""
        found = shutil.which(cls.name) or shutil.which(cls.name, path="/usr/sbin")
        if not found:
            sentence = f"{cls.name} is not installed (Debian: apt-get install {cls.package})"
            if os.environ.get("CI"):
                pytest.fail(sentence)
            pytest.skip(sentence)  # not on PyPI, so the README's test command cannot install it
        return found

    def write(self, users: Mapping[str, str], default: str = "one") -> None:
        """Write the configuration and the map of *users*: the cell of each, and that of all others."""
        lines = [f"{self.key(user_id)} {cell}{self.line_end}\n" for user_id, cell in users.items()]
        self.users.write_text("".join(lines))
        self.set_default(default)

    def set_default(self, cell: str) -> None:
        """Write the configuration with *cell* for users who are not in the map."""
        self._default = cell
        self._write_configuration()

    def key(self, user_id: str) -> str:
        """Return *user_id* as the map has it."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _write_configuration(self) -> None:
        raise NotImplementedError

    def configuration(self) -> str:
        """Return the page's configuration with addresses and paths of the test."""
        text = block(self.title)
        before, after = self.default_cell
        assert text.count(before) == 1
        text = text.replace(before, after.format(self._default))
        return re.sub(
            r"10\.0\.(\d)\.1(\d):8000",
            lambda found: f"127.0.0.1:{self._ports[int(found[1]) - 1][int(found[2]) - 1]}",
            text,
        )

    def start(self) -> None:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(self._command(), cwd=self._folder, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1):
                return
            time.sleep(0.02)
        raise RuntimeError(f"{self.name} did not start: {self.log.read_text()}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def reload(self) -> None:
        """Read the configuration again, as `systemctl reload` does."""
        os.kill(self.pid, self.reload_signal)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(START_TIMEOUT_S)


class HAProxy(Proxy):
    name = package = "haproxy"
    title = "/etc/haproxy/haproxy.cfg"
    default_cell = ("users.map,one)", "users.map,{})")
    reload_signal = signal.SIGUSR2

    def key(self, user_id: str) -> str:
        return quote(user_id, safe="")

    def _command(self) -> list[str]:
        return [self.program(), "-W", "-f", str(self._folder / "haproxy.cfg")]

    def _write_configuration(self) -> None:
        text = self.configuration().replace("/etc/haproxy/users.map", str(self.users))
        text = text.replace("bind :80 ", f"bind 127.0.0.1:{self._port} ")
        text = text.replace("abns@tasks", f"abns@tasks{self._port}")
        # Only root may become another user.
        text = re.sub(r"^    (user|group) haproxy\n", "", text, flags=re.MULTILINE)
        (self._folder / "haproxy.cfg").write_text(text)


class Nginx(Proxy):
    name, package = "nginx", "nginx-light"
    title = "/etc/nginx/conf.d/tasks.conf"
    default_cell = ("default one;", "default {};")
    reload_signal = signal.SIGHUP
    line_end = ";"

    def key(self, user_id: str) -> str:
        return '"\\\\{}"'.format(user_id.replace("\\", "\\\\").replace('"', '\\"'))

    def _command(self) -> list[str]:
        return [self.program(), "-e", str(self.log), "-c", str(self._folder / "nginx.conf")]

    def _write_configuration(self) -> None:
        text = self.configuration().replace("/etc/nginx/users.map", str(self.users))
        text = text.replace("listen 80;", f"listen 127.0.0.1:{self._port};")
        (self._folder / "tasks.conf").write_text(text)
        user = "user root;" if is_root() else ""
        (self._folder / "nginx.conf").write_text(NGINX.format(user=user, folder=self._folder))


PROXIES = (HAProxy, Nginx)


@contextlib.contextmanager
def running_proxy(
    kind: type[Proxy], folder: Path, ports: Sequence[Sequence[int]], users: Mapping[str, str]
) -> Iterator[Proxy]:
    proxy = kind(folder, ports)
    proxy.write(users)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.stop()
