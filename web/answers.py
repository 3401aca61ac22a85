"""Answers whose bytes are there already."""

from collections.abc import Mapping

from starlette.responses import Response

JSON = "application/json"


class JSONAnswer(Response):
    """*body* as `application/json`. Starlette's own way of building the headers takes 4 µs."""

    def __init__(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.body, self.status_code, self.background = body, status, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        for name, value in (headers or {}).items():
            self.raw_headers.append((name.lower().encode(), value.encode("latin-1")))
