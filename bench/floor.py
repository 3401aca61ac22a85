"""The lower bound: the same work without a framework, i.e. a bare ASGI callable, asyncpg, orjson and PyJWT.

It verifies every token anew; with REMEMBER_TOKENS set, once. It has no optional validation, no error
handling and no log.
"""

import os
import time
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

import asyncpg
import jwt
import orjson

SECRET = os.environ["BETTER_AUTH_SECRET"].encode()
REMEMBERED = 10_000 if os.environ.get("REMEMBER_TOKENS") else 0
FIELDS = "title, description, completed, priority, category, tags, due_date, due_time, recurring, reminder"
COLUMNS = f"id, user_id, {FIELDS}, completed_at, version, created_at, updated_at"
PRIORITIES = (None, "high", "medium", "low")
GET = f"SELECT {COLUMNS} FROM task WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL"
# As the service's own: with the owner's revision, which each change counts up.
LIST = (
    f"SELECT {COLUMNS}, list_revision FROM "
    "(SELECT coalesce((SELECT revision FROM task_owner WHERE user_id = $1), 0) AS list_revision) AS head "
    f"LEFT JOIN (SELECT {COLUMNS} FROM task WHERE user_id = $1 AND deleted_at IS NULL "
    "ORDER BY created_at DESC, id DESC LIMIT $2) AS page ON true ORDER BY created_at DESC, id DESC"
)
POST = (
    "WITH following AS (INSERT INTO task_owner (user_id, revision, task_count) VALUES ($1, 1, 1) "
    "ON CONFLICT (user_id) DO UPDATE SET revision = task_owner.revision + 1, "
    "task_count = task_owner.task_count + 1 RETURNING revision) "
    f"INSERT INTO task (user_id, {FIELDS}, version, created_at, updated_at, revision) "
    "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 1, $12, $12, (SELECT revision FROM following)) "
    f"RETURNING {COLUMNS}"
)
TOGGLE = (
    "WITH locked AS (SELECT revision FROM task_owner WHERE user_id = $1 FOR NO KEY UPDATE), "
    "changed AS (UPDATE task SET completed = NOT completed, "
    "completed_at = CASE WHEN completed THEN NULL ELSE $3::timestamptz END, "
    "version = version + 1, updated_at = $3, revision = locked.revision + 1 FROM locked "
    "WHERE user_id = $1 AND id = $2 AND deleted_at IS NULL "
    "AND (completed OR recurring IS NULL OR due_date IS NULL) RETURNING task.*), "
    "counted AS (UPDATE task_owner SET revision = changed.revision FROM changed "
    "WHERE task_owner.user_id = changed.user_id) "
    f"SELECT {COLUMNS} FROM changed"
)

pool: asyncpg.Pool


async def _no_reset(_: Any) -> None:
    """Skip the pool's reset: it costs a round trip per request."""


def user_of(headers: list[tuple[bytes, bytes]]) -> str:
    token = next(value for name, value in headers if name == b"authorization")[7:]
    claims = claims_of(token)
    if claims["exp"] <= time.time():
        raise PermissionError
    return claims["sub"]


@lru_cache(REMEMBERED)
def claims_of(token: bytes) -> dict[str, Any]:
    return jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["sub", "exp"]})


def task(row: Any) -> dict[str, Any]:
    found = dict(row.items())
    found.pop("list_revision", None)
    found["priority"] = PRIORITIES[found["priority"] or 0]
    return found


async def answer(scope: dict[str, Any], receive: Any) -> tuple[int, Any]:
    _, _, user_id, _, *rest = scope["path"].split("/")
    if user_of(scope["headers"]) != user_id:
        raise PermissionError
    match scope["method"], rest:
        case "GET", []:
            limit = int(scope["query_string"].removeprefix(b"limit="))
            return 200, [task(row) for row in await pool.fetch(LIST, user_id, limit + 1)][:limit]
        case "GET", [task_id]:
            return 200, task(await pool.fetchrow(GET, user_id, int(task_id)))
        case "POST", []:
            body = orjson.loads((await receive())["body"])
            title = body["title"].strip()
            if not 1 <= len(title) <= 200:
                raise ValueError
            values = (
                title,
                body.get("description"),
                False,
                body.get("priority") and PRIORITIES.index(body["priority"]),
                body.get("category"),
                body.get("tags", []),
                body.get("due_date") and date.fromisoformat(body["due_date"]),
                body.get("due_time"),
                body.get("recurring"),
                body.get("reminder", False),
            )
            return 201, task(await pool.fetchrow(POST, user_id, *values, datetime.now(UTC)))
        case "PATCH", [task_id, "complete"]:
            return 200, task(await pool.fetchrow(TOGGLE, user_id, int(task_id), datetime.now(UTC)))
    raise LookupError


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    global pool
    if scope["type"] == "lifespan":
        await receive()
        pool = await asyncpg.create_pool(
            os.environ["DATABASE_URL"], min_size=10, max_size=10, reset=_no_reset
        )
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await pool.close()
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["path"] == "/health":
        status, content = 200, {"status": "ok"}
    else:
        status, content = await answer(scope, receive)
    body = orjson.dumps(content, option=orjson.OPT_UTC_Z)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
