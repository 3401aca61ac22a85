"""The refusals that queries raise, in the domain's terms. `web/problems.py` has the answer to each."""

from typing import Any


class Refusal(Exception):
    """A request that cannot be carried out in the present state; nothing has been changed."""


class TaskNotFound(Refusal):
    """The owner has no task with this id."""


class VersionConflict(Refusal):
    """The *task* has another version than the request expects."""

    def __init__(self, task: dict[str, Any]) -> None:
        super().__init__(task["version"])
        self.task = task


class TooManyTasks(Refusal):
    """The owner would have more tasks than *limit*."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class OperationRefused(Refusal):
    """The operation *index* of several was refused, so none was done."""

    def __init__(self, index: int, refusal: Refusal) -> None:
        super().__init__(index, refusal)
        self.index, self.refusal = index, refusal


class KeyRefused(Refusal):
    """An `Idempotency-Key` cannot be used for this request."""


class KeyInUse(KeyRefused):
    """The first request with this key is still running."""


class KeyReused(KeyRefused):
    """The key belongs to another request."""


class TooManyKeys(KeyRefused):
    """The user has as many unexpired keys as are kept."""


class ChangesForgotten(Refusal):
    """A tombstone from after the client's position has been dropped, so the client has to start again."""
