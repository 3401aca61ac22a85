"""What all requests share, built once by `main.create_app` and reached through a dependency."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from base import Database
from cursors import CursorSealer
from local_accounts import LocalAccounts
from rate_limits import RateLimits
from readiness import Readiness
from task_limit import TaskLimit
from tokens import Verifier


@dataclass(frozen=True, slots=True)
class Services:
    """`local_accounts` is None where nobody can sign up; `metrics_token` where none is needed."""

    database: Database
    readiness: Readiness
    verifier: Verifier
    task_limit: TaskLimit
    cursors: CursorSealer
    rate_limits: RateLimits
    local_accounts: LocalAccounts | None
    delete_status: int
    metrics_token: str | None = field(repr=False)


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _services(request: Request) -> Services:
    return services_of(request)


ServicesDep = Annotated[Services, Depends(_services)]
