"""How database faults affect 32 clients; prints a table: `uv run --group bench bench/faults.py`."""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from observability import logs
from tests.faults import suffer
from tests.postgres import running_process
from tests.test_faults import FAULTS

WORDS = {
    "terminated": "all connections ended, five times",
    "restarted": "restarted",
    "crashed": "killed (SIGQUIT) and started",
    "asleep": "away for 4 s",
    "away": "away for 8 s",
    "slow_to_wake": "accepts and does not answer for 3.5 s",
    "read_only": "read-only for 1.5 s",
    "out_of_connections": "two connections for all, 2 s",
    "without_connections": "no connections, 2 s",
    "frozen": "frozen (SIGSTOP) for 6 s",
    "cut_off": "packets vanish for 6 s",
    "forgotten": "old connections lead nowhere",
}


async def main() -> None:
    logs.configure("critical", "json")
    print("| fault | requests | failed (503) | longest answer | lost | doubled | recovery |")
    print("|---|---|---|---|---|---|---|")
    with running_process(durable=True) as process:
        for fault in FAULTS:
            outcome = await suffer(process, fault)
            account = outcome.account
            cells = (
                WORDS[fault.__name__],
                f"{account.requests:,}",
                f"{len(account.failures):,}",
                f"{account.longest_s:.1f} s",
                outcome.lost,
                outcome.doubled,
                f"{outcome.recovery_s:.1f} s",
            )
            print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
