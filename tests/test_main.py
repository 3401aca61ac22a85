import asyncio
import contextlib
import json
import shlex
import socket
import sqlite3
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import SECRET
from tests.postgres import free_port, own_server
from tests.service import PROJECT, Service, printed_token, run, running_service

MAIN = str(PROJECT / "main.py")
pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def unconfigured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, str, Path]]:
    """A service started with only a port configured, with its URL and its folder."""
    folder, port = tmp_path_factory.mktemp("unconfigured"), str(free_port())
    with running_service(folder, PORT=port) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        yield service, f"http://127.0.0.1:{port}", folder


def test_a_start_without_settings_prints_three_lines_that_work(tmp_path: Path) -> None:
    port = str(free_port())
    with running_service(tmp_path, PORT=port) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        docs, create, listing = service.printed

        assert docs == f"http://127.0.0.1:{port}/docs"
        assert "Swagger UI" in httpx.get(docs).text or "swagger-ui" in httpx.get(docs).text
        created = json.loads(subprocess.check_output([*shlex.split(create), "--silent"]))
        assert created["title"] == "Buy milk"
        assert json.loads(subprocess.check_output([*shlex.split(listing), "--silent"])) == [created]

        assert service.stop() == 0


def test_tasks_and_secret_survive_a_restart(tmp_path: Path) -> None:
    port = str(free_port())
    for expected in (1, 2):
        with running_service(tmp_path, PORT=port) as service:
            service.wait_for(f"http://127.0.0.1:{port}")
            _, create, listing = service.printed
            subprocess.check_output([*shlex.split(create), "--silent"])
            tasks = json.loads(subprocess.check_output([*shlex.split(listing), "--silent"]))
            assert len(tasks) == expected
            service.stop()

    secret = tmp_path / "data" / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_uvicorn_serves_too(tmp_path: Path) -> None:
    port = str(free_port())
    command = ["-m", "uvicorn", "main:app", "--port", port]
    with running_service(tmp_path, *command, LOG_FORMAT="json") as service:
        service.wait_for(f"http://127.0.0.1:{port}")

        assert service.stop() in (0, -15)
    access = [json.loads(line) for line in service.logged.splitlines() if "/health" in line]
    assert [(line["event"], line["status"]) for line in access] == [("request", 200)]


def test_a_response_over_a_socket_has_no_server_header(unconfigured: tuple[Service, str, Path]) -> None:
    _, address, _ = unconfigured

    answer = httpx.get(f"{address}/health", headers={"Origin": "http://localhost:3000"})

    assert "server" not in answer.headers
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["x-request-id"]


def test_a_large_body_over_a_socket_is_a_problem(unconfigured: tuple[Service, str, Path]) -> None:
    _, address, folder = unconfigured
    headers = {"Authorization": f"Bearer {printed_token(folder)}", "Content-Type": "application/json"}

    with httpx.Client(base_url=address, headers=headers) as client:
        answer = client.post("/api/alice/tasks", content=b"x" * 1_000_000)
        after = client.get("/api/alice/tasks")

    assert (answer.status_code, answer.json()["title"]) == (413, "Content Too Large")
    assert (after.status_code, after.json()) == (200, [])


async def test_postgres_is_served_as_configured(tmp_path: Path, empty_postgres_url: str) -> None:
    port = str(free_port())
    settings = {
        "DATABASE_URL": empty_postgres_url.replace("postgresql://", "postgres://"),
        "BETTER_AUTH_SECRET": SECRET,
        "MIGRATE_ON_START": "true",
        "ENVIRONMENT": "production",
        "PORT": port,
    }
    with running_service(tmp_path, **settings) as service:
        address = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(service.wait_for, address)
        token = printed_token(tmp_path, **settings)
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {token}"}) as client:
            created = await client.post(f"{address}/api/alice/tasks", json={"title": "Buy milk"})
            listed = await client.get(f"{address}/api/alice/tasks")

        assert listed.json() == [created.json()]
        assert service.printed == []
        assert service.stop() == 0
        lines = [json.loads(line) for line in service.logged.splitlines()]
        assert [line["status"] for line in lines if line.get("user_id") == "alice"] == [201, 200]


@pytest.mark.parametrize("command", [(MAIN,), ("-m", "uvicorn", "main:app")])
def test_an_invalid_setting_ends_the_start_with_a_sentence(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = run(tmp_path, *command, BETTER_AUTH_SECRET="short")

    assert done.returncode == 2
    assert done.stderr.splitlines() == ["BETTER_AUTH_SECRET: must be at least 32 characters"]


def test_a_port_that_is_taken_ends_the_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        done = run(tmp_path, MAIN, PORT=str(taken.getsockname()[1]))

    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "curl" not in done.stdout


@pytest.mark.parametrize(
    ("kept", "clause"),
    [(0, "names a file that is not a SQLite database"), (100, "names a SQLite database that is damaged")],
)
def test_a_damaged_file_ends_the_start_with_a_sentence(tmp_path: Path, kept: int, clause: str) -> None:
    path = tmp_path / "data" / "tasks.db"
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE task (id INTEGER)")
    content = path.read_bytes()[:kept] + b"\xff" * 8192  # the first 100 bytes are SQLite's file header
    path.write_bytes(content)

    done = run(tmp_path, MAIN)

    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"DATABASE_URL: {clause}: {path}"]
    assert path.read_bytes() == content


def test_an_unreachable_database_is_migrated_once_it_is_up(tmp_path: Path) -> None:
    port, database_port = free_port(), free_port()
    settings = {
        "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database_port}/postgres",
        "BETTER_AUTH_SECRET": SECRET,
        "MIGRATE_ON_START": "true",
    }
    address = f"http://127.0.0.1:{port}"
    with running_service(tmp_path, PORT=str(port), **settings) as service:
        service.wait_for(address)
        assert httpx.get(f"{address}/health/ready").status_code == 503

        with own_server(database_port):
            for _ in range(300):
                if httpx.get(f"{address}/health/ready").status_code == 200:
                    break
                time.sleep(0.1)
            assert httpx.get(f"{address}/health/ready").status_code == 200

        assert "Traceback" not in service.logged
        assert 1 <= service.logged.count("cannot be migrated yet") <= 6
        assert service.stop() == 0


def test_the_service_stops_while_it_waits_for_the_database(tmp_path: Path) -> None:
    port = free_port()
    settings = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere", "BETTER_AUTH_SECRET": SECRET}
    with running_service(tmp_path, PORT=str(port), MIGRATE_ON_START="true", **settings) as service:
        service.wait_for(f"http://127.0.0.1:{port}")

        assert service.stop() == 0
    assert "Traceback" not in service.logged


def test_importing_main_reads_no_settings(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "import main", BETTER_AUTH_SECRET="short")

    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_alembic_migrates_by_the_same_settings(tmp_path: Path) -> None:
    command = ["-m", "alembic", "-c", str(PROJECT / "pyproject.toml")]

    assert run(tmp_path, *command, "upgrade", "head").returncode == 0
    assert "(head)" in run(tmp_path, *command, "current").stdout
    refused = run(tmp_path, *command, "current", DATABASE_URL="nonsense", BETTER_AUTH_SECRET=SECRET)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
        2,
        "DATABASE_URL: must begin with postgresql:// or sqlite:///",
    )


def half_a_request(token: str) -> bytes:
    return (
        b"POST /api/alice/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 100\r\nAuthorization: Bearer " + token.encode() + b'\r\n\r\n{"ti'
    )


def test_the_service_stops_despite_a_stalled_client(tmp_path: Path) -> None:
    port = free_port()
    with running_service(tmp_path, PORT=str(port), SHUTDOWN_GRACE_S="1") as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        token = printed_token(tmp_path)
        with socket.create_connection(("127.0.0.1", port)) as stalling:
            stalling.sendall(half_a_request(token))
            httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()

            assert service.stop() == 0


def test_a_client_disconnect_is_logged_as_499_without_a_traceback(
    unconfigured: tuple[Service, str, Path],
) -> None:
    service, address, folder = unconfigured
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as hasty:
        hasty.sendall(half_a_request(printed_token(folder)))
    for _ in range(100):
        if "status=499" in service.logged:
            break
        httpx.get(f"{address}/health")

    assert "status=499" in service.logged
    assert "Traceback" not in service.logged


def test_the_service_runs_when_stdout_cannot_be_written(tmp_path: Path) -> None:
    port = str(free_port())
    code = "import os, main; os.close(1); os.open('/dev/full', os.O_WRONLY); main.main([])"
    with running_service(tmp_path, "-c", code, PORT=port) as service:
        service.wait_for(f"http://127.0.0.1:{port}")

        assert service.stop() in (0, 120)  # Python exits with 120 if it cannot flush stdout


def test_x_forwarded_proto_counts_from_a_trusted_proxy_only(
    unconfigured: tuple[Service, str, Path], tmp_path: Path
) -> None:
    by_https = {"X-Forwarded-Proto": "https"}
    untrusted = httpx.get(f"{unconfigured[1]}/health", headers=by_https)
    port = str(free_port())
    with running_service(tmp_path, PORT=port, TRUSTED_PROXIES="127.0.0.1") as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        trusted = httpx.get(f"http://127.0.0.1:{port}/health", headers=by_https)

    told = ["strict-transport-security" in answer.headers for answer in (untrusted, trusted)]
    assert told == [False, True]


def test_with_docs_off_the_start_prints_no_docs_url(tmp_path: Path) -> None:
    port = str(free_port())
    with running_service(tmp_path, PORT=port, DOCS="false") as service:
        service.wait_for(f"http://127.0.0.1:{port}")

    assert [line.partition(" ")[0] for line in service.printed] == ["curl", "curl"]
