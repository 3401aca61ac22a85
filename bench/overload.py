"""How the service behaves at ten times its best load: `uv run --group bench bench/overload.py`.

Interleaves rounds at the number of connections with the best throughput and at ten times as many. Clients
send their next request at once, whatever the status. Prints the statuses, latencies and memory of each load.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from auth import tokens
from bench.run import SECRET
from bench.scale import USERS, filled, user
from tests.postgres import free_port, running_server
from tests.service import Service, running_service

PEAK = 48


class Client(asyncio.Protocol):
    """One connection that repeats the same request until it is stopped."""

    def __init__(self, request: bytes, answered: Counter[int], times_s: list[float]) -> None:
        self._request, self._answered, self._times_s = request, answered, times_s
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        status = int(head[9:12])
        self._answered[status] += 1
        if status == 200:
            self._times_s.append(time.perf_counter() - self._sent_at)
        self._received = b""
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)


async def load(port: int, connections: int, seconds: float) -> tuple[Counter[int], list[float]]:
    answered: Counter[int] = Counter()
    times_s: list[float] = []
    loop = asyncio.get_running_loop()
    transports = []
    for number in range(1, connections + 1):
        client = Client(_request(user(number)), answered, times_s)
        transports.append((await loop.create_connection(lambda made=client: made, "127.0.0.1", port))[0])
    await asyncio.sleep(seconds)
    for transport in transports:
        transport.abort()
    return answered, times_s


def _request(user_id: str) -> bytes:
    token = tokens.issue(user_id, SECRET, 3600)
    head = f"GET /api/{user_id}/tasks?limit=20 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n"
    return head.encode()


def resident_mb(service: Service) -> float:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {PEAK: [], 10 * PEAK: []}
    with running_server() as server, tempfile.TemporaryDirectory() as name:
        url, port = asyncio.run(filled(server, 20 * USERS, USERS)), free_port()
        settings = {
            "DATABASE_URL": url,
            "BETTER_AUTH_SECRET": SECRET,
            "PORT": str(port),
            "ACCESS_LOG": "false",
            "RATE_LIMIT": "off",
        }
        with running_service(Path(name), **settings) as service:
            service.wait_for(f"http://127.0.0.1:{port}")
            for _ in range(options.rounds):
                for connections, rounds in found.items():
                    answered, times_s = asyncio.run(load(port, connections, options.seconds))
                    rounds.append(
                        {
                            "accepted_per_s": answered[200] / options.seconds,
                            "refused_per_s": answered[503] / options.seconds,
                            "others": sum(answered.values()) - answered[200] - answered[503],
                            "p50_ms": statistics.median(times_s) * 1000,
                            "p99_ms": statistics.quantiles(times_s, n=100)[98] * 1000,
                            "resident_mb": resident_mb(service),
                        }
                    )
    for connections, rounds in found.items():
        medians = {name: round(statistics.median(each[name] for each in rounds), 1) for name in rounds[0]}
        print(json.dumps({"connections": connections, **medians}))


if __name__ == "__main__":
    main()
