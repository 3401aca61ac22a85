"""Who listens to their tasks, and when to look for changes: at once after those of this process, and every
second after those of others, with one statement for all who listen.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog

from database.base import Database
from errors import Overloaded, TooManyRequests, Unavailable
from observability import metrics
from queries.changes import Changes, list_changes, revisions_of
from queries.owner import Owner
from schemas import SyncPosition

POLL_S = 1.0
PAGE = 200  # changes read at once
RETRY_S = 5

_log = structlog.get_logger("live")


class TooManyStreams(TooManyRequests):
    sentence = "You have too many event streams open"

    def __init__(self) -> None:
        super().__init__(retry_after_s=RETRY_S)


class Subscription:
    """One stream of a user. `wake` is set when there may be changes, or when `is_ending`."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.wake = asyncio.Event()
        self.is_ending = False


class Streams:
    """The open streams of this process."""

    def __init__(self, database: Database, *, limit: int, limit_per_user: int) -> None:
        self._database = database
        self._limit, self._limit_per_user = limit, limit_per_user
        self._subscriptions: dict[str, set[Subscription]] = defaultdict(set)
        self._revisions: dict[str, int] = {}  # as last seen, of users who listen
        self._reads: dict[str, dict[SyncPosition, asyncio.Task[Changes]]] = {}
        self._count = 0
        self._is_ending = False

    def admit(self, user_id: str) -> None:
        """Check whether one more stream of a user may be opened.

        Raises:
            TooManyStreams: the user has as many as they may have.
            Overloaded: the process has as many as it may have, or is about to stop.
        """
        if len(self._subscriptions.get(user_id, ())) >= self._limit_per_user:
            raise TooManyStreams
        if self._count >= self._limit or self._is_ending:
            raise Overloaded(retry_after_s=RETRY_S)

    @asynccontextmanager
    async def subscribed(self, owner: Owner) -> AsyncIterator[Subscription]:
        """Count a stream of *owner*, which has been admitted, and wake it until the block ends."""
        subscription = Subscription(owner)
        self._subscriptions[owner.user_id].add(subscription)
        self._count += 1
        metrics.stream_opened()
        try:
            yield subscription
        finally:
            metrics.stream_closed()
            self._count -= 1
            self._subscriptions[owner.user_id].discard(subscription)
            if not self._subscriptions[owner.user_id]:
                del self._subscriptions[owner.user_id]
                self._revisions.pop(owner.user_id, None)
                self._reads.pop(owner.user_id, None)

    def changed(self, user_id: str) -> None:
        """Wake the streams of a user whose tasks may have changed."""
        self._reads.pop(user_id, None)  # they may have begun before the change
        for subscription in self._subscriptions.get(user_id, ()):
            subscription.wake.set()

    async def changes(self, owner: Owner, since: SyncPosition) -> Changes:
        """Return what has changed, read once for all streams at the same position.

        Raises:
            ChangesForgotten: as `list_changes`.
            Unavailable: the database cannot be used right now.
        """
        reads = self._reads.setdefault(owner.user_id, {})
        if since not in reads:
            reads[since] = asyncio.create_task(self._read(owner, since))
        return await asyncio.shield(reads[since])

    async def _read(self, owner: Owner, since: SyncPosition) -> Changes:
        try:
            found = await list_changes(owner, since, PAGE)
            if owner.user_id in self._subscriptions:
                self._revisions[owner.user_id] = found.next.revision
            return found
        finally:
            if (reads := self._reads.get(owner.user_id)) and reads.get(since) is asyncio.current_task():
                del reads[since]

    async def watch(self) -> None:
        """Look for changes of other processes until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._subscriptions:
                continue
            try:
                found = await revisions_of(self._database, list(self._subscriptions))
            except Unavailable:  # the database has logged it
                continue
            except Exception:
                _log.exception("changes of other processes are not seen")
                continue
            for user_id, revision in found.items():
                if user_id in self._subscriptions and self._revisions.get(user_id) != revision:
                    self._revisions[user_id] = revision
                    self.changed(user_id)

    def end(self) -> None:
        """End every stream, and admit no other."""
        self._is_ending = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.is_ending = True
                subscription.wake.set()
