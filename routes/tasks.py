"""/api/{user_id}/tasks: the operations on a user's tasks."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from pydantic import BaseModel

from database.statements import Row
from errors import (
    Conflict,
    Forbidden,
    NotFound,
    PreconditionFailed,
    QuotaExceeded,
    Unauthorized,
    Unavailable,
    Unprocessable,
    invalid_parameter,
    responses,
)
from middleware.auth import OwnerDep
from models import IDEMPOTENCY_KEY_MAX
from queries import bulk, idempotency, lists, stats, tasks
from queries.owner import Owner
from queries.revisions import revision_of
from refusals import Refusal, VersionConflict
from schemas import (
    AllCompleted,
    Bulk,
    BulkDone,
    BulkQuery,
    Completion,
    Counted,
    CountedIds,
    Deleted,
    Filter,
    Stats,
    StatsQuery,
    TaskCreate,
    TaskListQuery,
    TaskOut,
    TaskSelection,
    TaskUpdate,
)
from services import ServicesDep
from web import etags
from web.answers import JSONAnswer, dump_page, json_answer, task_answer
from web.conditions import IfMatch, IfNoneMatch, expected_versions, refuse_conditions
from web.cursors import TaskList, description
from web.direct_route import BODY_PROBLEMS, ONCE, DirectRoute
from web.openapi import MERGE_PATCH, header
from web.paths import TaskId, quoted_path
from web.problems import problem_of

# The keys that `_idempotency_key` accepts: bare or quoted, of printable Latin-1 characters.
_ANY = r"[ -~\u00a1-\u00ac\u00ae-\u00ff]"
_NO_SPACE = r"[!-~\u00a1-\u00ac\u00ae-\u00ff]"
_NO_QUOTE = r"[!#-~\u00a1-\u00ac\u00ae-\u00ff]"
IDEMPOTENCY_KEY_PATTERN = (
    f"^({_NO_QUOTE}({_ANY}{{0,{IDEMPOTENCY_KEY_MAX - 2}}}{_NO_SPACE})?"
    f'|"({_ANY}{{0,{IDEMPOTENCY_KEY_MAX - 2}}}{_NO_QUOTE})?'
    f'|"{_ANY}{{1,{IDEMPOTENCY_KEY_MAX}}}")$'
)
Responses = dict[int | str, dict[str, Any]]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Sent again within a day with the same body, the request is answered as before.",
        examples=["4c0b5e0d-6d3f-4f0e-9a4a-3ce2b6c1a7d8"],
        json_schema_extra={"pattern": IDEMPOTENCY_KEY_PATTERN},
    ),
    ONCE,
]
MergePatch = Annotated[TaskUpdate, Body(media_type=MERGE_PATCH)]

# The browser keeps the answer and asks whether it is still so; no one else keeps it.
CACHED = {"Cache-Control": "private, no-cache", "Vary": "Authorization"}
NOT_MODIFIED: Responses = {304: {"description": "The client has it already"}}
TAGGED: Responses = {200: {"headers": header("ETag")}}
LISTED: Responses = {200: {"headers": header("Link") | header("X-Total-Count") | header("ETag")}}
CHANGE_PROBLEMS = responses(*BODY_PROBLEMS, NotFound, Conflict, PreconditionFailed)


router = APIRouter(
    prefix="/{user_id:part}/tasks",
    tags=["tasks"],
    route_class=DirectRoute,
    responses=responses(Unauthorized, Forbidden, Unprocessable, QuotaExceeded, Unavailable),
)


@router.get(
    "",
    response_model=list[TaskOut],
    responses=LISTED | NOT_MODIFIED,
)
async def list_tasks(
    owner: OwnerDep,
    services: ServicesDep,
    request: Request,
    query: Annotated[TaskListQuery, Query()],
    if_none_match: IfNoneMatch = None,
) -> Response:
    """List your tasks, newest first. The `Link` header leads to the next page, if there is one."""
    filters, order = query.filter, query.ordering
    task_list = TaskList(owner.user_id, filters, order)
    after = services.cursors.start(query.cursor, task_list)
    seen = (description(filters, order), query.limit, query.cursor, query.count, services.cursors.fingerprint)
    if known := await _known(owner, if_none_match, *seen):
        return known
    # One task more than requested shows whether there is a next page.
    rows, revision, total = await lists.list_tasks(
        owner, filters, order, query.limit + 1, after, counts=query.count
    )
    headers = CACHED | {"ETag": etags.of_list(revision, *seen)}
    if total is not None:
        headers["X-Total-Count"] = str(total)
    body, length = dump_page(rows[: query.limit])
    if len(rows) > length:
        headers["Link"] = services.cursors.link_to_next(
            request.scope, task_list.position_of(rows[length - 1]), task_list.binding
        )
    return JSONAnswer(body, 200, headers)


@router.post(
    "",
    response_model=TaskOut,
    status_code=201,
    responses=responses(*BODY_PROBLEMS, Conflict) | {201: {"headers": header("Idempotent-Replayed")}},
)
async def create_task(
    owner: OwnerDep, request: Request, body: TaskCreate, idempotency_key: IdempotencyKey = None
) -> Response:
    """Create a task."""
    refuse_conditions(request)

    async def create(owner: Owner) -> Row:
        return await tasks.create_task(owner, vars(body))  # `dict` takes 4 µs

    row, headers = await _once(owner, idempotency_key, body, create)
    return task_answer(row, 201, headers | {"Location": f"{quoted_path(request.scope)}/{row['id']}"})


@router.get(
    "/{task_id:task}",
    response_model=TaskOut,
    responses=responses(NotFound, PreconditionFailed) | NOT_MODIFIED,
)
async def get_task(
    owner: OwnerDep, task_id: TaskId, if_match: IfMatch = None, if_none_match: IfNoneMatch = None
) -> Response:
    """Return one task."""
    versions = etags.expected_versions(if_match)
    row = await tasks.get_task(owner, task_id)
    if versions is not None and row["version"] not in versions:
        raise VersionConflict(row)
    tag = etags.write(row["version"])
    if etags.is_known(tag, if_none_match):
        return _not_modified(tag)
    return task_answer(row, headers=CACHED)


@router.patch("/{task_id:task}/complete", response_model=TaskOut, responses=CHANGE_PROBLEMS)
async def complete_task(
    owner: OwnerDep,
    task_id: TaskId,
    body: Completion | None = None,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Set `completed`, which is safe to retry, or toggle it when no body names it."""
    versions = await _versions(owner, task_id, if_match, if_none_match)
    if body and (changes := body.changes()):
        return task_answer(await tasks.update_task(owner, task_id, changes, versions))
    return task_answer(await tasks.toggle_task(owner, task_id, versions))


@router.put("/{task_id:task}", response_model=TaskOut, responses=CHANGE_PROBLEMS)
async def update_task(
    owner: OwnerDep,
    task_id: TaskId,
    body: TaskUpdate,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Set the fields that are sent; the others keep their value."""
    versions = await _versions(owner, task_id, if_match, if_none_match)
    return task_answer(await tasks.update_task(owner, task_id, body.changes(), versions))


@router.patch(
    "/{task_id:task}",
    response_model=TaskOut,
    responses=CHANGE_PROBLEMS,
)
async def patch_task(
    owner: OwnerDep,
    task_id: TaskId,
    body: MergePatch,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Set the fields that are sent (JSON Merge Patch, RFC 7396): null clears."""
    return await update_task(owner, task_id, body, if_match, if_none_match)


@router.delete(
    "/{task_id:task}",
    status_code=204,
    responses=responses(NotFound, PreconditionFailed)
    | {
        200: {
            "model": Deleted,
            "description": "With `DELETE_STATUS=200`, for clients that parse every answer.",
        }
    },
)
async def delete_task(
    owner: OwnerDep,
    services: ServicesDep,
    task_id: TaskId,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Move a task to the trash. `DELETE …/tasks/trash/{task_id}` deletes it for good."""
    versions = await _versions(owner, task_id, if_match, if_none_match)
    await tasks.delete_task(owner, task_id, versions)
    return json_answer({"ok": True}) if services.delete_status == 200 else Response(status_code=204)


@router.get("/stats", response_model=Stats, responses=TAGGED | NOT_MODIFIED)
async def get_stats(
    owner: OwnerDep, query: Annotated[StatsQuery, Query()], if_none_match: IfNoneMatch = None
) -> Response:
    """Count your tasks."""
    if known := await _known(owner, if_none_match, "stats", query.today):
        return known
    counts, revision = await stats.count_tasks(owner, query.today)
    return json_answer(counts, headers=CACHED | {"ETag": etags.of_list(revision, "stats", query.today)})


@router.patch("", response_model=Counted, responses=responses(*BODY_PROBLEMS, Conflict))
async def complete_tasks(
    owner: OwnerDep, request: Request, query: Annotated[TaskSelection, Query()], body: AllCompleted
) -> Response:
    """Set `completed` for all tasks that a filter names."""
    refuse_conditions(request)
    return json_answer({"count": await bulk.complete_tasks(owner, _some(query), completed=body.completed)})


@router.delete("", response_model=CountedIds)
async def delete_tasks(
    owner: OwnerDep, request: Request, query: Annotated[TaskSelection, Query()]
) -> Response:
    """Move all tasks that a filter names to the trash."""
    refuse_conditions(request)
    ids = await bulk.delete_tasks(owner, _some(query))
    return json_answer({"count": len(ids), "ids": ids})


@router.post(
    "/bulk",
    response_model=BulkDone,
    responses=responses(*BODY_PROBLEMS, NotFound, Conflict, PreconditionFailed)
    | {
        200: {"headers": header("Idempotent-Replayed")},
        207: {
            "model": BulkDone,
            "description": "With `atomic=false`: each has a status of its own.",
            "headers": header("Idempotent-Replayed"),
        },
    },
)
async def change_tasks(
    owner: OwnerDep,
    request: Request,
    query: Annotated[BulkQuery, Query()],
    body: Bulk,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Do up to 100 operations in their order: all of them or, with the index of the one that failed, none."""
    refuse_conditions(request)

    async def change(owner: Owner) -> dict[str, Any]:
        outcomes = await bulk.run(owner, body.operations, atomic=query.atomic)
        return {"results": [_result(outcome) for outcome in outcomes]}

    content, headers = await _once(owner, idempotency_key, body, change, atomic=query.atomic)
    return json_answer(content, 200 if query.atomic else 207, headers)


async def _once(
    owner: Owner,
    idempotency_key: str | None,
    body: BaseModel,
    work: Callable[[Owner], Awaitable[Any]],
    **parameters: Any,
) -> tuple[Any, dict[str, str]]:
    """Return the answer of *work* or the one stored for this key, and the header that marks the latter."""
    if idempotency_key is None:
        return await work(owner), {}
    sent = body.model_dump(mode="json", exclude_unset=True) | parameters
    content, repeated = await idempotency.once(owner, _idempotency_key(idempotency_key), sent, work)
    return content, {"Idempotent-Replayed": "true"} if repeated else {}


async def _versions(
    owner: Owner, task_id: int, if_match: str | None, if_none_match: str | None
) -> list[int] | None:
    return await expected_versions(if_match, if_none_match, partial(tasks.get_task, owner, task_id))


async def _known(owner: Owner, if_none_match: str | None, *query: Any) -> Response | None:
    """Return the 304 for a *query* whose answer the client has already; the owner's revision tells."""
    if if_none_match is None:
        return None
    tag = etags.of_list(await revision_of(owner), *query)
    return _not_modified(tag) if etags.is_known(tag, if_none_match) else None


def _not_modified(tag: str) -> Response:
    return Response(status_code=304, headers=CACHED | {"ETag": tag})


def _result(outcome: bulk.Done | Refusal) -> dict[str, Any]:
    """Return *outcome* in the shape of `schemas.Done`."""
    if isinstance(outcome, Refusal):
        problem = problem_of(outcome)
        etag = {name: value for name, value in problem.extensions.items() if name == "etag"}
        return {"status": problem.status, "detail": problem.detail, **etag}
    match outcome.kind:
        case "created":
            return {"status": 201, "task": outcome.task}
        case "changed":
            return {"status": 200, "task": outcome.task}
    return {"status": 204}


def _some(query: TaskSelection) -> Filter:
    """Return the filter. An empty one is refused: it would change every task."""
    if query.filter == Filter():
        raise invalid_parameter("status", "or another filter must be given")
    return query.filter


def _idempotency_key(sent: str) -> str:
    key = sent.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_MAX or not key.isprintable():
        mistake = f"must be 1 to {IDEMPOTENCY_KEY_MAX} printable characters"
        raise invalid_parameter("Idempotency-Key", mistake)
    return key
