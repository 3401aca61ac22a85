"""What a log line looks like: ours and every library's, on standard error."""

import logging
import sys
from typing import Any, TextIO

import orjson
import structlog


def configure(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send all logging to *stream*, standard error by default. *log_format* is `console` or `json`.

    Our own lines are rendered and written at once; those of libraries come by way of the standard library,
    which costs several times as much.
    """
    stream = stream or sys.stderr
    leading: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = _renderers(log_format, colors=stream.isatty())
    structlog.configure(
        processors=[*leading, *rendering],
        logger_factory=structlog.WriteLoggerFactory(stream),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=leading,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    # The access log is ours; uvicorn asks whether its own has a handler before it builds a line.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"


def _renderers(log_format: str, *, colors: bool) -> list[Any]:
    if log_format == "json":
        # Without locals: they hold tokens and bodies.
        traceback = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        return [
            structlog.processors.ExceptionRenderer(traceback),
            structlog.processors.JSONRenderer(serializer=_dump),
        ]
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]


def _dump(line: dict[str, Any], **_: Any) -> str:
    return orjson.dumps(line, default=repr).decode()
