"""A real Better Auth server, whose tables are in the same database as ours."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
import pytest

from tests.postgres import free_port

PROJECT = Path(__file__).parent / "better_auth"
SECRET = "a-secret-that-better-auth-signs-with-01"
PASSWORD = "a-password-of-the-tests"
NODE_MIN = 20
INSTALL_TIMEOUT_S = 300
START_TIMEOUT_S = 30


@dataclass(frozen=True)
class Account:
    """An account that is signed in; *cookie_cache* is the cached session in the browser's cookie."""

    user_id: str
    session: str
    cookie_cache: str | None


@dataclass(frozen=True)
class BetterAuth:
    """A running Better Auth at *origin*."""

    origin: str
    client: httpx.AsyncClient
    output: Path

    async def sign_up(self, name: str) -> Account:
        """Create an account and sign in, as a browser does."""
        account = {"name": name, "email": f"{name}@example.com", "password": PASSWORD}
        answer = await self.client.post("/api/auth/sign-up/email", json=account)
        assert answer.status_code == 200, answer.text
        return await self.sign_in(name)

    async def sign_in(self, name: str) -> Account:
        account = {"email": f"{name}@example.com", "password": PASSWORD}
        self.client.cookies.clear()
        answer = await self.client.post("/api/auth/sign-in/email", json=account)
        assert answer.status_code == 200, answer.text
        cookie_cache = answer.cookies.get("better-auth.session_data")
        self.client.cookies.clear()
        return Account(answer.json()["user"]["id"], answer.json()["token"], cookie_cache)

    async def token(self, account: Account) -> str:
        """Return the token that `authClient.token()` would."""
        answer = await self.client.get(
            "/api/auth/token", headers={"Authorization": f"Bearer {account.session}"}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["token"])

    async def mailed_token(self, name: str) -> str:
        """Return the token from the mail that asks *name* to confirm the e-mail address."""
        for _ in range(100):
            mails = [json.loads(line) for line in self.output.read_text().splitlines() if line[:1] == "{"]
            for mail in mails:
                if mail["to"] == f"{name}@example.com":
                    return str(mail["token"])
            await asyncio.sleep(0.02)
        raise RuntimeError(f"there is no mail: {self.output.read_text()}")


@contextlib.asynccontextmanager
async def running_better_auth(
    database_url: str, folder: Path, *, algorithm: str = "EdDSA", ids: str = "text", cookie_cache: str = "off"
) -> AsyncIterator[BetterAuth]:
    """Start Better Auth, which migrates *database_url* first; *ids* are `text`, `uuid` or `serial`."""
    node = await asyncio.to_thread(_install)
    port = free_port()
    origin, output = f"http://127.0.0.1:{port}", folder / f"better_auth_{port}.txt"
    settings = {
        "DATABASE_URL": database_url,
        "PORT": str(port),
        "BASE_URL": origin,
        "BETTER_AUTH_SECRET": SECRET,
        "JWT_ALGORITHM": algorithm,
        "ID_KIND": ids,
        "COOKIE_CACHE": cookie_cache,
    }
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "SYSTEMROOT")}
    with output.open("w") as out:
        process = await asyncio.create_subprocess_exec(
            node,
            PROJECT / "server.mjs",
            env=kept | settings,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
        )
    try:
        async with httpx.AsyncClient(base_url=origin) as client:
            await _wait_until_answering(process, client, output)
            yield BetterAuth(origin, client, output)
    finally:
        assert process.stdin is not None
        process.stdin.close()  # Better Auth exits when its standard input closes
        await asyncio.wait_for(process.wait(), START_TIMEOUT_S)


async def _wait_until_answering(
    process: asyncio.subprocess.Process, client: httpx.AsyncClient, output: Path
) -> None:
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while asyncio.get_running_loop().time() < deadline and process.returncode is None:
        with contextlib.suppress(httpx.TransportError):
            # Concurrent first requests for keys and for a token create two keys, and the service might
            # fetch the one that did not sign the token. This request creates the only key.
            if (await client.get("/api/auth/jwks")).status_code == 200:
                return
        await asyncio.sleep(0.02)
    raise RuntimeError(f"Better Auth did not start: {await asyncio.to_thread(output.read_text)}")


def _install() -> str:
    """Install the packages of the lock file if necessary, and return the path of Node."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        _give_up(f"Node.js {NODE_MIN} or newer with npm is not installed (https://nodejs.org)")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < NODE_MIN:
        _give_up(f"Node.js {NODE_MIN} or newer is not installed, only {version} (https://nodejs.org)")
    installed, lock = PROJECT / "node_modules" / ".package-lock.json", PROJECT / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
        return node
    done = subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"npm ci failed: {done.stderr}")
    installed.touch()  # must be newer than the lock file, or each run would install again
    return node


def _give_up(sentence: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(sentence)
    pytest.skip(sentence)  # not on PyPI, so the README's test command cannot install it
