import pytest

from tests.conftest import Person


@pytest.mark.parametrize("day", ["0001-01-01", "9999-12-31"])
async def test_the_first_and_the_last_day_are_days_like_others(alice: Person, day: str) -> None:
    create = {"op": "create", "task": {"title": "in bulk", "due_date": day}}
    bulk = (await alice.post("/bulk", json={"operations": [create]})).json()["results"][0]["task"]
    alone = await alice.create("alone", due_date=day)

    listed = await alice.get(f"?due_date_from={day}&due_date_to={day}&sort=due_date&limit=1")
    rest = await alice.get(listed.links["next"]["url"])

    assert [*listed.json(), *rest.json()] == [bulk, alone]
    for task in (bulk, alone):
        assert (await alice.put(f"/{task['id']}", json={"due_date": day})).json() == task
