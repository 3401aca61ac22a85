"""The objects that all requests share, built once from the settings and reached through a dependency."""

from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from sys import maxsize
from typing import Annotated

import structlog
from fastapi import Depends
from limits.aio.storage import Storage
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.requests import Request

import db
from auth import jwks, tokens
from auth.local_accounts import LocalAccounts
from auth.passwords import Passwords
from auth.sign_in_throttle import SignInThrottle
from config import Settings
from live.streams import Streams
from observability import metrics, worker_metrics
from queries.purge import Purge
from server.readiness import Readiness
from server.worker import Worker
from web import counters
from web.cursors import CursorSealer
from web.rate_limits import RateLimits

Keys = jwks.StaticKeys | jwks.FetchedKeys

_log = structlog.get_logger("main")


@dataclass(frozen=True)
class Services:
    """`local_accounts` is None if they are switched off, `metrics_token` if none is needed, and `worker` if
    this is the only process.
    """

    database: db.Database
    readiness: Readiness
    keys: Keys | None
    verifier: tokens.Verifier
    tasks_max: int  # of one user
    purge: Purge
    cursors: CursorSealer
    streams: Streams
    counters: counters.Counters
    rate_limits: RateLimits
    local_accounts: LocalAccounts | None
    delete_status: int
    metrics_token: str | None = field(repr=False)
    metrics_registry: CollectorRegistry
    metrics_address: tuple[str, int] | None  # of a port that serves nothing else
    worker: Worker | None

    @classmethod
    def build(cls, settings: Settings, worker: Worker | None = None) -> "Services":
        """Build the services of *worker*, or of the only process; nothing is connected yet.

        Raises:
            ValueError: `DATABASE_URL` is not one that can be used.
            KeySetInvalid: `JWKS` is not a key set.
            OSError: `JWKS` names a file that cannot be read.
        """
        timeouts = db.Timeouts(
            settings.database_connect_timeout_s,
            settings.database_statement_timeout_s,
            settings.database_wait_s,
        )
        database = db.connect(
            settings.resolved_database_url, pool_size=settings.database_pool_size, timeouts=timeouts
        )
        database.slow_statement_s = settings.slow_statement_ms / 1000
        keys = _keys(settings)
        storage = counters.connect(settings.rate_limit_storage_url, worker.counters if worker else None)
        tasks_max = settings.max_tasks_per_user or maxsize
        return cls(
            database=database,
            readiness=Readiness(database),
            keys=keys,
            verifier=_verifier(settings, keys),
            tasks_max=tasks_max,
            purge=Purge(database, settings.trash_days, settings.sync_days, tasks_max),
            cursors=CursorSealer(settings.cursor_secrets),
            streams=Streams(
                database,
                # The others are for requests; probes need some of them.
                limit=min(settings.max_streams, settings.max_connections * 3 // 4),
                limit_per_user=settings.max_streams_per_user,
            ),
            counters=storage,
            rate_limits=RateLimits(
                storage, user=settings.rate_limit, anonymous=settings.rate_limit_anonymous
            ),
            local_accounts=_local_accounts(settings, storage) if settings.keeps_accounts else None,
            delete_status=int(settings.delete_status),
            metrics_token=settings.metrics_token,
            metrics_registry=worker_metrics.registry(worker.folder) if worker else REGISTRY,
            metrics_address=(settings.host, settings.metrics_port)
            if settings.metrics and settings.metrics_port and not worker
            else None,
            worker=worker,
        )

    async def open(self, stack: AsyncExitStack) -> None:
        """Open everything except the database, and register on *stack* how it is closed."""
        if self.local_accounts:
            stack.callback(self.local_accounts.passwords.close)
        if self.keys:
            await self.keys.open()
            stack.push_async_callback(self.keys.close)
        stack.push_async_callback(self.counters.close)
        metrics.watch_connections(lambda: self.database.usage)
        if self.worker:
            await stack.enter_async_context(worker_metrics.served(self.worker.folder, self.worker.number))
        if self.metrics_address:
            try:
                stack.callback(metrics.serve(*self.metrics_address))
            except OSError as error:  # another process has the port; serve requests anyway
                _log.error("metrics are not served", port=self.metrics_address[1], reason=error.strerror)


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _services(request: Request) -> Services:
    return services_of(request)


ServicesDep = Annotated[Services, Depends(_services)]


def _keys(settings: Settings) -> Keys | None:
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


def _local_accounts(settings: Settings, storage: Storage) -> LocalAccounts:
    def issue(user_id: str, lifetime_s: float, **claims: str | float) -> str:
        return tokens.issue(user_id, settings.secrets[0], lifetime_s, **settings.own_claims, **claims)

    return LocalAccounts(
        Passwords(), SignInThrottle(storage), issue, settings.jwt_expiration_s, settings.session_max_age_s
    )
