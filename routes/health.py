"""/health: whether the process is alive; /health/ready: whether it can serve."""

from fastapi import APIRouter, Request

from errors import Unavailable, responses
from readiness import Readiness
from schemas import Health

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Health:
    """Say that the process is alive. No token is needed."""
    return Health()


@router.get("/health/ready", responses=responses(Unavailable))
async def ready(request: Request) -> Health:
    """Say that the database answers and has our schema: that requests may come. No token is needed."""
    readiness: Readiness = request.app.state.readiness
    if sentence := await readiness.not_ready_reason():
        raise Unavailable(sentence)
    return Health()
