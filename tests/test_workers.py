"""Several workers on one address, as `WORKERS` starts them."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from config import Settings
from observability import metrics, worker_metrics
from server import workers
from tests.conftest import SECRET
from tests.postgres import free_port
from tests.service import PROJECT, UNMEASURED, Service, run, running_service
from tests.test_restart import Load, client_of, loading, settings_of, titles

pytestmark = [pytest.mark.no_cover, pytest.mark.process]

COUNT = 2
CLOSING = {"Connection": "close"}  # so that the next request may go to another worker
METRICS_TOKEN = "a-token-for-metrics-of-32-characters"


@dataclass
class Workers:
    """A service with `COUNT` workers."""

    service: Service
    address: str

    @property
    def alive(self) -> dict[int, int]:
        """Return the process id of each worker by its number; while one is replaced, that of the new one."""
        parent = self.service.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        found = {}
        for child in map(int, children):
            with contextlib.suppress(OSError):  # it has just ended
                arguments = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
                if b"worker" in arguments:
                    found[int(arguments[arguments.index(b"worker") + 1])] = child
        return found

    @property
    def starts(self) -> int:
        return self.service.logged.count("Application startup complete")

    async def wait_until(self, condition: "Callable[[Workers], bool]", timeout_s: float = 20) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition(self):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.05)

    async def wait_for_all(self) -> None:
        await self.wait_until(lambda its: its.starts >= COUNT)


@contextlib.contextmanager
def running_workers(folder: Path, **settings: str) -> Iterator[Workers]:
    port = free_port()
    given = {"PORT": str(port), "WORKERS": str(COUNT), "BETTER_AUTH_SECRET": SECRET} | UNMEASURED | settings
    with running_service(folder, **given) as service:
        workers = Workers(service, f"http://127.0.0.1:{port}")
        service.wait_for(workers.address, "/health/ready")  # /health answers before a migration has ended
        yield workers


async def test_replacing_and_stopping_workers_under_load_fails_no_request(
    empty_postgres_url: str, tmp_path: Path
) -> None:
    with running_workers(tmp_path, **settings_of(empty_postgres_url)) as its:
        await its.wait_for_all()
        before = its.alive
        async with loading(its.address) as load:
            await _acknowledged(load, 50)
            its.service.process.send_signal(signal.SIGHUP)
            await its.wait_until(lambda its: "workers are replaced" in its.service.logged, 30)
            await _acknowledged(load, len(load.acknowledged) + 50)
            after, refused = its.alive, load.refused
            code = await asyncio.to_thread(its.service.stop)
            left = [each for each in after.values() if _is_running(each)]
    migrated = its.service.logged.count("Running upgrade  -> 0001")
    (again := tmp_path / "again").mkdir()
    with running_workers(again, **settings_of(empty_postgres_url)) as its:
        kept = await titles(its.address)

    assert before.keys() == after.keys() == {1, 2}
    assert not set(before.values()) & set(after.values())
    assert (code, left, refused, migrated) == (0, [], 0, 1)
    assert (load.broken, load.statuses) == ([], {201})
    assert sorted(kept) == sorted(load.acknowledged)


async def test_a_worker_that_dies_is_replaced_and_until_then_the_others_serve(tmp_path: Path) -> None:
    with running_workers(tmp_path, SHUTDOWN_GRACE_S="1") as its:
        await its.wait_for_all()
        first = its.alive
        os.kill(first[2], signal.SIGKILL)
        await its.wait_until(lambda its: its.starts > COUNT)
        second = its.alive

        (tmp_path / ".env").write_text("TRASH_DAYS=never\n")  # no worker can start any more
        os.kill(second[2], signal.SIGKILL)
        await its.wait_until(lambda its: "worker did not start" in its.service.logged)
        its.service.process.send_signal(signal.SIGHUP)
        await its.wait_until(lambda its: "workers are not replaced" in its.service.logged)
        async with client_of(its.address) as client:
            answers = [await client.get("/health", headers=CLOSING) for _ in range(30)]

        (tmp_path / ".env").unlink()
        await its.wait_until(lambda its: its.starts > COUNT + 1)
        third = its.alive

        os.kill(third[1], signal.SIGSTOP)  # SIGTERM cannot end it
        code = await asyncio.to_thread(its.service.stop)
        left = [each for each in third.values() if _is_running(each)]

    assert (code, left) == (0, [])
    assert first[1] == second[1] == third[1]
    assert len({first[2], second[2], third[2]}) == 3
    assert its.service.logged.count("worker died") == 2
    assert "TRASH_DAYS: must be a valid integer" in its.service.logged
    assert {answer.status_code for answer in answers} == {200}


async def test_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    with running_workers(tmp_path, TMPDIR=str(tmp_path)) as its:  # a killed parent leaves its folder
        await its.wait_for_all()
        ids = list(its.alive.values())
        its.service.process.kill()

        async with asyncio.timeout(5):
            while any(map(_is_running, ids)):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.05)


async def test_attempts_to_start_a_worker_become_rarer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 8:
            raise TimeoutError

    monkeypatch.setattr(asyncio, "sleep", wait)
    workers_ = workers._Workers([sys.executable, "-c", "exit(1)"], tmp_path, 0, end_timeout_s=1)
    slot = workers._Slot(1, [], "127.0.0.1", 0)

    with pytest.raises(TimeoutError):
        await workers_._keep(slot)

    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    assert slot.sockets == []


def test_a_mistake_in_the_settings_is_said_once_and_ends_the_start(tmp_path: Path) -> None:
    settings = {"DATABASE_URL": "mysql://localhost/tasks", "BETTER_AUTH_SECRET": SECRET}
    done = run(tmp_path, str(PROJECT / "main.py"), WORKERS="2", **settings)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("DATABASE_URL: ")


def test_of_two_services_on_one_port_one_serves_and_prints_what_works(tmp_path: Path) -> None:
    port = free_port()
    with contextlib.ExitStack() as stack:
        both = []
        for name in ("one", "other"):
            (folder := tmp_path / name).mkdir()
            both.append(stack.enter_context(running_service(folder, PORT=str(port), WORKERS="2")))
        deadline = time.monotonic() + 20
        while all(each.process.poll() is None for each in both) and time.monotonic() < deadline:
            time.sleep(0.05)
        served, refused = sorted(both, key=lambda each: each.process.poll() is not None)
        served.wait_for(f"http://127.0.0.1:{port}")
        while len(served.printed) < 3:
            time.sleep(0.05)

        assert served.process.poll() is None
        assert refused.process.wait() == 3
        assert "cannot listen" in refused.logged
        assert served.printed[0] == f"http://127.0.0.1:{port}/docs"
        assert f"curl http://127.0.0.1:{port}/api/alice/tasks" in served.printed[2]


async def test_workers_count_together_for_metrics_and_rate_limits(tmp_path: Path) -> None:
    port = str(free_port())
    settings = {"METRICS_PORT": port, "METRICS_TOKEN": METRICS_TOKEN, "RATE_LIMIT": "20/day"}
    with running_workers(tmp_path, **settings) as its:
        await its.wait_for_all()
        async with client_of(its.address) as client:
            answers = [await client.get("/api/alice/tasks", headers=CLOSING) for _ in range(30)]
            scraped = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
            bearer = {"Authorization": f"Bearer {METRICS_TOKEN}"}
            on_the_main_port = (await client.get("/metrics", headers=bearer)).text
            os.kill(its.alive[2], signal.SIGKILL)
            await its.wait_until(lambda its: "worker died" in its.service.logged)
            of_the_others = (await client.get(f"http://127.0.0.1:{port}/metrics")).text

    assert [answer.status_code for answer in answers] == [200] * 20 + [429] * 10
    counted = _samples(scraped, "http_requests_total", route="/api/{user_id}/tasks", status="200")
    assert len(counted) == COUNT
    assert sum(counted.values()) == 20
    name = "http_requests_total"
    assert _samples(on_the_main_port, name, route="/api/{user_id}/tasks", status="200") == counted
    assert len(_samples(scraped, "process_resident_memory_bytes")) == COUNT
    assert "1" in _samples(of_the_others, "process_resident_memory_bytes")


def _samples(text: str, name: str, **labels: str) -> dict[str, float]:
    """Return the values of *name* by worker."""
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def test_a_scrape_fails_if_no_worker_answers(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        metrics.render(worker_metrics.registry(tmp_path))


def test_workers_share_what_one_client_may_open() -> None:
    settings = Settings(max_connections_per_address=256, max_streams_per_user=10, better_auth_secret=SECRET)

    of_four, of_many = settings.divided(4), settings.divided(1000)

    assert (of_four.max_connections_per_address, of_four.max_streams_per_user) == (64, 6)
    assert (of_many.max_connections_per_address, of_many.max_streams_per_user) == (6, 6)
    assert settings.model_copy(update={"max_streams_per_user": 2}).divided(4).max_streams_per_user == 2


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 8), ("150000 100000", 2), ("100000 100000", 1), ("", 8)]
)
def test_auto_is_the_number_of_cores_that_may_be_used(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file := tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(workers, "CPU_QUOTA", file)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    assert workers.cores() == expected


async def _acknowledged(load: Load, count: int) -> None:
    async with asyncio.timeout(20):
        while len(load.acknowledged) < count:  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.05)


def _is_running(process_id: int) -> bool:
    try:
        state = re.search(r"\) (\w)", Path(f"/proc/{process_id}/stat").read_text())
    except OSError:
        return False
    return state is not None and state[1] != "Z"
