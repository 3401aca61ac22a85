"""Answers 503 once a request has reached its deadline, whatever its handler is waiting for."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

import errors
from web import problems


class DeadlineMiddleware:
    def __init__(self, app: ASGIApp, *, deadline_s: float) -> None:
        self.app = app
        self._deadline_s = deadline_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        handler = asyncio.current_task()
        assert handler is not None  # noqa: S101 - a coroutine runs in a task
        started = False
        answering: asyncio.Task[None] | None = None

        async def send_in_time(message: Message) -> None:
            nonlocal started
            if answering is None:
                started = True
                await send(message)

        def expire() -> None:
            nonlocal answering
            if started:
                return  # the server's own limits apply to a response that has begun
            problem = problems.render(scope, errors.Unavailable())
            answering = asyncio.ensure_future(problem(scope, receive, send))
            handler.cancel()

        timer = asyncio.get_running_loop().call_later(self._deadline_s, expire)
        try:
            await self.app(scope, receive, send_in_time)
        except asyncio.CancelledError:
            if answering is None:
                raise
            handler.uncancel()
        finally:
            timer.cancel()
            if answering is not None:
                await answering
