"""/health: whether the process is alive."""

from fastapi import APIRouter

from schemas import Health

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> Health:
    """Say that the process is alive. No token is needed."""
    return Health()
