"""/api/{user_id}/tasks: the six operations on a user's tasks."""

from typing import Annotated, Any
from urllib.parse import parse_qsl, quote, urlencode

import orjson
from fastapi import APIRouter, Path, Query, Request, Response

import queries
from cursors import CursorInvalid, CursorSigner
from db import DbDep, Row
from errors import (
    ContentTooLarge,
    Forbidden,
    NotFound,
    Unauthorized,
    Unavailable,
    Unprocessable,
    UnsupportedMediaType,
    responses,
)
from middleware.auth import UserDep
from middleware.json_body import JsonRoute
from schemas import ID_MAX, Completion, TaskCreate, TaskListQuery, TaskOut, TaskUpdate

TaskId = Annotated[int, Path(ge=1, le=ID_MAX)]

BODY_PROBLEMS = (ContentTooLarge, UnsupportedMediaType)

router = APIRouter(
    prefix="/{user_id}/tasks",
    tags=["tasks"],
    route_class=JsonRoute,
    responses=responses(Unauthorized, Forbidden, Unprocessable, Unavailable),
)


@router.get("", response_model=list[TaskOut])
async def list_tasks(
    user_id: UserDep, db: DbDep, request: Request, query: Annotated[TaskListQuery, Query()]
) -> Response:
    """List your tasks, newest first. The `Link` header leads to the next page, if there is one."""
    listing = queries.Listing(query.states, query.sort_field, query.descending)
    signer: CursorSigner = request.app.state.cursors
    binding = f"{user_id}\n{sorted(listing.states)}\n{listing.sort_field}\n{listing.descending}"
    after = _position(signer, query.cursor, binding)
    headers = {}
    # One more than asked for tells whether there is a next page.
    if query.count:
        rows, total = await queries.list_and_count_tasks(db, user_id, listing, query.limit + 1, after)
        headers["X-Total-Count"] = str(total)
    else:
        rows = await queries.list_tasks(db, user_id, listing, query.limit + 1, after)
    if len(rows) > query.limit:
        del rows[query.limit :]
        cursor = signer.write(queries.position(rows[-1], listing), binding)
        headers["Link"] = f'<{_next_page(request, cursor)}>; rel="next"'
    return _json(rows, headers=headers)


@router.post("", response_model=TaskOut, status_code=201, responses=responses(*BODY_PROBLEMS))
async def create_task(user_id: UserDep, db: DbDep, request: Request, body: TaskCreate) -> Response:
    """Create a task."""
    row = await queries.create_task(db, user_id, body.model_dump())
    return _task(row, 201, {"Location": f"{quote(request.scope['path'])}/{row['id']}"})


@router.get("/{task_id}", response_model=TaskOut, responses=responses(NotFound))
async def get_task(user_id: UserDep, task_id: TaskId, db: DbDep) -> Response:
    """Return one task."""
    return _task(await queries.get_task(db, user_id, task_id))


@router.put("/{task_id}", response_model=TaskOut, responses=responses(NotFound, *BODY_PROBLEMS))
async def update_task(user_id: UserDep, task_id: TaskId, db: DbDep, body: TaskUpdate) -> Response:
    """Set the fields that are sent; the others keep their value."""
    return _task(await queries.update_task(db, user_id, task_id, body.changes()))


@router.delete("/{task_id}", status_code=204, responses=responses(NotFound))
async def delete_task(user_id: UserDep, task_id: TaskId, db: DbDep) -> Response:
    """Delete a task for good."""
    if not await queries.delete_task(db, user_id, task_id):
        raise NotFound
    return Response(status_code=204)


@router.patch("/{task_id}/complete", response_model=TaskOut, responses=responses(NotFound, *BODY_PROBLEMS))
async def complete_task(
    user_id: UserDep, task_id: TaskId, db: DbDep, body: Completion | None = None
) -> Response:
    """Set `completed`, which is safe to retry, or toggle it when there is no body."""
    if body and (changes := body.changes()):
        return _task(await queries.update_task(db, user_id, task_id, changes))
    return _task(await queries.toggle_task(db, user_id, task_id))


def _task(row: Row | None, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if row is None:
        raise NotFound
    return _json(row, status, {"ETag": f'"{row["version"]}"', **(headers or {})})


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with rows as they come: what the database returned needs no second validation."""
    return Response(orjson.dumps(content, option=orjson.OPT_UTC_Z), status, headers, "application/json")


def _position(signer: CursorSigner, cursor: str | None, binding: str) -> tuple[Any, int] | None:
    if cursor is None:
        return None
    try:
        key, task_id = signer.read(cursor, binding)
    except CursorInvalid as error:
        detail = "was not given for this list, its filters and its order"
        raise Unprocessable(
            f"cursor: {detail}", errors=[{"parameter": "cursor", "detail": detail}]
        ) from error
    return key, task_id


def _next_page(request: Request, cursor: str) -> str:
    query = parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True)
    kept = [(name, value) for name, value in query if name != "cursor"]
    return f"{quote(request.scope['path'])}?{urlencode([*kept, ('cursor', cursor)])}"
