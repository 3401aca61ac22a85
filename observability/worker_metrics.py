"""The metrics of several workers: each serves its own on a Unix socket, and any process can read them all."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from observability import metrics

TIMEOUT_S = 1.0  # for a worker that does not answer; the metrics are then those of the others
SUFFIX = ".metrics"


@asynccontextmanager
async def served(folder: Path, number: int) -> AsyncIterator[None]:
    """Serve the metrics of this process, worker *number*, to all that may read *folder*."""
    path = folder / f"{number}{SUFFIX}"
    path.unlink(missing_ok=True)  # of the worker that this one replaces
    async with await asyncio.start_unix_server(_answer, path):
        yield


async def _answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.write(metrics.render())
        writer.close()
        await writer.wait_closed()


def registry(folder: Path) -> CollectorRegistry:
    """Return a registry with the metrics of all workers, in which the label `worker` is their number."""
    found = CollectorRegistry()
    found.register(_AllWorkers(folder))
    return found


class _AllWorkers(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            for found in text_string_to_metric_families(_read(path)):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                family.samples += [
                    each._replace(labels={"worker": path.stem, **each.labels}) for each in found.samples
                ]
        return families.values()


def _read(path: Path) -> str:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(path))
        with connection.makefile("rb") as file:
            return file.read().decode()
    return ""
