import contextlib
import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import structlog

from observability import logs
from observability.logs import BoundedLog
from tests.conftest import Clock, reset_log


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
    with Path("/dev/full").open("w") as full:
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
