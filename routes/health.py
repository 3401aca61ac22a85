"""/health: whether the process is alive; /health/ready: whether it can serve."""

from fastapi import APIRouter

from errors import Unavailable, responses
from schemas import Health
from server.connections import NoMoreConnections, TooManyConnections
from services import ServicesDep

router = APIRouter(tags=["health"])


@router.get("/health", responses=responses(TooManyConnections, NoMoreConnections))
async def health() -> Health:
    """Say that the process is alive. No token is needed."""
    return Health()


@router.get("/health/ready", responses=responses(TooManyConnections, Unavailable))
async def ready(services: ServicesDep) -> Health:
    """Say that the database answers and has our schema: that requests may come. No token is needed."""
    if sentence := await services.readiness.not_ready_reason():
        raise Unavailable(sentence)
    return Health()
