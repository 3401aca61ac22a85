"""/api/{user_id}/tasks: the six operations on a user's tasks."""

from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BeforeValidator

import queries
from cursors import CursorInvalid, CursorSigner
from db import Row
from errors import (
    ContentTooLarge,
    Forbidden,
    NotFound,
    RequestTimeout,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    responses,
)
from middleware.auth import OwnerDep
from middleware.direct_route import DirectRoute
from queries import Owner
from schemas import ID_MAX, Completion, Listing, TaskCreate, TaskListQuery, TaskOut, TaskUpdate, digits

TaskId = Annotated[int, BeforeValidator(digits), Path(ge=1, le=ID_MAX)]

BODY_PROBLEMS = (RequestTimeout, ContentTooLarge, UnsupportedMediaType)

router = APIRouter(
    prefix="/{user_id}/tasks",
    tags=["tasks"],
    route_class=DirectRoute,
    responses=responses(Unauthorized, Forbidden, Unprocessable, Unavailable),
)


@router.get("", response_model=list[TaskOut])
async def list_tasks(owner: OwnerDep, request: Request, query: Annotated[TaskListQuery, Query()]) -> Response:
    """List your tasks, newest first. The `Link` header leads to the next page, if there is one."""
    listing = query.listing
    binding = _binding(owner, listing)
    after = _position(request, query.cursor, binding, str if listing.sort_field == "title" else datetime)
    headers = {}
    # One more than asked for tells whether there is a next page.
    if query.count:
        rows, total = await queries.list_and_count_tasks(owner, listing, query.limit + 1, after)
        headers["X-Total-Count"] = str(total)
    else:
        rows = await queries.list_tasks(owner, listing, query.limit + 1, after)
    if len(rows) > query.limit:
        del rows[query.limit :]
        headers["Link"] = _link_to_next(request, queries.position(rows[-1], listing), binding)
    return _json(rows, headers=headers)


@router.post("", response_model=TaskOut, status_code=201, responses=responses(*BODY_PROBLEMS))
async def create_task(owner: OwnerDep, request: Request, body: TaskCreate) -> Response:
    """Create a task."""
    row = await queries.create_task(owner, dict(body))
    return _task(row, 201, {"Location": f"{quote(request.scope['path'])}/{row['id']}"})


@router.get("/{task_id}", response_model=TaskOut, responses=responses(NotFound))
async def get_task(owner: OwnerDep, task_id: TaskId) -> Response:
    """Return one task."""
    return _task(await queries.get_task(owner, task_id))


@router.put("/{task_id}", response_model=TaskOut, responses=responses(NotFound, *BODY_PROBLEMS))
async def update_task(owner: OwnerDep, task_id: TaskId, body: TaskUpdate) -> Response:
    """Set the fields that are sent; the others keep their value."""
    return _task(await queries.update_task(owner, task_id, body.changes()))


@router.delete("/{task_id}", status_code=204, responses=responses(NotFound))
async def delete_task(owner: OwnerDep, task_id: TaskId) -> Response:
    """Delete a task for good."""
    if not await queries.delete_task(owner, task_id):
        raise NotFound
    return Response(status_code=204)


@router.patch("/{task_id}/complete", response_model=TaskOut, responses=responses(NotFound, *BODY_PROBLEMS))
async def complete_task(owner: OwnerDep, task_id: TaskId, body: Completion | None = None) -> Response:
    """Set `completed`, which is safe to retry, or toggle it when there is no body."""
    if body and (changes := body.changes()):
        return _task(await queries.update_task(owner, task_id, changes))
    return _task(await queries.toggle_task(owner, task_id))


def _task(row: Row | None, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if row is None:
        raise NotFound
    return _json(row, status, {"ETag": f'"{row["version"]}"', **(headers or {})})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with rows as they come: what the database returned needs no second validation."""
    return Response(orjson.dumps(content, option=orjson.OPT_UTC_Z), status, headers, "application/json")


def _binding(owner: Owner, listing: Listing) -> str:
    """What a cursor is good for: one user's tasks, by these filters and in this order."""
    return f"{owner.user_id}\n{sorted(listing.states)}\n{listing.sort_field}\n{listing.descending}"


def _position(request: Request, cursor: str | None, binding: str, kind: type) -> tuple[Any, int] | None:
    if cursor is None:
        return None
    signer: CursorSigner = request.app.state.cursors
    try:
        key, task_id = signer.read(cursor, binding)
        # Signed or not: what goes into a statement is checked.
        if not isinstance(key, kind) or not isinstance(task_id, int) or not 1 <= task_id <= ID_MAX:
            raise CursorInvalid
    except ValueError as error:
        mistake = "was not given for this list, its filters and its order"
        raise Unprocessable([{"parameter": "cursor", "detail": mistake}]) from error
    return key, task_id


def _link_to_next(request: Request, position: tuple[Any, int], binding: str) -> str:
    """Return a `Link` (RFC 8288) to the page after *position*, every other parameter as it was sent."""
    signer: CursorSigner = request.app.state.cursors
    sent = request.scope["query_string"].decode("latin-1").split("&")
    kept = [parameter for parameter in sent if parameter and not parameter.startswith("cursor=")]
    query = quote("&".join([*kept, f"cursor={signer.write(position, binding)}"]), safe="%&=+,:/?-._~!$'()*;@")
    return f'<{quote(request.scope["path"])}?{query}>; rel="next"'
