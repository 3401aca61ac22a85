from datetime import UTC, datetime

import pytest

from main import create_app
from tests.conftest import Person, person, running, settings_for
from tests.postgres import Server


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


async def test_times_are_utc_whatever_the_time_zone_of_the_database(postgres: Server) -> None:
    name = await postgres.create_database()
    await postgres.execute(f"ALTER DATABASE \"{name}\" SET timezone = 'America/New_York'")
    operation = {"op": "create", "task": {"title": "Buy milk", "completed": True}}
    before = datetime.now(UTC)

    async with running(create_app(settings_for(postgres.url_of(name)))) as client:
        done = await person("alice", client).post("/bulk", json={"operations": [operation]})

    task = done.json()["results"][0]["task"]
    assert task["created_at"] == task["updated_at"] == task["completed_at"]
    assert before <= datetime.fromisoformat(task["created_at"]) <= datetime.now(UTC)
