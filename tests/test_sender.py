"""The sender writes the same bytes as uvicorn, in fewer writes."""

import asyncio
import logging
from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from server.sender import Sender

Messages = list[dict[str, Any]]


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def resume_reading(self) -> None:
        pass


def cycle_of(method: str, *, keep_alive: bool) -> tuple[Any, Transport]:
    transport = Transport()
    cycle = RequestResponseCycle(
        scope={"type": "http", "method": method, "headers": []},  # type: ignore[typeddict-item] # all that it reads
        transport=transport,
        flow=FlowControl(transport),
        logger=logging.getLogger(),
        access_logger=logging.getLogger(),
        access_log=False,
        default_headers=[(b"date", b"Sat, 28 Nov 2026 07:00:00 GMT")],
        message_event=asyncio.Event(),
        expect_100_continue=False,
        keep_alive=keep_alive,
        on_response=lambda: None,
    )
    return cycle, transport


async def sent(send: Any, messages: Messages) -> str | None:
    try:
        for message in messages:
            await send(message)
    except RuntimeError:
        return "refused"
    return None


def start(status: int, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(content: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": content, "more_body": more}


LENGTH = (b"content-length", b"5")
RESPONSES: dict[str, Messages] = {
    "whole": [start(200, LENGTH, (b"etag", b'"1"')), body(b"hello")],
    "long": [start(200, (b"content-length", b"70000")), body(b"x" * 70_000)],
    "without headers": [{"type": "http.response.start", "status": 200}, body(b"hello")],
    "empty": [start(200, (b"content-length", b"0")), body(b"")],
    "problem": [start(503, LENGTH, (b"retry-after", b"1")), body(b"hello")],
    "no content": [start(204), body(b"")],
    "not modified": [start(304, (b"etag", b'"1"')), body(b"")],
    "without a length": [start(200), body(b"hello")],
    "wrong length": [start(200, (b"content-length", b"4")), body(b"hello")],
    "in parts": [start(200), body(b"he", more=True), body(b"llo")],
    "in parts of a known length": [start(200, LENGTH), body(b"he", more=True), body(b"llo")],
    "chunked by itself": [start(200, (b"transfer-encoding", b"chunked")), body(b"hello")],
    "closing": [start(200, LENGTH, (b"connection", b"close")), body(b"hello")],
    "closing, in capitals": [start(200, LENGTH, (b"Connection", b"close")), body(b"hello")],
    "length and chunks": [start(200, LENGTH, (b"Transfer-Encoding", b"chunked")), body(b"hello")],
    "another line in a field": [start(200, LENGTH, (b"location", b"/a\r\nset-cookie: x")), body(b"hello")],
    "another field in a name": [start(200, LENGTH, (b"a: b\r\nc", b"d")), body(b"hello")],
    "body first": [body(b"hello")],
    "two starts": [start(200, LENGTH), start(200, LENGTH), body(b"hello")],
    "two bodies": [start(200, LENGTH), body(b"hello"), body(b"hello")],
}


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("messages", RESPONSES.values(), ids=RESPONSES)
async def test_the_bytes_are_those_that_uvicorn_writes(
    messages: Messages, method: str, keep_alive: bool
) -> None:
    expected_cycle, expected = cycle_of(method, keep_alive=keep_alive)
    cycle, transport = cycle_of(method, keep_alive=keep_alive)

    expected_outcome = await sent(expected_cycle.send, messages)
    outcome = await sent(Sender(cycle), messages)

    assert outcome == expected_outcome
    assert cycle.response_started == expected_cycle.response_started
    if outcome is None:
        assert b"".join(transport.written) == b"".join(expected.written)
        assert transport.is_closed == expected.is_closed
        assert (cycle.response_complete, cycle.keep_alive) == (True, expected_cycle.keep_alive)


async def test_a_whole_response_is_one_write() -> None:
    cycle, transport = cycle_of("GET", keep_alive=True)

    await sent(Sender(cycle), RESPONSES["whole"])

    assert len(transport.written) == 1


async def test_nothing_is_written_to_a_disconnected_client() -> None:
    cycle, transport = cycle_of("GET", keep_alive=True)
    cycle.disconnected = True

    await sent(Sender(cycle), RESPONSES["whole"])

    assert transport.written == []


async def test_a_buffered_response_start_can_be_sent_alone() -> None:
    cycle, transport = cycle_of("GET", keep_alive=True)
    sender = Sender(cycle)

    await sender(RESPONSES["whole"][0])
    assert transport.written == []
    await sender.begin()

    assert transport.written[0].startswith(b"HTTP/1.1 200")
