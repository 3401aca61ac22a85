"""The floor: the same work with no framework. A bare ASGI callable, asyncpg, orjson, PyJWT.

Every token is verified afresh. There is no validation beyond what the work needs, no error handling, no log.
"""

import os
from datetime import UTC, datetime
from typing import Any

import asyncpg
import jwt
import orjson

SECRET = os.environ["BETTER_AUTH_SECRET"].encode()
COLUMNS = "id, user_id, title, description, completed, completed_at, version, created_at, updated_at"
GET = f"SELECT {COLUMNS} FROM task WHERE user_id = $1 AND id = $2"
LIST = f"SELECT {COLUMNS} FROM task WHERE user_id = $1 ORDER BY created_at DESC, id DESC LIMIT $2"
POST = (
    "INSERT INTO task (user_id, title, description, completed, version, created_at, updated_at) "
    f"VALUES ($1, $2, $3, $4, 1, $5, $5) RETURNING {COLUMNS}"
)
TOGGLE = (
    "UPDATE task SET completed = NOT completed, "
    "completed_at = CASE WHEN completed THEN NULL ELSE $3::timestamptz END, "
    f"version = version + 1, updated_at = $3 WHERE user_id = $1 AND id = $2 RETURNING {COLUMNS}"
)

pool: asyncpg.Pool


async def _no_reset(_: Any) -> None:
    """The pool's own reset would be a round trip for every request."""


def user_of(headers: list[tuple[bytes, bytes]]) -> str:
    token = next(value for name, value in headers if name == b"authorization")[7:]
    return jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["sub", "exp"]})["sub"]


async def answer(scope: dict[str, Any], receive: Any) -> tuple[int, Any]:
    _, _, user_id, _, *rest = scope["path"].split("/")
    if user_of(scope["headers"]) != user_id:
        raise PermissionError
    match scope["method"], rest:
        case "GET", []:
            limit = int(scope["query_string"].removeprefix(b"limit="))
            return 200, [dict(row.items()) for row in await pool.fetch(LIST, user_id, limit + 1)][:limit]
        case "GET", [task_id]:
            return 200, dict((await pool.fetchrow(GET, user_id, int(task_id))).items())
        case "POST", []:
            body = orjson.loads((await receive())["body"])
            title = body["title"].strip()
            if not 1 <= len(title) <= 200:
                raise ValueError
            row = await pool.fetchrow(POST, user_id, title, body.get("description"), False, datetime.now(UTC))
            return 201, dict(row.items())
        case "PATCH", [task_id, "complete"]:
            row = await pool.fetchrow(TOGGLE, user_id, int(task_id), datetime.now(UTC))
            return 200, dict(row.items())
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
