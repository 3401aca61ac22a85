import asyncio
import time
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from tests.conftest import SCOPE, front


def client_of(handler: Any, deadline_s: float = 0.1) -> httpx.AsyncClient:
    app = front(handler, deadline_s=deadline_s, origins=["https://app.example.com"])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_request_past_its_deadline_is_503() -> None:
    ended = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with client_of(endless) as client:
        answer = await client.get("/", headers={"Origin": "https://app.example.com"})

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    assert answer.headers["x-request-id"] == answer.json()["instance"]
    assert ended.is_set()


async def test_a_handler_that_ignores_cancellation_does_not_delay_the_503() -> None:
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(1)
            await PlainTextResponse("too late")(scope, receive, send)

    sent: list[tuple[float, dict[str, Any]]] = []

    async def send(message: Any) -> None:
        sent.append((time.monotonic(), message))

    started = time.monotonic()
    scope = {**SCOPE, "method": "GET"}
    await front(stubborn, deadline_s=0.1)(scope, asyncio.Event().wait, send)  # the client sends nothing more

    assert [message["type"] for _, message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0][1]["status"] == 503
    assert sent[0][0] - started < 0.9


async def test_the_deadline_does_not_cut_off_a_response_that_has_started() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(0.3)
        await send({"type": "http.response.body", "body": b"whole"})

    async with client_of(slow) as client:
        answer = await client.get("/")

    assert (answer.status_code, answer.content) == (200, b"whole")


async def test_a_disconnected_client_cancels_its_request() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with client_of(endless, deadline_s=10) as client:
        request = asyncio.create_task(client.get("/"))
        await started.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    assert ended.is_set()
