import asyncio
import contextlib
import io
import json
import logging
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import structlog

from observability import logs
from observability.logs import BoundedLog
from tests.conftest import Clock, reset_log
from tests.service import PROJECT


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    stream = io.StringIO()
    logs.configure("info", "json", stream)
    yield stream
    reset_log()
    root.handlers = handlers
    root.setLevel(level)


async def test_lines_are_written_together_and_soon(stream: io.StringIO) -> None:
    log = structlog.get_logger("ours")
    log.info("first")
    log.info("second")
    assert stream.getvalue() == ""

    await asyncio.sleep(2 * logs.WAIT_S)

    assert events(stream) == ["first", "second"]


@pytest.mark.parametrize("get_logger", [structlog.get_logger, logging.getLogger])
async def test_a_warning_is_written_at_once_after_what_waits(
    stream: io.StringIO, get_logger: Callable[[str], Any]
) -> None:
    structlog.get_logger("ours").info("first")
    get_logger("logger").warning("second")

    assert events(stream) == ["first", "second"]


async def test_what_is_written_together_is_not_mixed_with_lines_of_other_processes() -> None:
    written = Mock(wraps=io.StringIO())
    output = logs._Output(written)
    lines = [b"%d %s" % (number, b"x" * number) for number in range(0, 1000, 7)]

    for line in lines:
        output.write_soon(bytes, line)
    output.flush()

    pieces = [call.args[0].encode() for call in written.write.call_args_list]
    assert b"".join(pieces).splitlines() == lines
    assert max(map(len, pieces)) <= select.PIPE_BUF
    assert len(pieces) < len(lines) / 4


def test_a_finalizer_may_log_while_lines_are_rendered() -> None:
    written = io.StringIO()
    output = logs._Output(written)

    def render(line: bytes) -> bytes:
        output.write("in between\n")
        return line

    writing = threading.Thread(target=output.write_soon, args=(render, b"event"), daemon=True)
    writing.start()
    writing.join(2)

    assert written.getvalue().splitlines() == ["in between", "event"]


@pytest.mark.parametrize("end", ["pass", "sys.exit(1)", "raise RuntimeError"])
def test_what_waits_is_written_at_the_end_of_the_process(end: str) -> None:
    code = f"""
import asyncio, sys
import structlog
from observability import logs

async def main():
    structlog.get_logger("ours").info("event")
    {end}

logs.configure("info", "json")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert [json.loads(line)["event"] for line in lines] == ["event"]


async def test_lines_of_another_thread_follow_those_being_rendered() -> None:
    written, rendering = io.StringIO(), threading.Event()
    output = logs._Output(written)

    def render(line: bytes) -> bytes:
        rendering.set()
        time.sleep(0.05)
        return line

    output.write_soon(render, b"first")
    flushing = threading.Thread(target=output.flush)
    flushing.start()
    rendering.wait()
    output.write("second\n")
    flushing.join()

    assert written.getvalue().splitlines() == ["first", "second"]


def test_a_line_that_cannot_be_rendered_loses_no_other(stream: io.StringIO) -> None:
    output = logs._Output(stream)
    output.write_soon(lambda line: line.encode(), "\ud800")
    output.write_soon(lambda line: line.encode(), '{"event":"first"}')

    assert events(stream) == ["line lost", "first"]


async def test_threads_lose_no_line(stream: io.StringIO) -> None:
    log = structlog.get_logger("ours")

    def write() -> None:
        for number in range(200):
            (log.warning if number % 50 == 0 else log.info)("event", number=number)

    for number in range(200):
        log.info("event", number=number)
        if number % 50 == 0:
            await asyncio.gather(*(asyncio.to_thread(write) for _ in range(4)))
    logging.getLogger().handlers[0].flush()

    assert Counter(json.loads(line)["number"] for line in stream.getvalue().splitlines()) == dict.fromkeys(
        range(200), 17
    )


def test_libraries_write_in_the_same_format(stream: io.StringIO) -> None:
    structlog.get_logger("ours").info("event", number=1)
    logging.getLogger("theirs").warning("event %d", 2)

    ours, theirs = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (ours["event"], ours["level"], ours["number"]) == ("event", "info", 1)
    assert (theirs["event"], theirs["level"]) == ("event 2", "warning")
    assert ours.keys() - {"number"} == theirs.keys()


def test_lines_below_the_log_level_are_not_written(stream: io.StringIO) -> None:
    structlog.get_logger("ours").debug("event")
    logging.getLogger("theirs").debug("event")

    assert stream.getvalue() == ""


def events(stream: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_a_storm_of_events_is_bounded_and_counted(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(logs, "time", clock)
    log = BoundedLog("security", per_second=3)

    for _ in range(1000):
        log.warning("token refused", reason="Token has expired")
    log.warning("token refused", reason="Token is malformed")
    clock.now += 1
    log.warning("token refused", reason="Token has expired")
    log.warning("token refused", reason="Token has expired")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["reason"] for line in lines].count("Token has expired") == 3 + 2
    assert [line["reason"] for line in lines].count("Token is malformed") == 1
    assert [line["left_out"] for line in lines if "left_out" in line] == [997]


def test_logging_to_a_full_disk_raises_nothing() -> None:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    with Path("/dev/full").open("w", buffering=1) as full:  # fails at each line, not only at a flush
        logs.configure("info", "json", full)

        structlog.get_logger("ours").info("event")
        logging.getLogger("theirs").warning("event")

        reset_log()
        root.handlers = handlers
        root.setLevel(level)
        with contextlib.suppress(OSError):
            full.close()


def test_an_unpaired_surrogate_is_written(stream: io.StringIO) -> None:
    structlog.get_logger("ours").info("event", text="\ud800")

    line = json.loads(stream.getvalue())
    assert line["text"] == "\ud800"
    assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)
