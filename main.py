"""The service: its routes and middleware, in their order."""

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI

import commands
from config import Settings, load_settings
from middleware.access_log import AccessLog
from middleware.front import FrontMiddleware
from observability import telemetry
from queries import idempotency
from routes import accounts, changes, docs, health, metrics, tasks, trash
from server import startup
from server.worker import Worker
from services import Services
from web import openapi, paths, problems


def create_app(settings: Settings, *, traces: bool = False, worker: Worker | None = None) -> FastAPI:
    """Build the application, of *worker* or of the only process.

    Raises:
        ValueError: `DATABASE_URL` is not one that can be used.
    """
    services = Services.build(settings, worker)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await services.open(stack)
            await stack.enter_async_context(
                startup.prepared(
                    services.database,
                    services.readiness,
                    idempotency.sweep(services.database),
                    services.streams.watch(),
                    services.purge.run(),
                    migrates=settings.migrates_on_start and (worker is None or worker.number == 1),
                )
            )
            yield

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
        telemetry=telemetry.configuration(on=traces, is_excluded=paths.is_monitoring),
    )
    app.state.services = services
    problems.install(app)
    openapi.install(app, token_url=f"/api{accounts.TOKEN_PATH}" if services.local_accounts else None)

    for router in (changes.router, tasks.router, trash.router):  # first: routes are tried in order
        app.include_router(router, prefix="/api")
        app.include_router(router, prefix="/api/v1", include_in_schema=False)
    if services.local_accounts:
        app.include_router(accounts.router, prefix="/api")
        app.include_router(accounts.token_router, prefix="/api")
    app.include_router(health.router)
    if settings.serves_metrics:
        app.include_router(metrics.router)
    if settings.docs:
        docs.install(app)

    app.add_middleware(
        FrontMiddleware,
        routes=app.routes,
        rate_limits=services.rate_limits,
        deadline_s=settings.request_deadline_s,
        origins=settings.origins,
        hosts=settings.hosts,
        access_log=AccessLog(lines=settings.access_log, measures=settings.metrics),
    )
    return app


def __getattr__(name: str) -> Any:
    # `uvicorn main:app` reads the environment; importing this module, as tests do, does not.
    if name == "app":
        return commands.load_app(create_app, load_settings())
    raise AttributeError(name)


def main(arguments: list[str]) -> None:
    """Serve, or with `token USER` print a token for that user, or with `openapi` the OpenAPI document."""
    commands.execute(create_app, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
