import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path

import asyncpg
import httpx
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from auth.jwks import FetchedKeys
from database.pool import Pool
from database.statements import UNNAMED, compile_statement
from db import connect
from main import create_app
from observability import metrics
from tests.conftest import Log, Person, person, raw_status, running, settings_for
from tests.issuer import new_key, running_issuer
from tests.postgres import Server, free_port
from tests.service import command, running_service
from tests.statements import every_statement

TOKEN = "a-token-that-only-prometheus-knows-01"


def value(name: str, text: bytes | None = None, **labels: str) -> float:
    """Return the value of the metric *name*, now or in *text*; an absent sample is 0."""
    families = text_string_to_metric_families((text or metrics.render()).decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


@pytest.fixture
def risen() -> Callable[..., float]:
    """Return the increase of a metric since the test began."""
    before = metrics.render()
    return lambda name, **labels: value(name, **labels) - value(name, before, **labels)


async def test_requests_are_counted_by_template_method_and_status(
    alice: Person, risen: Callable[..., float]
) -> None:
    labels = {"route": "/api/{user_id}/tasks/{task_id}", "method": "GET", "status": "404"}

    for task_id in (1, 2, 3):
        await alice.get(f"/{10**15 + task_id}")

    assert risen("http_requests_total", **labels) == 3
    assert risen("http_request_duration_seconds_count", route=labels["route"]) == 3
    assert alice.user_id not in metrics.render().decode()


async def test_unknown_paths_and_methods_make_no_label_values(
    client: httpx.AsyncClient, risen: Callable[..., float]
) -> None:
    word = secrets.token_hex(8)

    await client.get(f"/{word}")
    await client.get(f"/docs/assets/{word}")
    await client.request(word.upper(), "/health")

    assert risen("http_requests_total", route="unmatched", method="GET", status="404") == 2
    assert risen("http_requests_total", route="/health", method="other", status="405") == 1
    assert word not in metrics.render().decode().lower()


async def test_a_trailing_slash_is_the_same_route(alice: Person, risen: Callable[..., float]) -> None:

    await alice.get("/")

    assert risen("http_requests_total", route="/api/{user_id}/tasks", method="GET") == 1


async def test_a_scrape_of_some_metrics_is_up_to_date(alice: Person) -> None:
    def answered() -> float:
        names = ["http_requests_total"]
        (family,) = REGISTRY.restricted_registry(names).collect()
        return sum(sample.value for sample in family.samples)

    before = answered()
    await alice.get("/1")

    assert answered() == before + 1


async def test_a_crash_is_counted_and_no_longer_in_flight(
    database_url: str, monkeypatch: pytest.MonkeyPatch, risen: Callable[..., float]
) -> None:
    async def fail(*_: object, **values: object) -> None:
        raise RuntimeError("the cause")

    app = create_app(settings_for(database_url))
    async with running(app) as client:
        monkeypatch.setattr(app.state.services.database, "all", fail)
        await person("alice", client).get("/1")

    assert risen("http_requests_total", status="500") == 1
    assert risen("http_requests_in_flight") == 0


async def test_pool_connections_and_waiting_requests_are_gauged(postgres: Server) -> None:
    pool = Pool(lambda: asyncpg.connect(postgres.url), 2, wait_s=6)
    assert pool.usage == {"in use": 0, "idle": 0, "waiting": 0}
    sleepers = [asyncio.create_task(pool.fetch("SELECT pg_sleep(0.3)", [])) for _ in range(5)]
    await asyncio.sleep(0.2)

    assert pool.usage == {"in use": 2, "idle": 0, "waiting": 3}
    metrics.watch_connections(lambda: pool.usage)
    assert value("database_connections", state="waiting") == 3

    await asyncio.gather(*sleepers)
    assert pool.usage == {"in use": 0, "idle": 2, "waiting": 0}
    await pool.close()


async def test_refused_tokens_are_counted_by_reason(
    alice: Person, bob: Person, risen: Callable[..., float]
) -> None:
    reasons = ("Token signature is invalid", "Token is another user's")

    await alice.get(headers={"Authorization": f"Bearer {alice.token[:-8]}AAAAAAAA"})
    await bob.get(alice.tasks)

    assert [risen("tokens_refused_total", reason=reason) for reason in reasons] == [1, 1]


async def test_failed_sign_ins_are_counted_by_reason(database_url: str, risen: Callable[..., float]) -> None:
    async with running(create_app(settings_for(database_url, local_accounts=True))) as client:
        body = {"email": f"{secrets.token_hex(8)}@example.com", "password": "correct horse battery"}
        assert (await client.post("/api/auth/sign-in/email", json=body)).status_code == 401

    assert risen("sign_ins_failed_total", reason="unknown e-mail") == 1


async def test_fetches_of_keys_are_counted(risen: Callable[..., float]) -> None:

    async with running_issuer(new_key("EdDSA")) as issuer:
        for url in (issuer.url, "http://127.0.0.1:1/jwks"):
            keys = FetchedKeys(url)
            await keys.open()
            assert keys._fetching is not None
            await keys._fetching
            await keys.close()

    assert risen("key_fetches_total", outcome="failed") == 1
    assert risen("key_fetches_total", outcome="ok") == 1


def test_rate_limited_requests_are_counted_by_limit(risen: Callable[..., float]) -> None:

    metrics.rate_limited("user")

    assert risen("requests_rate_limited_total", limit="user") == 1


def test_the_number_of_label_values_is_bounded() -> None:
    registry = CollectorRegistry()
    counts = metrics.BoundedCounts("refused", "For this test.", ["reason"], registry)

    for number in range(1000):
        counts.count(str(number))

    shown = [line for line in metrics.render(registry).decode().splitlines() if line.startswith("refused")]
    assert len(shown) == metrics.VALUES_MAX + 1
    assert shown[-1] == f'refused_total{{reason="other"}} {1000.0 - metrics.VALUES_MAX}'


def test_our_counts_and_histograms_read_like_those_of_the_library() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    timed = metrics.Timed("answer_seconds", "For this test.", "route", ours)
    counts = metrics.Counts("answers", "For this test.", ["route"], ours)
    histogram = Histogram(
        "answer_seconds", "For this test.", ["route"], buckets=metrics._SECONDS, registry=theirs
    )
    counter = Counter("answers", "For this test.", ["route"], registry=theirs)

    for seconds in (0.0, 0.001, 0.0011, 0.04, 5.0, 5.1, 1e9):
        timed.observe("/a", seconds)
        histogram.labels("/a").observe(seconds)
        counts.count("/b")
        counter.labels("/b").inc()

    assert metrics.render(ours) == metrics.render(theirs)


async def test_statements_are_timed_by_their_purpose(alice: Person, risen: Callable[..., float]) -> None:
    name = "database_statement_duration_seconds_count"
    purposes = ("create_task", "get_task", "list_tasks", "delete_task")

    task = await alice.create()
    await alice.get(f"/{task['id']}")
    await alice.get()
    await alice.delete(f"/{task['id']}")

    rises = [
        risen(name, statement="create_task") + risen(name, statement="create_task_within_limit"),
        *(risen(name, statement=purpose) for purpose in purposes[1:]),
    ]
    assert [rise >= 1 for rise in rises] == [True] * 4


def test_every_statement_has_a_name_of_its_own() -> None:
    dialect = connect("postgresql://user@host/name", pool_size=1).dialect
    names = {compile_statement(statement, dialect).name for statement in every_statement()}

    assert UNNAMED not in names
    assert len(names) >= 20


async def test_a_slow_statement_is_named_in_the_log_without_its_values(
    database_url: str,
    log: Log,
) -> None:
    async with running(create_app(settings_for(database_url, slow_statement_ms=0.001))) as client:
        alice = person("alice", client)
        answer = await alice.get(headers={"X-Request-ID": "slow-1"})
        assert answer.status_code == 200

    (line,) = [line for line in log.events("slow statement") if line["reason"] == "list_tasks"]
    assert line["duration_ms"] > 0
    assert line["request_id"] == "slow-1"
    assert alice.user_id not in str(line)


async def test_quick_statements_are_not_in_the_log(
    database_url: str,
    log: Log,
) -> None:
    async with running(create_app(settings_for(database_url, slow_statement_ms=60_000))) as client:
        await person("alice", client).get()

    assert log.events("slow statement") == []


async def test_an_unavailable_database_is_counted_and_logged_with_the_requests_id(
    log: Log,
    risen: Callable[..., float],
) -> None:
    url = "postgresql://nobody@127.0.0.1:1/nowhere"
    async with running(create_app(settings_for(url, migrate_on_start=False))) as client:
        answer = await person("alice", client).get(headers={"X-Request-ID": "away-1"})

    assert answer.status_code == 503
    assert risen("database_unavailable_total", reason="ConnectionRefusedError") >= 1
    assert "away-1" in [line.get("request_id") for line in log.events("database unavailable")]


async def test_metrics_are_for_loopback_clients_only_by_default(database_url: str) -> None:
    app = create_app(settings_for(database_url))
    for peer, status in (("127.0.0.1", 200), ("::1", 200), ("203.0.113.7", 404), ("?", 404)):
        transport = httpx.ASGITransport(app, client=(peer, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
            answer = await client.get("/metrics")
        assert answer.status_code == status
        if status == 200:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert "process_resident_memory_bytes" in answer.text


async def test_metrics_require_their_token_once_it_is_configured(database_url: str) -> None:
    app = create_app(settings_for(database_url, metrics_token=TOKEN, environment="production"))

    async def status(*headers: tuple[bytes, bytes]) -> int:
        return await raw_status(app, "GET", "/metrics", b"", *headers)

    assert await status((b"authorization", f"Bearer {TOKEN}".encode())) == 200
    assert await status() == 401
    assert await status((b"authorization", f"Bearer {TOKEN}x".encode())) == 401
    assert await status((b"authorization", "Bearer é".encode("latin-1"))) == 401


@pytest.mark.parametrize(
    "changes", [{"environment": "production"}, {"metrics": False}, {"metrics_port": 9_000}]
)
async def test_metrics_are_404_in_production_when_off_or_on_their_own_port(
    database_url: str, changes: dict[str, object]
) -> None:
    assert await raw_status(create_app(settings_for(database_url, **changes)), "GET", "/metrics") == 404


async def test_with_metrics_off_nothing_is_counted(database_url: str, risen: Callable[..., float]) -> None:

    async with running(create_app(settings_for(database_url, metrics=False))) as client:
        await client.get("/health")

    assert risen("http_requests_total") == 0


@pytest.mark.process
def test_the_metrics_port_needs_no_token_and_may_be_taken_by_another_worker(tmp_path: Path) -> None:
    port, second, own = str(free_port()), str(free_port()), str(free_port())
    with running_service(tmp_path, PORT=port, METRICS_PORT=own) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        assert 'route="/health"' in httpx.get(f"http://127.0.0.1:{own}/metrics").text
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 404
        (other := tmp_path / "other").mkdir()
        with running_service(other, PORT=second, METRICS_PORT=own) as late:
            late.wait_for(f"http://127.0.0.1:{second}")
            assert "metrics are not served" in late.logged
        assert service.stop() == 0


def test_a_short_metrics_token_is_refused_at_start(tmp_path: Path) -> None:
    done = command(tmp_path, METRICS_TOKEN="short")

    assert done.stderr.splitlines() == ["METRICS_TOKEN: must be at least 32 characters"]
