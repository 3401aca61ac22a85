import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from observability import telemetry
from tests.postgres import free_port
from tests.service import run, running_service
from tests.test_access_log import PARENT, TRACE

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@contextmanager
def collector() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Receive exported telemetry; yield the collector's URL and the bodies by path."""
    bodies: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies[self.path] = bodies.get(self.path, b"") + body
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


@pytest.mark.process
def test_requests_are_spans_of_the_callers_trace(tmp_path: Path) -> None:
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    uncompressed = {"OTEL_EXPORTER_OTLP_COMPRESSION": "none"}
    with (
        collector() as (endpoint, bodies),
        running_service(tmp_path, PORT=port, **{ENDPOINT: endpoint}, **uncompressed) as service,
    ):
        service.wait_for(address)
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        httpx.get(f"{address}/api/alice/tasks/7", headers=headers)
        httpx.get(f"{address}/health/ready/")
        assert service.stop() == 0

    spans = bodies["/v1/traces"]
    assert bytes.fromhex(TRACE) in spans
    assert b"/api/{user_id}/tasks/{task_id}" in spans
    assert b"/health" not in spans
    assert "/v1/logs" not in bodies
    assert f"trace_id={TRACE}" in service.logged


@pytest.mark.process
def test_without_the_telemetry_packages_the_start_logs_it_and_goes_on(tmp_path: Path) -> None:
    port = str(free_port())
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; import main; main.main([])"
    with running_service(tmp_path, "-c", code, PORT=port, **{ENDPOINT: "http://127.0.0.1:1"}) as service:
        service.wait_for(f"http://127.0.0.1:{port}")
        assert "its packages are missing: uv sync --group telemetry" in service.logged
        assert service.stop() == 0


@pytest.mark.process
def test_without_otel_variables_the_sdk_is_not_imported(tmp_path: Path) -> None:
    code = "import sys, main; main.app; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"

    assert run(tmp_path, "-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({ENDPOINT: "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": ""}, False),
        ({ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_SERVICE_NAME": "tasks"}, False),
    ],
)
def test_otel_variables_switch_telemetry_on(environment: dict[str, str], wanted: bool) -> None:
    assert telemetry.is_wanted(environment) is wanted


def test_an_otlp_exporter_without_an_endpoint_is_reported() -> None:
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in (
        telemetry.not_exported_reason({"OTEL_TRACES_EXPORTER": "otlp"}) or ""
    )
    assert telemetry.not_exported_reason({ENDPOINT: "http://collector:4318"}) is None
