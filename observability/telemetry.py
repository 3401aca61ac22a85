"""OpenTelemetry by the framework's instrumentation, switched on by the variables of the specification."""

import importlib.util
from collections.abc import Callable, Mapping

from fastapi.telemetry import TelemetryConfig
from starlette.types import Scope

PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter")
SIGNALS = ("TRACES", "METRICS")


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Return whether *environment* asks for traces or metrics to be exported."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporters = (environment.get(f"OTEL_{signal}_EXPORTER", "").strip().lower() for signal in SIGNALS)
    return _has_endpoint(environment) or any(exporter not in ("", "none") for exporter in exporters)


def not_exported_reason(environment: Mapping[str, str]) -> str | None:
    """Return why nothing can be exported, as a sentence for the operator."""
    if not all(importlib.util.find_spec(package) for package in PACKAGES):
        return "OpenTelemetry is asked for, but its packages are missing: uv sync --group telemetry"
    if not _has_endpoint(environment):
        return "OpenTelemetry is asked for, but OTEL_EXPORTER_OTLP_ENDPOINT does not say where to send to"
    return None


def configuration(*, on: bool, is_excluded: Callable[[Scope], bool]) -> TelemetryConfig:
    """Return the framework's telemetry settings. Its logs stay off, as they would hold clients' input."""
    return {
        "tracing": on,
        "metrics": on,
        "logs": False,
        "operation_spans": False,
        "auto_configure": on,
        "exclude": is_excluded,
    }


def _has_endpoint(environment: Mapping[str, str]) -> bool:
    names = ("", *(f"_{signal}" for signal in SIGNALS))
    return any(environment.get(f"OTEL_EXPORTER_OTLP{name}_ENDPOINT") for name in names)
