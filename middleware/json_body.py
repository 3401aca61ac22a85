"""How a request body is read: bounded, as strict JSON, and not judged before the caller is known."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

import strict_json
from errors import ContentTooLarge

BODY_MAX_BYTES = 64 * 1024


class JsonRequest(Request):
    async def body(self) -> bytes:
        """Return the body.

        Raises:
            ContentTooLarge: there is, or is announced, more than `BODY_MAX_BYTES`.
        """
        if not hasattr(self, "_body"):
            announced = self.headers.get("content-length", "")
            if announced.isdecimal() and int(announced) > BODY_MAX_BYTES:
                raise ContentTooLarge
            chunks, size = [], 0
            async for chunk in self.stream():
                size += len(chunk)
                if size > BODY_MAX_BYTES:
                    raise ContentTooLarge
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return self._body

    async def json(self) -> Any:
        """Return the parsed body, or the error that parsing it gave.

        The framework reads the body before it asks who is calling. An error in place of the value fails
        validation, which comes afterwards, so a stranger hears 401 and not what is wrong with the JSON.
        """
        try:
            return strict_json.loads(await self.body())
        except strict_json.NotStrictJson as error:
            return error


class JsonRoute(APIRoute):
    """A route whose body is read by `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(JsonRequest(request.scope, request.receive))

        return handle
