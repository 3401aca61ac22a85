"""How many tasks a user may have, without counting them for every new one."""

RECOUNT_SHARE = 10
USERS_REMEMBERED = 10_000


class TaskQuota:
    """Counts a user's tasks rarely: each count grants a tenth of the remaining quota.

    Concurrent single inserts may overshoot the limit slightly; bulk inserts take a lock.
    """

    def __init__(self, tasks_max: int) -> None:
        self.tasks_max = tasks_max  # 0 for no limit
        self._unchecked: dict[str, int] = {}

    def take(self, user_id: str) -> bool:
        """Return whether *user_id* may add a task without a count, and use up one of those granted."""
        if not self.tasks_max:
            return True
        left = self._unchecked.get(user_id, 0)
        if left:
            self._unchecked[user_id] = left - 1
        return left > 0

    def counted(self, user_id: str, count: int) -> None:
        """Remember that *user_id* has *count* tasks."""
        if user_id not in self._unchecked and len(self._unchecked) >= USERS_REMEMBERED:
            del self._unchecked[next(iter(self._unchecked))]
        self._unchecked[user_id] = max(0, (self.tasks_max - count) // RECOUNT_SHARE)


NO_LIMIT = TaskQuota(0)
