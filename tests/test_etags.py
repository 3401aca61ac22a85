import asyncio
import itertools
import random

import pytest

from database.statements import Row
from errors import Unprocessable
from queries import tasks
from queries.owner import Owner
from tests.conftest import Person
from web import etags


@pytest.mark.parametrize(
    ("header", "versions"),
    [
        (None, None),
        ("*", None),
        (" * ", None),
        ('"3"', [3]),
        ('"3", "5"', [3, 5]),
        ('"3","5"', [3, 5]),
        (' , "3",, "5" ,', [3, 5]),  # RFC 9110, section 5.6.1.2
        ('W/"3"', []),
        ('W/"3", "5"', [5]),
        ('"abc"', []),
        ('""', []),
        ('"03"', []),
        ('"-3"', []),
        ('"999999999"', [999_999_999]),
        ('"1000000000"', []),  # beyond a 32-bit column
        (f'"{"9" * 30}"', []),
        ('"\xe9", "3"', [3]),
        ('"3"\t,\t"5"\t', [3, 5]),
    ],
)
def test_if_match_is_parsed_into_versions(header: str | None, versions: list[int] | None) -> None:
    assert etags.expected_versions(header) == versions


@pytest.mark.parametrize(
    "header",
    [
        "",
        "3",
        '"3',
        '3"',
        '"3" "5"',
        ",",
        " , ,",
        '"3", 5',
        "W/3",
        '"a"b"',
        "*, *",
        '"\x00"',
        '"a b"',
        '"\t"',
    ],
)
def test_a_malformed_etag_list_is_refused(header: str) -> None:
    with pytest.raises(Unprocessable, match="If-Match: must be entity tags"):
        etags.expected_versions(header)
    with pytest.raises(Unprocessable, match="If-None-Match: must be entity tags"):
        etags.is_known('"3"', header)


@pytest.mark.parametrize(
    ("header", "detail"),
    [
        ('"1"' + " " * 4094, "must be at most 4096 characters"),
        (", ".join(['"1"'] * 101), "must be at most 100 entity tags"),
    ],
)
def test_an_etag_list_over_4096_characters_or_100_tags_is_refused(header: str, detail: str) -> None:
    with pytest.raises(Unprocessable, match=f"If-Match: {detail}"):
        etags.expected_versions(header)
    with pytest.raises(Unprocessable, match=f"If-None-Match: {detail}"):
        etags.is_known('"1"', header)


@pytest.mark.parametrize("header", ['"1"' + " " * 4093, ", ".join(['"1"'] * 100)])
def test_the_longest_etag_list_is_read(header: str) -> None:
    assert set(etags.expected_versions(header) or ()) == {1}


@pytest.mark.parametrize(
    ("header", "known"),
    [
        (None, False),
        ("*", True),
        (" * ", True),
        ('"3"', True),
        ('W/"3"', True),
        ('"1", "3"', True),
        ('"2"', False),
    ],
)
def test_if_none_match_compares_weakly(header: str | None, known: bool) -> None:
    assert etags.is_known('"3"', header) is known


CHANGES = [
    ("PUT", "", {"title": "Changed"}),
    ("PUT", "", {}),
    ("PATCH", "", {"title": "Changed"}),
    ("PATCH", "", {"completed": True}),
    ("PATCH", "/complete", None),
    ("PATCH", "/complete", {"completed": True}),
    ("DELETE", "", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_if_match_with_an_old_version_is_412(
    alice: Person, method: str, path: str, body: object
) -> None:
    task = await alice.create()
    changed = (await alice.put(f"/{task['id']}", json={"title": "Somebody else's"})).json()
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"/{task['id']}{path}", headers={"If-Match": '"1"'}, **options)

    assert answer.status_code == 412
    assert (answer.json()["etag"], answer.headers["etag"]) == ('"2"', '"2"')
    assert answer.json()["detail"] == "The task has changed since you read it"
    assert (await alice.get(f"/{task['id']}")).json() == changed


@pytest.mark.parametrize("condition", ['"1"', '"7", "1"', "*"])
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_if_match_with_the_current_version_succeeds(
    alice: Person, method: str, path: str, body: object, condition: str
) -> None:
    task = await alice.create()
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"/{task['id']}{path}", headers={"If-Match": condition}, **options)

    assert answer.is_success
    after = await alice.get(f"/{task['id']}")
    assert after.status_code == (404 if method == "DELETE" else 200)
    assert body == {} or after.json() != task


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_if_match_on_a_missing_task_is_404(
    alice: Person, bob: Person, method: str, path: str, body: object
) -> None:
    task = await bob.create()
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"/{task['id']}{path}", headers={"If-Match": '"9"'}, **options)

    assert answer.status_code == 404


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
async def test_a_malformed_condition_is_422_and_changes_nothing(alice: Person, header: str) -> None:
    task = await alice.create()
    method, body = ("PUT", {"json": {"title": "x"}}) if header == "If-Match" else ("GET", {})

    answer = await alice.send(method, f"/{task['id']}", headers={header: "1"}, **body)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["parameter"] == header
    assert (await alice.get(f"/{task['id']}")).json() == task


async def test_if_none_match_with_the_current_etag_is_304(alice: Person) -> None:
    task = await alice.create()

    same = await alice.get(f"/{task['id']}", headers={"If-None-Match": '"1"'})
    await alice.put(f"/{task['id']}", json={"title": "Changed"})
    newer = await alice.get(f"/{task['id']}", headers={"If-None-Match": '"1"'})

    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", '"1"')
    assert (newer.status_code, newer.headers["etag"]) == (200, '"2"')


@pytest.mark.parametrize("condition", ['"1"', 'W/"1"', '"7", "1"', "*"])
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_a_write_with_the_current_etag_in_if_none_match_is_412(
    alice: Person, method: str, path: str, body: object, condition: str
) -> None:
    task = await alice.create()
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, f"/{task['id']}{path}", headers={"If-None-Match": condition}, **options)

    assert (answer.status_code, answer.json()["etag"], answer.headers["etag"]) == (412, '"1"', '"1"')
    assert (await alice.get(f"/{task['id']}")).json() == task


@pytest.mark.parametrize("conditions", [{}, {"If-Match": '"1"'}, {"If-Match": "*"}])
@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
async def test_a_write_with_other_etags_in_if_none_match_succeeds(
    alice: Person, method: str, path: str, body: object, conditions: dict[str, str]
) -> None:
    task = await alice.create()
    options = {} if body is None else {"json": body}
    headers = {"If-None-Match": '"2", W/"3"', **conditions}

    answer = await alice.send(method, f"/{task['id']}{path}", headers=headers, **options)

    assert answer.is_success
    after = await alice.get(f"/{task['id']}")
    assert body == {} or after.json() != task


async def test_if_match_and_if_none_match_must_both_hold(alice: Person) -> None:
    task = await alice.create()

    for method in ("PUT", "GET"):
        options = {"json": {"title": "x"}} if method == "PUT" else {}
        headers = {"If-Match": '"2"', "If-None-Match": '"3"'}
        answer = await alice.send(method, f"/{task['id']}", headers=headers, **options)
        assert (answer.status_code, answer.json()["etag"]) == (412, '"1"')

    # If-Match comes first (RFC 9110, section 13.2.2).
    both = await alice.get(f"/{task['id']}", headers={"If-Match": '"2"', "If-None-Match": '"1"'})
    assert both.status_code == 412


async def test_if_none_match_on_a_missing_task_is_404(alice: Person, bob: Person) -> None:
    task = await bob.create()

    for condition in ("*", '"9"'):
        answer = await alice.put(f"/{task['id']}", json={"title": "x"}, headers={"If-None-Match": condition})
        assert answer.status_code == 404


async def test_a_task_that_changes_while_if_none_match_is_compared_is_412(
    alice: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await alice.create()
    get_task = tasks.get_task

    async def get_and_lose_the_race(owner: Owner, task_id: int) -> Row | None:
        monkeypatch.undo()
        row = await get_task(owner, task_id)
        await alice.put(f"/{task_id}", json={"title": "Somebody else's"})
        return row

    monkeypatch.setattr(tasks, "get_task", get_and_lose_the_race)
    answer = await alice.put(f"/{task['id']}", json={"title": "x"}, headers={"If-None-Match": '"2"'})

    assert (answer.status_code, answer.json()["etag"]) == (412, '"2"')
    assert (await alice.get(f"/{task['id']}")).json()["title"] == "Somebody else's"


@pytest.mark.parametrize(
    ("condition", "status"), [('"1"', 200), ("*", 200), ('"2"', 412), ('W/"1"', 412), ("1", 422)]
)
async def test_a_task_is_read_only_if_it_has_the_version_of_if_match(
    alice: Person, condition: str, status: int
) -> None:
    task = await alice.create()

    answer = await alice.get(f"/{task['id']}", headers={"If-Match": condition})

    assert answer.status_code == status
    assert status == 422 or answer.headers["etag"] == '"1"'


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "", {"title": "x"}),
        ("POST", "/bulk", {"operations": [{"op": "create", "task": {"title": "x"}}]}),
        ("PATCH", "?status=pending", {"completed": True}),
        ("DELETE", "?status=pending", None),
    ],
)
async def test_a_condition_on_a_resource_without_etag_is_422(
    alice: Person, method: str, path: str, body: object, header: str
) -> None:
    task = await alice.create()
    options = {} if body is None else {"json": body}

    answer = await alice.send(method, path, headers={header: '"1"'}, **options)

    assert answer.status_code == 422
    assert answer.json()["errors"] == [{"parameter": header, "detail": "is for single tasks only"}]
    assert (await alice.get()).json() == [task]


async def test_if_modified_since_if_unmodified_since_and_range_are_ignored(alice: Person) -> None:
    # Without `Last-Modified` they must be ignored (RFC 9110, 13.1.3 and 13.1.4); ranges may be (14.2).
    task = await alice.create()
    long_ago, far_ahead = "Thu, 01 Jan 1970 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
    headers = {"If-Modified-Since": far_ahead, "If-Unmodified-Since": long_ago, "Range": "bytes=0-1"}

    for path in (f"/{task['id']}", ""):
        read = await alice.get(path, headers=headers)
        assert read.status_code == 200
        assert not {"last-modified", "accept-ranges", "content-range"} & read.headers.keys()
    changed = await alice.put(f"/{task['id']}", json={"title": "x"}, headers=headers)
    assert (changed.status_code, changed.json()["title"]) == (200, "x")


@pytest.mark.no_cover  # coverage of the same lines many times is slow
async def test_a_hundred_clients_that_retry_lose_no_change(alice: Person) -> None:
    task, dice = await alice.create(description="0"), random.Random(7)
    refused = 0

    async def increment() -> None:
        nonlocal refused
        # A refused client backs off: if all retried at once, it would take 5,000 attempts.
        for attempt in itertools.count(1):
            read = await alice.get(f"/{task['id']}")
            answer = await alice.patch(
                f"/{task['id']}",
                json={"description": str(int(read.json()["description"]) + 1)},
                headers={"If-Match": read.headers["etag"]},
            )
            if answer.status_code == 200:
                return
            assert answer.status_code == 412
            refused += 1
            await asyncio.sleep(dice.uniform(0, 0.05 * attempt))

    await asyncio.gather(*(increment() for _ in range(100)))

    assert (await alice.get(f"/{task['id']}")).json()["description"] == "100"
    assert refused > 50  # they did conflict: all of them read the first version
