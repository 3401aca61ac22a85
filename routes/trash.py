"""/api/{user_id}/tasks/trash and /restore: deleted tasks, until they are deleted for good."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
    Unprocessable,
    responses,
)
from middleware.auth import OwnerDep
from queries import trash
from schemas import (
    Counted,
    CountedIds,
    Deleted,
    Filter,
    NoQuery,
    TaskIds,
    TaskOut,
    TrashedTask,
    TrashQuery,
)
from services import ServicesDep
from web.answers import JSONAnswer, dump_page, json_answer, task_answer
from web.conditions import IfMatch, IfNoneMatch, expected_versions, refuse_conditions
from web.cursors import TaskList
from web.direct_route import BODY_PROBLEMS, DirectRoute
from web.openapi import header
from web.paths import TaskId

router = APIRouter(
    prefix="/{user_id:part}/tasks",
    tags=["trash"],
    route_class=DirectRoute,
    responses=responses(Unauthorized, Forbidden, Unprocessable, QuotaExceeded, Unavailable),
)


@router.get("/trash", response_model=list[TrashedTask], responses={200: {"headers": header("Link")}})
async def list_trash(
    owner: OwnerDep, services: ServicesDep, request: Request, query: Annotated[TrashQuery, Query()]
) -> Response:
    """List your deleted tasks, the last deleted first. The `Link` header leads to the next page, if any."""
    refuse_conditions(request)
    deleted = TaskList(owner.user_id, Filter(), trash.LAST_DELETED_FIRST)
    after = services.cursors.start(query.cursor, deleted)
    # One task more than requested shows whether there is a next page.
    rows = await trash.list_trash(owner, query.limit + 1, after)
    body, length = dump_page(rows[: query.limit])
    if len(rows) == length:
        return JSONAnswer(body)
    last = deleted.position_of(rows[length - 1])
    return JSONAnswer(
        body, 200, {"Link": services.cursors.link_to_next(request.scope, last, deleted.binding)}
    )


@router.post(
    "/{task_id:task}/restore",
    response_model=TaskOut,
    responses=responses(NotFound, Conflict, PreconditionFailed),
)
async def restore_task(
    owner: OwnerDep, task_id: TaskId, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
) -> Response:
    """Bring a task back from the trash. A task that is not there stays as it is, so a retry is safe."""
    versions = await expected_versions(
        if_match, if_none_match, partial(trash.deleted_or_live_task, owner, task_id)
    )
    return task_answer(await trash.restore_task(owner, task_id, versions))


@router.post("/restore", response_model=CountedIds, responses=responses(*BODY_PROBLEMS, Conflict))
async def restore_tasks(
    owner: OwnerDep, request: Request, _query: Annotated[NoQuery, Query()], body: TaskIds
) -> Response:
    """Bring tasks back from the trash, all or none of them. Other ids are ignored."""
    refuse_conditions(request)
    ids = await trash.restore_tasks(owner, body.ids)
    return json_answer({"count": len(ids), "ids": ids})


@router.delete(
    "/trash/{task_id}",
    status_code=204,
    responses=responses(NotFound, PreconditionFailed)
    | {
        200: {
            "model": Deleted,
            "description": "With `DELETE_STATUS=200`, for clients that parse every answer.",
        }
    },
)
async def erase_task(
    owner: OwnerDep,
    services: ServicesDep,
    task_id: TaskId,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Delete a task in the trash for good."""
    versions = await expected_versions(if_match, if_none_match, partial(trash.task_in_trash, owner, task_id))
    await trash.erase_task(owner, task_id, versions)
    return json_answer({"ok": True}) if services.delete_status == 200 else Response(status_code=204)


@router.delete("/trash", response_model=Counted)
async def empty_trash(owner: OwnerDep, request: Request, _query: Annotated[NoQuery, Query()]) -> Response:
    """Delete all tasks in the trash for good."""
    refuse_conditions(request)
    return json_answer({"count": await trash.empty_trash(owner)})
