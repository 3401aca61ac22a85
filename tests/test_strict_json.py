import codecs
import math
from typing import Any

import pytest

from web import strict_json
from web.strict_json import NotStrictJson


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"{}", {}),
        (b"[]", []),
        (b"null", None),
        (b' \t\r\n{"a": [1, -2.5, true, "x"]}\n', {"a": [1, -2.5, True, "x"]}),
        ('{"title": "École 😀"}'.encode(), {"title": "École 😀"}),
        (b'"\\u00e9\\ud83d\\ude00"', "é😀"),
        (b'{"a": {"a": {"a": 1}}, "A": 2}', {"a": {"a": {"a": 1}}, "A": 2}),
        (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        (b"1e308", 1e308),
        (b"9" * 4300, int("9" * 4300)),
    ],
)
def test_json_is_read(text: bytes, value: Any) -> None:
    assert strict_json.loads(text) == value


def test_a_large_integer_stays_exact() -> None:
    assert isinstance(strict_json.loads(b"9007199254740993"), int)
    assert strict_json.loads(b"9007199254740993") == 2**53 + 1


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 1}',
        b'{"a": 1, "b": 2, "a": 3}',
        b'{"a": {"b": 1, "b": 2}}',
        b'[[[{"x": {"a": null, "a": null}}]]]',
        b'{"a": 1, "\\u0061": 2}',
        b'{"": 1, "": 2}',
        '{"é": 1, "\\u00e9": 2}'.encode(),
    ],
)
def test_a_duplicate_member_is_refused(text: bytes) -> None:
    with pytest.raises(NotStrictJson, match=r"^has a member twice$"):
        strict_json.loads(text)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("text", ["{}", "[1, {}]", '{{"a": {{"b": {}}}}}'])
def test_nan_and_infinity_are_refused(text: str, name: str) -> None:
    with pytest.raises(NotStrictJson, match=f"^has the number {name}, which JSON does not know$"):
        strict_json.loads(text.format(name).encode())


@pytest.mark.parametrize("text", [b"1e999", b"-1e999", b"1E+400", b'{"a": [1.5e309]}', b"9" * 400 + b".0"])
def test_a_number_beyond_the_float_range_is_refused(text: bytes) -> None:
    with pytest.raises(NotStrictJson, match=r"^has a number that is too large$"):
        strict_json.loads(text)


def test_a_hundred_levels_are_read() -> None:
    value = strict_json.loads(b"[" * 100 + b"7" + b"]" * 100)

    for _ in range(100):
        (value,) = value
    assert value == 7


def test_a_number_too_small_to_tell_from_zero_is_zero() -> None:
    assert math.isclose(strict_json.loads(b"1e-999"), 0)


@pytest.mark.parametrize("text", [b"9" * 5000, b"-" + b"9" * 5000, b'{"a": [' + b"1" * 5000 + b"]}"])
def test_a_number_of_thousands_of_digits_is_too_long(text: bytes) -> None:
    with pytest.raises(NotStrictJson, match=r"^has a number that is too long$"):
        strict_json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'[{"a":' * 50_000,
    ],
    ids=["open arrays", "arrays", "open objects", "objects", "both"],
)
def test_deep_nesting_is_refused(text: bytes) -> None:
    with pytest.raises(NotStrictJson, match=r"^is nested too deeply$"):
        strict_json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b'{"title": "\xff"}',
        b'"\xc3"',
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'"\xf4\x90\x80\x80"',
        codecs.BOM_UTF16_LE + '{"a": 1}'.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + '{"a": 1}'.encode("utf-16-be"),
        '{"title": "École"}'.encode("latin-1"),
    ],
)
def test_invalid_utf_8_is_refused(text: bytes) -> None:
    with pytest.raises(NotStrictJson, match=r"^is not valid UTF-8$"):
        strict_json.loads(text)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (b"", 0),
        (b" \n", 2),
        (codecs.BOM_UTF8 + b"{}", 0),
        ("{}".encode("utf-16-le"), 1),
        ("{}".encode("utf-16-be"), 0),
        ("{}".encode("utf-32-le"), 1),
        (b"{} {}", 3),
        (b"{", 1),
        (b"[, 1]", 1),
        (b"[1 2]", 3),
        (b"{'a': 1}", 1),
        (b"{a: 1}", 1),
        (b"{1: 1}", 1),
        (b"[1] // one", 4),
        (b"True", 0),
        (b"nan", 0),
        (b"+1", 0),
        (b"01", 1),
        (b".5", 0),
        (b"1.", 1),
        (b"0x10", 1),
        (b'"a\nb"', 2),
        (b'"a\0b"', 2),
        (b'"\\x41"', 1),
        (b'"\\u00g0"', 2),
        (b'"a', 0),
        (b"\x0c{}", 0),
        ("\u00a0{}".encode(), 0),
        (b"{}\0", 2),
    ],
)
def test_invalid_json_is_refused_with_its_position(text: bytes, position: int) -> None:
    with pytest.raises(NotStrictJson, match=r"^is not valid JSON at character \d+$") as refusal:
        strict_json.loads(text)

    assert str(refusal.value) == f"is not valid JSON at character {position}"
