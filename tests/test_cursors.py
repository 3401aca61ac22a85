import base64
import hashlib
import re
import string
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from fastapi import FastAPI
from hypothesis import assume, given
from hypothesis import strategies as st

from auth import tokens
from schemas import ID_MAX, TaskListQuery
from tests.conftest import SECRET, on_one_database, raw_status
from tests.strategies import BOUNDED, JSON, near_misses
from web.cursors import CursorInvalid, CursorSealer, TaskList

OLDER = "a-secret-that-only-the-tests-know-0000"
BINDING = "alice?status=pending&sort=title"

MOMENT = datetime(2026, 2, 28, 23, 59, 59, 123456, UTC)


@pytest.fixture
def sealer() -> CursorSealer:
    return CursorSealer([SECRET])


def decode(cursor: str) -> bytes:
    return base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


@pytest.mark.parametrize(
    "position",
    [
        [MOMENT, 7],
        [MOMENT.replace(microsecond=1), 7],
        [MOMENT.replace(microsecond=999_999), 7],
        [MOMENT.replace(microsecond=0), 7],
        [datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)],
        [MOMENT.astimezone(timezone(timedelta(hours=5, minutes=30))), 7],
        ["Buy milk", 7],
        ["École 😀 \"'\\%_&=?/+\n\x01", 7],
        ["2026-02-28T23:59:59+00:00", 7],
        ["", 1],
        [None, 2**63 - 1],
        [1, True, 2.5],
        [],
    ],
)
def test_a_sealed_position_reads_back_unchanged(sealer: CursorSealer, position: list[Any]) -> None:
    read = sealer.read(sealer.write(position, BINDING), BINDING)

    assert read == position
    assert [type(part) for part in read] == [type(part) for part in position]


def test_a_cursor_needs_no_quoting_in_a_url(sealer: CursorSealer) -> None:
    for number in range(200):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", sealer.write([f"?>~{number}", number], BINDING))


@pytest.mark.parametrize("position", [[MOMENT, 7], ["Buy milk", 7], [None, 7]])
def test_no_bit_of_a_cursor_can_be_changed(sealer: CursorSealer, position: list[Any]) -> None:
    raw = decode(sealer.write(position, BINDING))

    for index in range(len(raw)):
        for bit in range(8):
            forged = bytearray(raw)
            forged[index] ^= 1 << bit
            with pytest.raises(CursorInvalid):
                sealer.read(encode(bytes(forged)), BINDING)


def test_no_character_of_a_cursor_can_be_changed_to_lead_elsewhere(sealer: CursorSealer) -> None:
    cursor = sealer.write(["Buy milk", 7], BINDING)
    refused = 0

    for index in range(len(cursor)):
        for other in string.printable + "é":
            try:
                read = sealer.read(cursor[:index] + other + cursor[index + 1 :], BINDING)
            except CursorInvalid:
                refused += 1
            else:
                assert read == ["Buy milk", 7]

    assert refused > 100 * (len(cursor) - 1)


def test_a_cursor_cannot_be_guessed(sealer: CursorSealer) -> None:
    mac_bytes = len(decode(sealer.write([], BINDING))) - len(b"[]")

    assert mac_bytes >= 16


def test_a_truncated_or_extended_cursor_is_refused(sealer: CursorSealer) -> None:
    raw = decode(sealer.write(["Buy milk", 7], BINDING))

    for length in range(len(raw)):
        with pytest.raises(CursorInvalid):
            sealer.read(encode(raw[:length]), BINDING)
        with pytest.raises(CursorInvalid):
            sealer.read(encode(raw[length + 1 :]), BINDING)
    for more in (b"\0", b" ", b"]", raw):
        with pytest.raises(CursorInvalid):
            sealer.read(encode(raw + more), BINDING)


@pytest.mark.parametrize(
    "other",
    [
        "bob?status=pending&sort=title",
        "alice?status=completed&sort=title",
        "alice?status=pending&sort=-title",
        "alice?status=pending&sort=title ",
        "Alice?status=pending&sort=title",
        "alice",
        "",
        BINDING + "\0",
        "\ud800",
    ],
)
def test_a_cursor_is_good_for_its_own_list_only(sealer: CursorSealer, other: str) -> None:
    cursor = sealer.write([MOMENT, 7], BINDING)

    with pytest.raises(CursorInvalid):
        sealer.read(cursor, other)
    assert sealer.read(cursor, BINDING) == [MOMENT, 7]


@pytest.mark.parametrize("binding", ["", "\ud800", "a\0b", "é" * 1000])
def test_a_cursor_may_be_bound_to_any_text(sealer: CursorSealer, binding: str) -> None:
    assert sealer.read(sealer.write([7], binding), binding) == [7]


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "A",
        "AAAA",
        "A" * 22,
        "A" * 64,
        "=",
        "====",
        " ",
        "\n",
        "\0",
        "é",
        "٣",
        "\ud800",
        "a.b",
        "A" * 1_000_000,
    ],
    ids=ascii,
)
def test_a_malformed_cursor_is_refused(sealer: CursorSealer, cursor: str) -> None:
    with pytest.raises(CursorInvalid):
        sealer.read(cursor, BINDING)


def test_cursors_stay_valid_while_their_secret_is_rotated() -> None:
    before, between, after = CursorSealer([OLDER]), CursorSealer([SECRET, OLDER]), CursorSealer([SECRET])
    old, new = before.write([7], BINDING), between.write([7], BINDING)

    assert between.read(old, BINDING) == [7]
    assert between.read(new, BINDING) == [7]
    assert after.read(new, BINDING) == [7]
    for sealer, cursor in ((after, old), (before, new)):
        with pytest.raises(CursorInvalid):
            sealer.read(cursor, BINDING)


def test_a_cursor_sealed_with_the_token_secret_is_refused(sealer: CursorSealer) -> None:
    payload = msgspec.json.encode(["Buy milk", 7])
    for key in (SECRET.encode()[:32], hashlib.sha512(SECRET.encode()).digest()):
        with pytest.raises(CursorInvalid):
            sealer.read(encode(AESSIV(key).encrypt(payload, [b"list:" + BINDING.encode()])), BINDING)


def test_a_cursor_does_not_reveal_its_position_or_binding(sealer: CursorSealer) -> None:
    raw = decode(sealer.write(["Divorce lawyer", 1234567], BINDING))

    for part in (b"Divorce", b"lawyer", b"1234567", b"[", BINDING.encode()):
        assert part not in raw


POSITION = ["Buy milk", 7]
OWN = CursorSealer([SECRET]).write(POSITION, BINDING)
FORGED = st.one_of(
    st.text(),
    st.text(st.characters(codec=None)),  # includes unpaired surrogates
    st.binary(max_size=100).map(encode),
    near_misses(OWN),
    near_misses(decode(OWN).decode("latin-1")).map(lambda raw: encode(raw.encode("latin-1", "replace"))),
    JSON.map(lambda content: encode(decode(OWN)[:16] + msgspec.json.encode(repr(content)))),
    JSON.map(lambda content: encode(bytes(16) + msgspec.json.encode([repr(content), 1]))),
    st.builds(CursorSealer([OLDER]).write, st.lists(st.text() | st.integers(0, 9)), st.just(BINDING)),
    st.builds(CursorSealer([SECRET]).write, st.lists(st.text() | st.integers(0, 9)), st.text()),
)


def _raw(cursor: str) -> bytes | None:
    try:
        return decode(cursor)
    except ValueError:
        return None


@BOUNDED
@given(cursor=FORGED)
def test_nothing_forged_is_read(cursor: str) -> None:
    assume(_raw(cursor) != decode(OWN))  # the last base64 character has unused bits

    with pytest.raises(CursorInvalid):
        CursorSealer([SECRET]).read(cursor, BINDING)


async def _status(app: FastAPI, cursor: bytes) -> int:
    token = tokens.issue("alice", SECRET, 3600)
    query = b"sort=title&cursor=" + quote(cursor).encode()
    return await raw_status(
        app, "GET", "/api/alice/tasks", query, (b"authorization", f"Bearer {token}".encode())
    )


@on_one_database
@pytest.mark.no_cover  # coverage of the same lines many times is slow
@BOUNDED
@given(cursor=FORGED.map(lambda text: text.encode(errors="surrogatepass")) | st.binary())
async def test_whatever_is_forged_is_422(app: FastAPI, client: httpx.AsyncClient, cursor: bytes) -> None:
    assert await _status(app, cursor) == 422


# A valid position of a list sorted by title: a text and a task id.
def _is_position(position: list[Any]) -> bool:
    match position:
        case [str(), int(task_id)]:
            return not isinstance(task_id, bool) and 1 <= task_id <= ID_MAX
    return False


@on_one_database
@pytest.mark.no_cover  # coverage of the same lines many times is slow
@BOUNDED
@given(
    position=st.lists(JSON, max_size=3)
    | st.tuples(JSON, st.integers(1, 9)).map(list)
    | st.tuples(st.text(), JSON).map(list)
    | st.builds(lambda time, id_: [{"t": time}, id_], JSON, JSON)
)
async def test_a_position_that_no_list_has_is_422_though_it_is_sealed(
    app: FastAPI, client: httpx.AsyncClient, position: list[Any]
) -> None:
    assume(not _is_position(position))

    assert await _status(app, sealed(app, position)) == 422


def sealed(app: FastAPI, position: list[Any]) -> bytes:
    """Return *position* as a cursor of alice's tasks sorted by title, as the app would seal it."""
    query = TaskListQuery(sort="title")
    tasks = TaskList("alice", query.filter, query.ordering)
    cursor: str = app.state.services.cursors.write(position, tasks.binding)
    return cursor.encode()


@pytest.mark.parametrize(
    ("position", "status"),
    [
        (["Buy milk", 7], 200),
        (["Buy milk", ID_MAX], 200),
        (["Buy milk", ID_MAX + 1], 422),
        (["Buy milk", 0], 422),
        (["Buy milk", "7"], 422),
        ([7, 7], 422),
        ([None, 7], 422),
        ([MOMENT, 7], 422),
        (["Buy milk"], 422),
        (["Buy milk", 7, 7], 422),
        ([], 422),
    ],
)
async def test_a_sealed_position_is_read_only_if_a_list_could_have_it(
    app: FastAPI, client: httpx.AsyncClient, position: list[Any], status: int
) -> None:
    assert await _status(app, sealed(app, position)) == status
