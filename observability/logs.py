"""The format and destination of log lines, ours and every library's: on standard error."""

import asyncio
import contextlib
import io
import json
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec
import structlog

WAIT_S = 0.05  # until a buffered line is written at the latest
BUFFERED_LINES_MAX = 12  # of some 330 bytes each, so that they fit into one write
WRITE_MAX_BYTES = 4096  # PIPE_BUF on Linux: up to this size, writes of several processes to a pipe do not mix
_BUFFERED_LEVELS = frozenset({"debug", "info"})


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send all logging to *stream*, standard error by default. *log_format* is `console` or `json`.

    Our own JSON lines are rendered in one step. Those below warning are buffered for up to `WAIT_S` and
    written together; the access log renders its lines then too, in a third of the time, as caches are warm.
    Lines of libraries pass through the standard library's logging, which costs several times as much. Its
    handler flushes the buffer when the process exits.
    """
    output = _Output(stream or sys.stderr)
    processors = _processors(log_format, colors=output.isatty())
    logger = structlog.make_filtering_bound_logger(level)
    structlog.configure(
        processors=processors,
        logger_factory=structlog.WriteLoggerFactory(output),
        wrapper_class=_in_one_step(logger, output) if log_format == "json" else logger,
    )
    handler = logging.StreamHandler(output)
    handler.lock = output.lock  # with two, each of two threads could wait for the other
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


class _Output(io.StringIO):
    """A stream that writes buffered lines together.

    It ignores failed writes, so that a full disk or a closed pipe does not fail a request.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self.lock = threading.RLock()  # a finalizer, which may run at any allocation, may log
        # Appending is atomic and needs no lock; taking lines out does.
        self._waiting: deque[tuple[Callable[[Any], bytes], Any]] = deque()
        self._flush_at = 0.0

    def write(self, text: str) -> int:
        """Write the buffered lines, then *text*."""
        with self.lock:
            self._write_waiting()
            return self._write(text)

    def write_soon(self, render: Callable[[Any], bytes], values: Any) -> None:
        """Buffer *values*, of which *render* makes a line. Without an event loop the line is written now."""
        self._waiting.append((render, values))
        if len(self._waiting) >= BUFFERED_LINES_MAX:
            with self.lock:
                self._write_waiting()
        elif time.monotonic() >= self._flush_at:
            self._flush_later()

    def flush(self) -> None:
        self._flush_at = 0.0
        with self.lock:
            self._write_waiting()
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def _flush_later(self) -> None:
        flush_at = time.monotonic() + WAIT_S
        try:
            asyncio.get_running_loop().call_later(WAIT_S, self.flush)
        except RuntimeError:
            with self.lock:
                self._write_waiting()
        else:
            self._flush_at = flush_at

    def _write_waiting(self) -> None:
        piece = b""
        while self._waiting:
            render, values = self._waiting.popleft()
            try:
                line = render(values) + b"\n"
            except Exception as error:  # the others must not be lost
                line = _encoded("error", {"event": "line lost", "reason": repr(error)}) + b"\n"
            if len(piece) + len(line) > WRITE_MAX_BYTES:
                self._write(piece.decode())
                piece = b""
            piece += line
        if piece:
            self._write(piece.decode())

    def _write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return 0

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


def _in_one_step(logger: type[Any], output: _Output) -> type[Any]:
    """Return a subclass of *logger* that renders JSON in one step; structlog's own steps cost 20 µs more."""

    class JsonLogger(logger):  # type: ignore[misc] # mypy does not know its base
        write_soon = staticmethod(output.write_soon)

        def _proxy_to_logger(self, method_name: str, event: str | None = None, /, **values: Any) -> None:
            line = _encoded(method_name, {**self._context, **values, "event": event})
            if method_name in _BUFFERED_LEVELS:
                output.write_soon(bytes, line)
            else:
                output.write(f"{line.decode()}\n")

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


encode = msgspec.json.Encoder(enc_hook=repr).encode


def _render_json(_logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    return _encoded(method, line).decode()


def _encoded(method: str, line: MutableMapping[str, Any]) -> bytes:
    """Render a line in one step: a processor for each of its parts costs four times as much."""
    if "exc_info" in line:
        line = _render_exception(None, method, line)
    line["level"] = method
    line["timestamp"] = datetime.now(UTC)
    try:
        return encode(line)
    except UnicodeEncodeError:  # an unpaired surrogate, which an exception's text may hold
        line["timestamp"] = line["timestamp"].isoformat()
        return json.dumps(line, default=repr).encode()
