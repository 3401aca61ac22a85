"""/metrics for Prometheus: for requests with the token or, in development, from this machine."""

import asyncio
import ipaddress
import secrets

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from errors import InvalidToken
from middleware.auth import bearer_token
from observability import metrics
from services import services_of

router = APIRouter(include_in_schema=False)


@router.get("/metrics")
async def get_metrics(request: Request) -> Response:
    token = services_of(request).metrics_token
    if token is None and not _is_loopback(request):
        raise HTTPException(404)
    if token is not None and not secrets.compare_digest(bearer_token(request).encode(), token.encode()):
        raise InvalidToken("The token is not the one for metrics")
    # On a thread, because the registry may ask all workers, this one too.
    text = await asyncio.to_thread(metrics.render, services_of(request).metrics_registry)
    return Response(text, media_type=metrics.CONTENT_TYPE)


def _is_loopback(request: Request) -> bool:
    # A request without a peer came through a Unix socket, so from a proxy.
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:  # the proxy passed on something other than an address
        return False
