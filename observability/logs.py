"""The format and destination of log lines, ours and every library's: on standard error."""

import contextlib
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
import structlog


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send all logging to *stream*, standard error by default. *log_format* is `console` or `json`.

    Our own lines are rendered and written at once. Those of libraries pass through the standard library's
    logging, which costs several times as much.
    """
    output = _Unfailing(stream or sys.stderr)
    processors = _processors(log_format, colors=output.isatty())
    logger = structlog.make_filtering_bound_logger(level)
    structlog.configure(
        processors=processors,
        logger_factory=structlog.WriteLoggerFactory(output),
        wrapper_class=_in_one_step(logger, output) if log_format == "json" else logger,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *processors],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # at debug it writes every value
    # The access log is ours; uvicorn asks whether its own has a handler before it builds a line.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


class _Unfailing(io.StringIO):
    """A stream that ignores failed writes, so that a full disk or a closed pipe does not fail a request."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


# Set once for each request, which costs 0.2 µs; structlog's own context costs 0.7 µs and must be cleared.
request_id: ContextVar[str] = ContextVar("request_id")


class BoundedLog:
    """A logger with bounded output, even during an attack or an outage.

    Of events with the same name and reason, at most *per_second* are written per second. The first one in a
    later second says in `left_out` how many were dropped. A line written for a request has its id.
    """

    def __init__(self, name: str, *, per_second: int = 5) -> None:
        self._log = structlog.get_logger(name)
        self._per_second = per_second
        self._second = 0
        self._counts: Counter[tuple[str, str]] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()

    def warning(self, event: str, *, reason: str, **values: Any) -> None:
        """Log *event*; *reason* must come from a small set of ours, never from a request."""
        second, kind = int(time.monotonic()), (event, reason)
        if second != self._second:
            self._second, self._counts = second, Counter()
        self._counts[kind] += 1
        if self._counts[kind] > self._per_second:
            self._left_out[kind] += 1
            return
        if left_out := self._left_out.pop(kind, 0):
            values["left_out"] = left_out
        if identifier := request_id.get(None):
            values.setdefault("request_id", identifier)
        self._log.warning(event, reason=reason, **values)


def _in_one_step(logger: type[Any], output: TextIO) -> type[Any]:
    """Return *logger*, but rendering and writing JSON at once: structlog's own steps cost 20 µs more."""

    class JsonLogger(logger):  # type: ignore[misc] # mypy does not know its base
        def _proxy_to_logger(self, method_name: str, event: str | None = None, /, **values: Any) -> None:
            line = {**self._context, **values, "event": event}
            output.write(_render_json(None, method_name, line) + "\n")

    return JsonLogger


def _processors(log_format: str, *, colors: bool) -> list[Any]:
    if log_format == "json":
        return [_render_json]
    return [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback),
    ]


# Without locals: they hold tokens and bodies.
_render_exception = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _render_json(logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    """Render a line in one step: a processor for each of its parts costs four times as much."""
    if "exc_info" in line:
        line = _render_exception(logger, method, line)
    line["level"] = method
    line["timestamp"] = datetime.now(UTC)
    try:
        return _encode(line).decode()
    except UnicodeEncodeError:  # an unpaired surrogate, which an exception's text may hold
        line["timestamp"] = line["timestamp"].isoformat()
        return json.dumps(line, default=repr)
