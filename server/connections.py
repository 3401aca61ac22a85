"""The connections of a process: limits on their number and on the bytes that clients leave unread."""

import ipaddress
from collections import Counter
from typing import Protocol

import errors
from observability.logs import BoundedLog

REFUSED_MAX = 50  # refused connections stay open until their client has read why; further ones are reset
UNREAD_MAX_BYTES = 32 * 1024 * 1024  # keeps a process below 256 MB
STALL_TIMEOUT_S = 30.0  # for a client that reads nothing
STALL_TIMEOUT_UNDER_PRESSURE_S = 5.0  # while more than half of `UNREAD_MAX_BYTES` waits

_log = BoundedLog("http")


class TooManyConnections(errors.TooManyRequests):
    """One client address has `MAX_CONNECTIONS_PER_ADDRESS` open."""

    sentence = "Too many connections are open from your address"

    def __init__(self) -> None:
        super().__init__(retry_after_s=1)


class NoMoreConnections(errors.Overloaded):
    """The process has `MAX_CONNECTIONS` open."""


class Transport(Protocol):
    def get_write_buffer_size(self) -> int: ...

    def abort(self) -> None: ...


class Connections:
    """Counts open connections, in all and by client, and the bytes that their clients have not read."""

    def __init__(self, *, limit: int, limit_per_client: int, proxies: list[str]) -> None:
        self._limit, self._limit_per_client = limit, limit_per_client
        self._proxies = [ipaddress.ip_network(proxy) for proxy in proxies]
        self._open: Counter[str] = Counter()
        self._total = 0
        self._refused = 0
        self._unread: dict[Transport, None] = {}  # in the order in which they began to wait

    def is_proxy(self, host: str) -> bool:
        """Return whether *host* is a proxy that we trust, and so not the client itself."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:  # a Unix socket has no address
            return False
        return any(address in network for network in self._proxies)

    def add(self, client: str | None) -> None:
        """Count a connection of *client*; None is a proxy, whose connections are those of many clients.

        Raises:
            NoMoreConnections: the process has as many as it may have.
            TooManyConnections: the client has as many as it may have.
        """
        if self._total >= self._limit:
            raise NoMoreConnections
        if client is not None:
            if self._open[client] >= self._limit_per_client:
                raise TooManyConnections
            self._open[client] += 1
        self._total += 1

    def remove(self, client: str | None) -> None:
        self._total -= 1
        if client is not None:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def add_refused(self) -> bool:
        """Return whether a refused connection may stay open for a moment, and if so count it."""
        if self._refused >= REFUSED_MAX:
            return False
        self._refused += 1
        return True

    def remove_refused(self) -> None:
        self._refused -= 1

    def add_unread(self, transport: Transport) -> None:
        """Count the unread bytes of *transport*; beyond `UNREAD_MAX_BYTES` end the connections with most."""
        self._unread.setdefault(transport)
        sizes = {each: each.get_write_buffer_size() for each in self._unread}
        excess = sum(sizes.values()) - UNREAD_MAX_BYTES
        while excess > 0:
            largest = max(sizes, key=sizes.__getitem__)  # of equals the one that has waited longest
            excess -= sizes.pop(largest)
            _log.warning("connection ended", reason="too many bytes are unread")
            largest.abort()

    def remove_unread(self, transport: Transport) -> None:
        self._unread.pop(transport, None)

    @property
    def stall_timeout_s(self) -> float:
        """How long a client may read nothing."""
        unread = sum(each.get_write_buffer_size() for each in self._unread)
        return STALL_TIMEOUT_UNDER_PRESSURE_S if unread > UNREAD_MAX_BYTES / 2 else STALL_TIMEOUT_S
