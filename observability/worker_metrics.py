"""The metrics of several workers: each serves its own on a Unix socket, and any process can read them all."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from observability import metrics

TIMEOUT_S = 1.0  # for a worker that does not answer; the metrics are then those of the others
SUFFIX = ".metrics"

_log = structlog.get_logger("metrics")


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a folder for the sockets, for this user only, that no cleaner of temporary files removes.

    Raises:
        OSError: it cannot be made.
    """
    import fcntl  # not on Windows, where there are no workers

    with TemporaryDirectory(prefix="tasks-") as name:
        descriptor = os.open(name, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # tmpfiles.d(5): it is then passed over
        try:
            yield Path(name)
        finally:
            os.close(descriptor)


@asynccontextmanager
async def served(folder: Path, number: int) -> AsyncIterator[None]:
    """Serve the metrics of this process, worker *number*, to all that may read *folder*."""
    path = folder / f"{number}{SUFFIX}"
    async with contextlib.AsyncExitStack() as stack:
        try:
            path.unlink(missing_ok=True)  # of the worker that this one replaces
            await stack.enter_async_context(await asyncio.start_unix_server(_answer, path))
        except OSError as error:  # serve requests anyway
            _log.error("metrics are not served", worker=number, reason=str(error))
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
        paths = sorted(self._folder.glob(f"*{SUFFIX}"))
        with ThreadPoolExecutor(max(1, len(paths))) as pool:  # one may be frozen
            texts = list(pool.map(_read, paths))
        if not any(texts):  # the scrape has to fail, or nothing would tell
            raise RuntimeError("no worker answers")
        for path, text in zip(paths, texts, strict=True):
            for found in text_string_to_metric_families(text):
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
