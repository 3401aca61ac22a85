"""The open event streams. Changes made by this process wake them at once; those of other processes are polled
every second, by one statement for all users.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NamedTuple

import structlog

from database.base import Database
from errors import Overloaded, Problem, TooManyRequests, Unavailable
from observability import metrics
from queries.changes import Changes, list_changes, revisions_of
from queries.owner import Owner
from schemas import SyncPosition

POLL_S = 1.0
PAGE_SIZE = 100  # changes read at once; a page is in memory for each place from which a user's streams read
RETRY_S = 5

Encode = Callable[[Changes], bytes]

_log = structlog.get_logger("live")


class TooManyStreams(TooManyRequests):
    sentence = "You have too many event streams open"

    def __init__(self) -> None:
        super().__init__(retry_after_s=RETRY_S)


class NewerVersionNeeded(Problem):
    """HTTP/1.0 has no chunks, in which a stream is sent."""

    status = 426
    sentence = "Event streams need HTTP/1.1"

    def __init__(self) -> None:
        super().__init__(headers={"Upgrade": "HTTP/1.1"})


class Page(NamedTuple):
    """Encoded events, how many they are, and where to go on."""

    events: bytes
    length: int
    next: SyncPosition
    has_more: bool


class Subscription:
    """One stream of a user. `wake` is set when there may be changes; `ending` is done when it has to end."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.wake = asyncio.Event()
        self.ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.revision = 0  # up to which it has read


class Streams:
    """The open streams of this process."""

    def __init__(self, database: Database, *, limit: int, limit_per_user: int) -> None:
        self._database = database
        self._limit, self._limit_per_user = limit, limit_per_user
        self._subscriptions: dict[str, set[Subscription]] = defaultdict(set)
        self._reads: dict[str, dict[SyncPosition, asyncio.Task[Page]]] = {}
        self._count = 0
        self._is_ending = False

    def admit(self, user_id: str, http_version: str) -> None:
        """Check whether one more stream of a user may be opened.

        Raises:
            NewerVersionNeeded: it cannot be sent in this version.
            TooManyStreams: the user has as many as they may have.
            Overloaded: the process has as many as it may have, or is about to stop.
        """
        if http_version == "1.0":
            raise NewerVersionNeeded
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
                self._reads.pop(owner.user_id, None)

    def changed(self, user_id: str) -> None:
        """Wake the streams of a user whose tasks may have changed."""
        self._reads.pop(user_id, None)  # they may have begun before the change
        for subscription in self._subscriptions.get(user_id, ()):
            subscription.wake.set()

    def read(self, owner: Owner, since: SyncPosition, encode: Encode) -> asyncio.Task[Page]:
        """Return the task that reads what has changed, one for all streams at the same position.

        It may fail with `ChangesForgotten`, or with `Unavailable` or `TooManyRequests` for the moment.
        """
        reads = self._reads.setdefault(owner.user_id, {})
        if since not in reads:
            reads[since] = asyncio.create_task(self._read(owner, since, encode))
            # All streams that wait for it may end before it fails.
            reads[since].add_done_callback(lambda read: read.cancelled() or read.exception())
        return reads[since]

    async def _read(self, owner: Owner, since: SyncPosition, encode: Encode) -> Page:
        try:
            found = await list_changes(owner, since, PAGE_SIZE)
            return Page(encode(found), len(found.changes), found.next, found.has_more)
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
                asked = list(self._subscriptions)
                found = await revisions_of(self._database, asked)
            except Unavailable:  # the database has logged it
                continue
            except Exception:
                _log.exception("changes of other processes are not seen")
                continue
            for user_id in asked:
                revision = found.get(user_id, 0)  # the user may have been moved to another database
                if any(each.revision != revision for each in self._subscriptions.get(user_id, ())):
                    self.changed(user_id)

    def end(self) -> None:
        """End every stream, and admit no other."""
        self._is_ending = True
        for subscriptions in self._subscriptions.values():
            for subscription in subscriptions:
                subscription.wake.set()
                if not subscription.ending.done():
                    subscription.ending.set_result(None)
