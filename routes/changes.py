"""/api/{user_id}/tasks/changes and /events: what has changed, asked for or told as it happens."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response

from errors import (
    Forbidden,
    Gone,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
    Unprocessable,
    invalid_parameter,
    responses,
)
from live.event_stream import EventStream
from live.streams import NewerVersionNeeded
from middleware.auth import OwnerDep
from queries.changes import START, list_changes
from queries.owner import Owner
from queries.revisions import revision_of
from schemas import ID_MAX, ChangesOut, ChangesQuery, EventsQuery, SyncPosition
from services import ServicesDep
from web.answers import JSONAnswer, dump, dump_page
from web.cursors import CursorInvalid, CursorSealer
from web.direct_route import ONCE, DirectRoute
from web.request_state import state_of

LastEventId = Annotated[
    str | None,
    Header(alias="Last-Event-ID", description="The `id` of the last event that arrived."),
    ONCE,
]

router = APIRouter(
    prefix="/{user_id:part}/tasks",
    tags=["tasks"],
    route_class=DirectRoute,
    responses=responses(Unauthorized, Forbidden, Gone, Unprocessable, QuotaExceeded, Unavailable),
)


@router.get("/changes", response_model=ChangesOut)
async def get_changes(
    owner: OwnerDep, services: ServicesDep, query: Annotated[ChangesQuery, Query()]
) -> Response:
    """List the changes since a sync token, or all tasks without one.

    A task that changes while you page appears again; the later entry replaces the earlier.
    """
    since = START if query.since is None else _position(services.cursors, owner, "since", query.since)
    found = await list_changes(owner, since, query.limit)
    body, length = dump_page(found.changes)
    is_cut = length < len(found.changes)
    after = found.positions[length - 1] if is_cut else found.next
    more = b"true" if is_cut or found.has_more else b"false"
    token = dump(_token(services.cursors, owner, after))
    return JSONAnswer(b'{"changes":%s,"next":%s,"has_more":%s}' % (body, token, more))


@router.get(
    "/events",
    response_class=Response,
    responses=responses(NewerVersionNeeded)
    | {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def get_events(
    owner: OwnerDep,
    services: ServicesDep,
    request: Request,
    query: Annotated[EventsQuery, Query()],
    last_event_id: LastEventId = None,
) -> Response:
    """Stream changes as server-sent events: `ready`, then `changed` and `deleted`.

    The `id` of an event is a token for `since` and `Last-Event-ID`. An event `end` says why the stream ends.
    """
    cursors = services.cursors
    if last_event_id:
        since = _position(cursors, owner, "Last-Event-ID", last_event_id)
    elif query.since is not None:
        since = _position(cursors, owner, "since", query.since)
    else:
        since = SyncPosition(await revision_of(owner), ID_MAX, 0)
    await list_changes(owner, since, 1)  # raises while a 410 can still be sent
    services.streams.admit(owner.user_id, request.scope["http_version"])
    return EventStream(
        services.streams,
        owner,
        since,
        expires_at=state_of(request.scope)["expires_at"],
        seal=lambda position: _token(cursors, owner, position),
    )


def _binding(owner: Owner) -> str:
    return f"{owner.user_id}\nchanges"


def _token(cursors: CursorSealer, owner: Owner, position: SyncPosition) -> str:
    return cursors.write(position, _binding(owner))


def _position(cursors: CursorSealer, owner: Owner, parameter: str, token: str) -> SyncPosition:
    """Return the position in *token*.

    Raises:
        Unprocessable: it was not given to this user.
    """
    try:
        match cursors.read(token, _binding(owner)):
            case [int(revision), int(task_id), int(first)]:
                return SyncPosition(revision, task_id, first)
    except CursorInvalid:
        pass
    raise invalid_parameter(parameter, "was not given for these changes")
