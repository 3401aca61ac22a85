"""The cost of verifying a token: `uv run --group bench bench/tokens.py`.

Measures the verification time of a new and of a remembered token, and the throughput for tokens of known keys
while tokens with unknown key ids arrive. Takes a minute. Needs wrk, as `run.py` does.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import httpx

from auth import jwks, tokens
from bench.run import SECRET, load, running, seed_sqlite, summarise
from tests.issuer import ORIGIN, SigningKey, new_key, running_issuer

ALGORITHMS = ("HS256", "EdDSA", "ES256", "RS256")
TOKENS = 2_000  # per algorithm
USERS = 10  # each with 1,000 tasks, in SQLite
UNKNOWN_PER_S = 100
ROUNDS, SECONDS, CONNECTIONS = 6, 3, 32
NAME = "this service"


async def verify_us(verifier: tokens.Verifier, made: list[str]) -> float:
    """Return the median time to verify one of *made*, in microseconds."""
    taken = []
    for token in made:
        began = time.perf_counter_ns()
        await verifier.verify(token)
        taken.append(time.perf_counter_ns() - began)
    return statistics.median(taken) / 1000


async def measure_verifying() -> None:
    keys = {algorithm: new_key(algorithm) for algorithm in ALGORITHMS if algorithm != "HS256"}
    print(f"\n{'verify, µs':12}{'new':>8}{'remembered':>12}")
    async with running_issuer(*keys.values()) as issuer:
        fetched = jwks.FetchedKeys(issuer.url)
        await fetched.open()
        for algorithm in ALGORITHMS:
            users = [f"user{number}" for number in range(TOKENS)]
            made = (
                [keys[algorithm].token(sub=user) for user in users]
                if algorithm in keys
                else [tokens.issue(user, SECRET, 900) for user in users]
            )
            expected = tokens.Expectations(frozenset({ORIGIN}), frozenset({ORIGIN}))
            verifier = tokens.Verifier([SECRET], fetched, of_keys=expected)
            if algorithm in keys:
                await fetched.key(keys[algorithm].kid)  # the first fetch is not measured
            new, remembered = await verify_us(verifier, made), await verify_us(verifier, made)
            print(f"{algorithm:12}{new:8.1f}{remembered:12.1f}")
        await fetched.close()


@asynccontextmanager
async def unknown_tokens(address: str, per_s: int) -> AsyncIterator[list[int]]:
    """Send tokens of an unknown issuer, each with another key id; yield the response statuses."""
    stranger, statuses = new_key("EdDSA"), list[int]()
    made = [stranger.token({"kid": f"unknown-{number}"}) for number in range(per_s * (SECONDS + 3))]

    async def send(client: httpx.AsyncClient, token: str) -> None:
        answer = await client.get("/api/alice/tasks", headers={"Authorization": f"Bearer {token}"})
        statuses.append(answer.status_code)

    async def send_all() -> None:
        began = time.perf_counter()
        async with httpx.AsyncClient(base_url=address, timeout=30) as client, asyncio.TaskGroup() as group:
            for number, token in enumerate(made):
                await asyncio.sleep(began + number / per_s - time.perf_counter())
                group.create_task(send(client, token))

    sending = asyncio.create_task(send_all())
    try:
        yield statuses
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)


async def measure_unknown(folder: Path, key: SigningKey) -> None:
    made = [key.token(sub=f"user{number:04}") for number in range(1, USERS + 1)]
    token_file = folder / "tokens"
    token_file.write_text("\n".join(made) + "\n")
    url = await asyncio.to_thread(seed_sqlite, folder / "tasks.db", USERS)
    rounds: dict[int, list[dict[str, float]]] = {0: [], UNKNOWN_PER_S: []}
    statuses: list[int] = []
    async with running_issuer(key) as issuer:
        os.environ |= {"BETTER_AUTH_URL": ORIGIN, "JWKS_URL": issuer.url}
        with running([NAME], url, folder) as (process,):
            for number in range(ROUNDS + 1):
                for per_s, results in rounds.items():
                    async with unknown_tokens(process.address, per_s) as answered:
                        result = await asyncio.to_thread(
                            load, process, "one", token_file, SECONDS if number else 1, CONNECTIONS
                        )
                    statuses += answered
                    if number:  # the first round is the warm-up
                        results.append(result)
        report(rounds, statuses, len(issuer.requests))


def report(rounds: dict[int, list[dict[str, float]]], statuses: list[int], fetches: int) -> None:
    print(f"\n{'unknown/s':12}{'req/s':>8}{'CPU s/1000':>12}{'p50 ms':>9}{'p99 ms':>9}")
    for per_s, results in rounds.items():
        row = summarise(results)
        print(
            f"{per_s:<12}{row['requests_per_s']:8.0f}{row['cpu_s_per_1000']:12.3f}"
            f"{row['p50_ms']:9.1f}{row['p99_ms']:9.1f}"
        )
    for name, label in (("requests_per_s", "requests"), ("cpu_s_per_1000", "CPU for each")):
        ratios = [after[name] / before[name] for before, after in zip(*rounds.values(), strict=True)]
        print(f"{label}, ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    answers = ", ".join(str(status) for status in sorted(set(statuses)))
    print(f"unknown: {len(statuses)} tokens, each answered with {answers}; keys fetched {fetches} times")


async def main_() -> None:
    await measure_verifying()
    os.sched_setaffinity(0, {1})  # with wrk: the first core is the service's
    with tempfile.TemporaryDirectory() as name:
        await measure_unknown(Path(name), new_key("EdDSA"))


if __name__ == "__main__":
    asyncio.run(main_())
