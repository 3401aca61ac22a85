"""A JSON response whose body is encoded already."""

from collections.abc import Mapping

from starlette.responses import Response

JSON = "application/json"
_CONTENT_TYPE = (b"content-type", JSON.encode())


class JSONAnswer(Response):
    """*body* as `application/json`. Starlette's own way of building the headers takes 4 µs."""

    def __init__(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), _CONTENT_TYPE]
        for name, value in (headers or {}).items():
            self.raw_headers.append((name.lower().encode(), value.encode("latin-1")))
