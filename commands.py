"""The commands of `main.py`: serve, print a token, print the OpenAPI document."""

import argparse
import contextlib
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import structlog
from fastapi import FastAPI

from auth import jwks, tokens
from config import Settings, load_settings, refuse
from observability import logs, metrics, telemetry, worker_metrics
from server import run, workers
from server.connections import Connections
from server.worker import Worker
from web import counters, openapi


class AppFactory(Protocol):
    def __call__(
        self, settings: Settings, *, traces: bool = False, worker: Worker | None = None
    ) -> FastAPI: ...


def execute(create_app: AppFactory, arguments: list[str]) -> None:
    """Serve, or with `token USER` print a token for that user, or with `openapi` the OpenAPI document."""
    parser = argparse.ArgumentParser(prog="main.py", description="Serve the task back end.")
    commands = parser.add_subparsers(dest="command", metavar="")
    token = commands.add_parser("token", help="print a token for a user and exit")
    token.add_argument("user")
    commands.add_parser("openapi", help="print the OpenAPI document and exit")
    # The parent of several workers starts each by this command.
    commands.add_parser("worker").add_argument("arguments", nargs="+")
    parsed = parser.parse_args(arguments)
    if parsed.command == "openapi":
        print(_document(create_app), end="")
        return
    settings = load_settings()
    if parsed.command == "token":
        _print_token(parsed.user, settings)
    elif parsed.command == "worker":
        try:
            worker = Worker.parse(*parsed.arguments)
        except (TypeError, ValueError):
            parser.error("worker is started by main.py itself: set WORKERS instead")
        _serve(create_app, settings.divided(worker.count), worker)
    elif settings.workers == "auto":  # with one core too, so that SIGHUP always means the same
        raise SystemExit(_run_workers(settings, workers.cores()))
    elif settings.workers > 1:
        raise SystemExit(_run_workers(settings, settings.workers))
    else:
        _serve(create_app, settings)


def load_app(create_app: AppFactory, settings: Settings, worker: Worker | None = None) -> FastAPI:
    """Configure logging and build the application, or print a mistake in the settings and exit."""
    logs.configure(settings.resolved_log_level, settings.resolved_log_format)
    try:
        return create_app(settings, traces=_exports_traces(), worker=worker)
    except jwks.KeySetInvalid as error:
        refuse([f"JWKS: {error}"])
    except OSError as error:
        refuse([f"JWKS: {error.filename} cannot be read: {error.strerror}"])
    except ValueError as error:
        refuse([f"DATABASE_URL: {error}"])


def _serve(create_app: AppFactory, settings: Settings, worker: Worker | None = None) -> None:
    app = load_app(create_app, settings, worker)
    run.serve(
        app,
        settings.host,
        settings.port,
        Connections(
            limit=settings.max_connections,
            limit_per_client=settings.max_connections_per_address,
            proxies=settings.proxies,
        ),
        proxies=settings.proxies,
        shutdown_grace_s=settings.shutdown_grace_s,
        sockets=worker.sockets if worker else None,
        on_stopping=app.state.services.streams.end,
        on_signal=app.state.services.readiness.stop_waiting,
        on_started=worker.report_ready if worker else _welcome(settings),
    )


def _run_workers(settings: Settings, count: int) -> int:
    """Run the workers and return the exit code."""
    logs.configure(settings.resolved_log_level, settings.resolved_log_format)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(worker_metrics.shared_folder())
            table = stack.enter_context(counters.create_table())
        except OSError as error:
            refuse([f"WORKERS: cannot make temporary files: {error.strerror}"])
        if settings.metrics and settings.metrics_port:
            try:
                stack.callback(
                    metrics.serve(settings.host, settings.metrics_port, worker_metrics.registry(folder))
                )
            except OSError as error:
                structlog.get_logger("main").error(
                    "metrics are not served", port=settings.metrics_port, reason=error.strerror
                )
        return workers.run(
            [sys.executable, sys.argv[0], "worker"],
            count,
            settings.host,
            settings.port,
            folder=folder,
            counters=table.fileno(),
            shutdown_grace_s=settings.shutdown_grace_s,
            on_started=_welcome(settings),
        )


def _welcome(settings: Settings) -> Callable[[str], None] | None:
    return partial(_print_welcome, settings) if settings.unconfigured else None


def _exports_traces() -> bool:
    """Return whether traces are to be sent, and log the reason if they cannot be."""
    if not telemetry.is_wanted(os.environ):
        return False
    if reason := telemetry.not_exported_reason(os.environ):
        structlog.get_logger("main").warning("no traces are sent", reason=reason)
    return reason is None


def _print_welcome(settings: Settings, address: str) -> None:
    curl = f"curl {address}/api/alice/tasks -H 'Authorization: Bearer {_token('alice', settings)}'"
    body = """-H 'Content-Type: application/json' -d '{"title": "Buy milk"}'"""
    lines = [f"{address}/docs"] if settings.docs else []
    with contextlib.suppress(OSError):  # standard output may be closed
        print("\n".join([*lines, f"{curl} {body}", curl]), flush=True)


def _print_token(user_id: str, settings: Settings) -> None:
    if not settings.secrets:
        refuse(["BETTER_AUTH_SECRET: must be given to make a token"])
    if "HS256" not in settings.algorithms:
        refuse(["JWT_ALGORITHMS: must have HS256 to make a token"])
    print(_token(user_id, settings))


def _token(user_id: str, settings: Settings) -> str:
    return tokens.issue(user_id, settings.secrets[0], settings.jwt_expiration_s, **settings.own_claims)


def _document(create_app: AppFactory) -> str:
    """Return the OpenAPI document without local accounts. No settings are read, and no secret is kept."""
    settings = Settings(database_url="sqlite:///never-opened.db", better_auth_secret=secrets.token_hex())
    return openapi.write(create_app(settings).openapi())
