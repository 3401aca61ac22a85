from collections.abc import Iterator

import pytest

from tests import faults
from tests.faults import AFTER_S, Fault, suffer
from tests.postgres import Process, running_process

# Coverage would slow down the load, which shares the service's process.
pytestmark = [pytest.mark.no_cover, pytest.mark.timing]

SCALE = 0.25  # of every duration; `bench/faults.py` uses real ones
REQUEST_DEADLINE_S = 8.0
LATE_MAX_S = 1.0  # an event loop blocked for longer is itself a fault
TURNS = 4  # event loop iterations of a request after its deadline, each as late as the latest seen


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    """A separate server, since the faults stop and kill it."""
    with running_process(durable=True) as process:
        yield process


FAULTS = [
    faults.terminated,
    faults.restarted,
    faults.crashed,
    faults.asleep,
    faults.away,
    faults.slow_to_wake,
    faults.read_only,
    faults.out_of_connections,
    faults.without_connections,
    faults.frozen,
    faults.cut_off,
    faults.forgotten,
]
# No request fails while a database wakes. Unscaled, since the server's start-up time does not scale.
WAKING = [faults.asleep, faults.slow_to_wake]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_a_database_fault_loses_no_write_and_the_service_recovers(
    process: Process, fault: Fault
) -> None:
    scale = 1.0 if fault in WAKING else SCALE

    outcome = await suffer(process, fault, scale)

    account = outcome.account
    late_s = 0.05 + TURNS * account.late_s
    assert account.late_s < LATE_MAX_S
    assert account.odd == []
    assert (outcome.lost, outcome.doubled) == (0, 0)
    assert account.longest_s < REQUEST_DEADLINE_S * scale + late_s
    assert outcome.recovery_s < AFTER_S * scale + outcome.calm_s + late_s
    if fault in WAKING:
        # A write in progress when the database fell asleep may have committed or not, so it may fail.
        assert [when for when in account.failures if when > outcome.began + 0.5 + late_s] == []
