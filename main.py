"""The service: what is mounted and in which order, and the commands that start it."""

import argparse
import asyncio
import atexit
import contextlib
import gc
import itertools
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI

import counts
import db
import failures
import idempotency
import jwks
import logs
import metrics
import openapi
import problems
import telemetry
import tokens
from attempts import Attempts
from config import Settings, load_settings, refuse
from connections import Connections
from cursors import CursorSealer
from local_accounts import LocalAccounts
from middleware.access_log import AccessLogMiddleware
from middleware.allowed_hosts import AllowedHostsMiddleware
from middleware.cors import ProblemCORSMiddleware
from middleware.deadline import DeadlineMiddleware
from middleware.head import HeadMiddleware
from middleware.rate_limit import RateLimitMiddleware
from middleware.security_headers import SecurityHeadersMiddleware
from middleware.slashes import SlashesMiddleware
from passwords import Passwords
from protocol import Protocol
from rate_limits import RateLimits
from readiness import Readiness
from routes import accounts, docs, health, tasks
from routes import metrics as metrics_route
from services import Services
from task_limit import TaskLimit

STARTUP_FAILURE = 3  # uvicorn's
SD_LISTEN_FDS_START = 3
START_WAIT_S = 1.5  # for the database; then the port opens, and 503 is the answer until it is there
RETRY_MAX_S = 30.0  # between two attempts to migrate a database that is away
MIGRATION_WAIT_S = 1.0  # for another process that migrates, before this one says so in the log
END_S = 0.5  # for closing connections, and then for threads; after that the process ends anyway

_log = structlog.get_logger("main")


def create_app(settings: Settings, *, traces: bool = False) -> FastAPI:
    """Build the application.

    Raises:
        ValueError: `DATABASE_URL` is not one that can be used.
    """
    database = db.connect(
        settings.resolved_database_url,
        pool_size=settings.database_pool_size,
        timeouts=db.Timeouts(
            settings.database_connect_timeout_s,
            settings.database_statement_timeout_s,
            settings.database_wait_s,
        ),
    )
    database.slow_statement_s = settings.slow_statement_ms / 1000
    readiness = Readiness(database)
    keys = _keys(settings)
    storage = counts.connect(settings.rate_limit_storage_url)
    rate_limits = RateLimits(storage, user=settings.rate_limit, anonymous=settings.rate_limit_anonymous)
    local_accounts = _local_accounts(settings, Attempts(storage))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if settings.migrates_on_start:
            _import_alembic()
        if keys:
            await keys.open()
        end_metrics = _serve_metrics(settings)
        metrics.watch_connections(lambda: database.usage)
        first_attempt: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        preparing = asyncio.create_task(
            _prepare(database, readiness, first_attempt, migrates=settings.migrates_on_start)
        )
        sweeping = asyncio.create_task(idempotency.sweep(database))
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(first_attempt, START_WAIT_S)
            gc.freeze()  # what start-up has made stays; the collector need not look at it again and again
            yield
        finally:
            end_metrics()
            preparing.cancel()
            sweeping.cancel()
            await asyncio.wait({preparing, sweeping, asyncio.create_task(database.close())}, timeout=END_S)
            await storage.close()
            if keys:
                await keys.close()
            if local_accounts:
                local_accounts.passwords.close()

    app = FastAPI(
        title="Task back end",
        summary="Keeps people's tasks, each user's apart from every other's.",
        license_info=openapi.LICENSE,
        servers=openapi.SERVERS,
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        telemetry=telemetry.configuration(on=traces),
    )
    app.state.services = Services(
        database=database,
        readiness=readiness,
        verifier=_verifier(settings, keys),
        task_limit=TaskLimit(settings.max_tasks_per_user),
        cursors=CursorSealer(settings.cursor_secrets),
        rate_limits=rate_limits,
        local_accounts=local_accounts,
        delete_status=int(settings.delete_status),
        metrics_token=settings.metrics_token,
    )

    problems.install(app)
    openapi.install(app, token_url=f"/api{accounts.TOKEN_PATH}" if local_accounts else None)
    app.include_router(tasks.router, prefix="/api")  # first: routes are tried in order
    app.include_router(tasks.router, prefix="/api/v1", include_in_schema=False)
    if local_accounts:
        app.include_router(accounts.router, prefix="/api")
        app.include_router(accounts.token_router, prefix="/api")
    app.include_router(health.router)
    if settings.serves_metrics:
        app.include_router(metrics_route.router)
    if settings.docs:
        docs.install(app)

    # The last added is the outermost.
    app.add_middleware(SlashesMiddleware)
    app.add_middleware(RateLimitMiddleware, rate_limits=rate_limits)
    if settings.hosts:
        app.add_middleware(AllowedHostsMiddleware, hosts=settings.hosts)
    app.add_middleware(HeadMiddleware)
    app.add_middleware(DeadlineMiddleware, deadline_s=settings.request_deadline_s)
    app.add_middleware(AccessLogMiddleware, lines=settings.access_log, measures=settings.metrics)
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(ProblemCORSMiddleware, origins=settings.origins)
    return app


def _keys(settings: Settings) -> jwks.StaticKeys | jwks.FetchedKeys | None:
    if settings.jwks:
        inline = settings.jwks.lstrip().startswith("{")
        return jwks.StaticKeys(settings.jwks.encode() if inline else Path(settings.jwks).read_bytes())
    return jwks.FetchedKeys(settings.resolved_jwks_url) if settings.resolved_jwks_url else None


def _verifier(settings: Settings, keys: tokens.KeySource | None) -> tokens.Verifier:
    return tokens.Verifier(
        settings.secrets,
        keys,
        algorithms=settings.algorithms,
        of_secrets=tokens.Expectations(settings.given_issuers, settings.given_audiences),
        of_keys=tokens.Expectations(settings.issuers, settings.audiences),
        leeway_s=settings.jwt_leeway_s,
    )


def _local_accounts(settings: Settings, attempts: Attempts) -> LocalAccounts | None:
    if not settings.keeps_accounts:
        return None

    def issue(user_id: str, lifetime_s: float, **claims: str | float) -> str:
        return tokens.issue(user_id, settings.secrets[0], lifetime_s, **settings.own_claims, **claims)

    return LocalAccounts(Passwords(), attempts, issue, settings.jwt_expiration_s, settings.session_max_age_s)


async def _log_not_ready(readiness: Readiness) -> None:
    try:
        if reason := await readiness.not_ready_reason():
            _log.error("not ready", reason=reason)
    except Exception:  # whoever asks later is told so too: no reason not to start
        _log.exception("not ready")


def _serve_metrics(settings: Settings) -> Callable[[], None]:
    """Serve metrics at a port of their own, if there is to be one, and return what ends that."""
    if settings.metrics and settings.metrics_port:
        try:
            return metrics.serve(settings.host, settings.metrics_port)
        except OSError as error:  # another worker has it: no reason not to serve
            _log.error("metrics are not served", port=settings.metrics_port, reason=error.strerror)
    return lambda: None


async def _prepare(
    database: db.Database, readiness: Readiness, first_attempt: "asyncio.Future[None]", *, migrates: bool
) -> None:
    """Migrate and connect, and try again while the database is unreachable.

    *first_attempt* ends with the first attempt, with the exception if the failure is permanent. By then the
    caller may have stopped waiting.
    """
    migrated, opened = not migrates, False
    try:
        for attempt in itertools.count():
            migrated = migrated or await _succeeds(_migrate(database), "database cannot be migrated yet")
            opened = opened or await _succeeds(database.open(), "database cannot be opened yet")
            if attempt == 0:
                await _log_not_ready(readiness)
            if not first_attempt.done():
                first_attempt.set_result(None)
            if migrated and opened:
                return
            await asyncio.sleep(min(2**attempt, RETRY_MAX_S))
    except Exception as error:
        if first_attempt.done():
            _log.exception("migration failed" if not migrated else "database cannot be opened")
        else:
            first_attempt.set_exception(error)


async def _succeeds(attempt: Awaitable[None], event: str) -> bool:
    try:
        await attempt
    except Exception as error:
        if not failures.is_transient(error):
            raise
        _log.warning(event, reason=type(error).__name__, error=str(error))
        return False
    return True


async def _migrate(database: db.Database) -> None:
    """Bring the schema to head on this loop, where it can be cancelled: its revision is then undone."""
    engine = database.engine()
    try:
        async with engine.connect() as connection:
            await connection.run_sync(
                lambda synchronous: _upgrade(connection=synchronous, wait_s=MIGRATION_WAIT_S)
            )
    finally:
        await engine.dispose()


def migrate(database: db.Database) -> None:
    """Bring the schema of *database* to head; of several processes one does it and the others wait."""
    _upgrade(database=database)


def _upgrade(**attributes: Any) -> None:
    command, config = _import_alembic()
    alembic = config.Config(toml_file=Path(__file__).with_name("pyproject.toml"))
    alembic.attributes.update(attributes)
    command.upgrade(alembic, "head")


def _import_alembic() -> tuple[Any, Any]:
    from alembic import command, config  # 0.3 s, which only a start that migrates pays for

    return command, config


def load_app(settings: Settings) -> FastAPI:
    """Build the application, or end the start with a sentence."""
    try:
        return create_app(settings, traces=_traces())
    except jwks.KeySetInvalid as error:
        refuse([f"JWKS: {error}"])
    except OSError as error:
        refuse([f"JWKS: {error.filename} cannot be read: {error.strerror}"])
    except ValueError as error:
        refuse([f"DATABASE_URL: {error}"])


def _traces() -> bool:
    """Return whether traces are to be sent, and say so if they cannot be."""
    if not telemetry.is_wanted(os.environ):
        return False
    if reason := telemetry.not_exported_reason(os.environ):
        _log.warning("no traces are sent", reason=reason)
    return reason is None


def __getattr__(name: str) -> Any:
    # `uvicorn main:app` reads the environment; importing this module, as tests do, does not.
    if name == "app":
        settings = load_settings()
        logs.configure(settings.resolved_log_level, settings.resolved_log_format)
        return load_app(settings)
    raise AttributeError(name)


class _Server(uvicorn.Server):
    """Says how to try the service once it listens, and ends when it has been asked to."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings

    async def serve(self, sockets: Any = None) -> None:
        await super().serve(sockets)
        # A thread that waits for a lock of SQLite cannot be interrupted, and neither can a look-up of a name.
        # To end it loses nothing: what a database has not been told to commit, it undoes.
        leaving = threading.Timer(END_S, os._exit, [0 if self.started else STARTUP_FAILURE])
        leaving.daemon = True
        leaving.start()
        atexit.register(leaving.cancel)  # all threads have ended

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self._settings.unconfigured:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            with contextlib.suppress(OSError):  # nobody may be reading
                lines = _welcome(address, _token("alice", self._settings))
                print("\n".join(lines if self._settings.docs else lines[1:]), flush=True)


def _welcome(address: str, token: str) -> list[str]:
    curl = f"curl {address}/api/alice/tasks -H 'Authorization: Bearer {token}'"
    body = """-H 'Content-Type: application/json' -d '{"title": "Buy milk"}'"""
    return [f"{address}/docs", f"{curl} {body}", curl]


def _token(user_id: str, settings: Settings) -> str:
    return tokens.issue(user_id, settings.secrets[0], settings.jwt_expiration_s, **settings.own_claims)


def _document() -> str:
    """Return the OpenAPI document: the same with all settings, so none are read and no secret is kept."""
    settings = Settings(database_url="sqlite:///never-opened.db", better_auth_secret=secrets.token_hex())
    return openapi.write(create_app(settings).openapi())


def main(arguments: list[str]) -> None:
    """Serve, or with `token USER` print a token for that user, or with `openapi` the OpenAPI document."""
    parser = argparse.ArgumentParser(prog="main.py", description="Serve the task back end.")
    commands = parser.add_subparsers(dest="command", metavar="")
    token = commands.add_parser("token", help="print a token for a user and exit")
    token.add_argument("user")
    commands.add_parser("openapi", help="print the OpenAPI document and exit")
    parsed = parser.parse_args(arguments)
    if parsed.command == "openapi":
        print(_document(), end="")
        return
    settings = load_settings()
    if parsed.command == "token":
        if not settings.secrets:
            refuse(["BETTER_AUTH_SECRET: must be given to make a token"])
        if "HS256" not in settings.algorithms:
            refuse(["JWT_ALGORITHMS: must have HS256 to make a token"])
        print(_token(parsed.user, settings))
        return
    serve(settings)


def serve(settings: Settings) -> None:
    """Serve until a signal asks to stop; what has begun is finished first."""
    logs.configure(settings.resolved_log_level, settings.resolved_log_format)
    connections = Connections(
        most=settings.max_connections,
        most_per_client=settings.max_connections_per_address,
        proxies=settings.proxies,
    )
    config = uvicorn.Config(
        load_app(settings),
        settings.host,
        settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=settings.shutdown_grace_s,
        server_header=False,
        http=partial(Protocol, connections=connections),  # type: ignore[arg-type] # it is called and no more
        ws="none",
        # By itself uvicorn would believe whoever calls from this machine.
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=settings.proxies,
    )
    server = _Server(config, settings)
    # uvicorn shuts down in order and then raises the signal again; to stop when asked is a success. A signal
    # before this line ends the process by itself (-15): nothing has been accepted by then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    server.run(_inherited_sockets())
    if not server.started:
        raise SystemExit(STARTUP_FAILURE)


def _inherited_sockets() -> list[socket.socket] | None:
    """Return what systemd listens on for us (sd_listen_fds(3)), so that processes may share one address."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = int(os.environ.get("LISTEN_FDS", 0))
    return [socket.socket(fileno=SD_LISTEN_FDS_START + number) for number in range(count)] or None


if __name__ == "__main__":
    main(sys.argv[1:])
