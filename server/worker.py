"""One of several processes that serve an address together, as `server/workers.py` starts them."""

import asyncio
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

READY = b"\n"


@dataclass(frozen=True)
class Worker:
    """What a worker is told by its parent, in its arguments."""

    number: int  # from 1
    count: int
    folder: Path  # of the Unix sockets at which workers serve their metrics
    counters: int  # descriptor of the table in which workers count together
    control: int  # descriptor of a socket to the parent
    listening: tuple[int, ...]  # descriptors

    @classmethod
    def parse(cls, number: str, count: str, folder: str, *descriptors: str) -> "Worker":
        counters, control, *listening = map(int, descriptors)
        return cls(int(number), int(count), Path(folder), counters, control, tuple(listening))

    @property
    def arguments(self) -> list[str]:
        return list(map(str, (self.number, self.count, self.folder, *self.descriptors)))

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self.counters, self.control, *self.listening

    @property
    def sockets(self) -> list[socket.socket]:
        return [socket.socket(fileno=descriptor) for descriptor in self.listening]

    def report_ready(self, _address: str) -> None:
        """Tell the parent that this worker serves, and from now on stop when the parent is gone."""
        parent = socket.socket(fileno=self.control)
        parent.send(READY)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.remove_reader(parent)
            signal.raise_signal(signal.SIGTERM)

        loop.add_reader(parent, stop)  # the parent sends nothing, so this is the end
