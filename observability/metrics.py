"""Metrics of this process for Prometheus; docs/operations.md explains them."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
VALUES_MAX = 32  # of one label; unbounded values would overload the Prometheus server
OTHER = "other"
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_BOUNDS = (*map(floatToGoString, _SECONDS), "+Inf")

# The `_created` series would add a third, for no use here.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # not annotated


class Counts(Collector):
    """A counter whose callers pass few values of its labels.

    Only the event loop counts, so it needs no lock and takes a tenth of the time of the library's `Counter`.
    """

    def __init__(
        self, name: str, documentation: str, labels: Sequence[str], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._about = name, documentation
        self._labels = labels
        self._counts: dict[tuple[str | int, ...], int] = defaultdict(int)
        registry.register(self)

    def count(self, *values: str | int, amount: int = 1) -> None:
        self._counts[values] += amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(*self._about, labels=self._labels)
        for values, count in self._counts.copy().items():  # a scrape may be on another thread
            family.add_metric([str(value) for value in values], count)
        yield family


class BoundedCounts(Counts):
    """A counter with one label of at most `VALUES_MAX` values; any further ones are counted as `OTHER`."""

    def count(self, *values: str | int, amount: int = 1) -> None:
        if values not in self._counts and len(self._counts) >= VALUES_MAX:
            values = (OTHER,)
        super().count(*values, amount=amount)


class Timed(Collector):
    """A histogram of seconds with one label of bounded values, counted like `Counts`."""

    def __init__(
        self, name: str, documentation: str, label: str, registry: CollectorRegistry = REGISTRY
    ) -> None:
        self._about = name, documentation
        self._labels = [label]
        self._counts: dict[str, list[int]] = {}  # of each bucket
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, value: str, seconds: float) -> None:
        if value not in self._counts:
            # The sum first: a scrape on another thread goes by the counts.
            self._sums[value], self._counts[value] = 0.0, [0] * len(_BOUNDS)
        self._counts[value][bisect_left(_SECONDS, seconds)] += 1
        self._sums[value] += seconds

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(*self._about, labels=self._labels)
        for value, counts in self._counts.copy().items():
            buckets = [*zip(_BOUNDS, accumulate(counts), strict=True)]
            family.add_metric([value], buckets, self._sums[value])
        yield family


_requests = Counts(
    "http_requests", "Requests answered, by route, method and status.", ["route", "method", "status"]
)
_durations = Timed("http_request_duration_seconds", "Time to answer a request, by route.", "route")


class _InFlight:
    """The number of requests being answered: a plain integer, which the gauge reads only at a scrape."""

    number = 0


in_flight = _InFlight()
Gauge("http_requests_in_flight", "Requests that are being answered.").set_function(lambda: in_flight.number)

_streams_open = Gauge("event_streams_open", "Event streams that are open.")
_events_sent = Counter("events_sent", "Changes of tasks sent to event streams.")
_sync_gone = Counter("sync_gone", "Sync tokens refused because what they need is forgotten.")
_refused_tokens = BoundedCounts("tokens_refused", "Tokens that were not accepted, by reason.", ["reason"])
_failed_sign_ins = BoundedCounts(
    "sign_ins_failed", "Sign-ins to local accounts that failed, by reason.", ["reason"]
)
_rate_limited = BoundedCounts(
    "requests_rate_limited", "Requests refused for their number, by limit.", ["limit"]
)
_key_fetches = BoundedCounts("key_fetches", "Attempts to fetch the issuer's keys, by outcome.", ["outcome"])
_unavailable = BoundedCounts(
    "database_unavailable", "Statements that could not be run, by reason.", ["reason"]
)
_purged = BoundedCounts("tasks_purged", "Tasks erased and tombstones dropped by the purge.", ["outcome"])
_statements = Timed(
    "database_statement_duration_seconds", "Time from sending a statement to its rows.", "statement"
)


def request_answered(route: str, method: str, status: int, seconds: float) -> None:
    """Count and time a request; *route* is a template, never an address."""
    _requests.count(route, method if method in METHODS else OTHER, status)
    _durations.observe(route, seconds)


def stream_opened() -> None:
    """Move a request from those in flight to the open streams, as a stream stays open for hours."""
    _streams_open.inc()
    in_flight.number -= 1


def stream_closed() -> None:
    _streams_open.dec()
    in_flight.number += 1


def events_sent(count: int) -> None:
    _events_sent.inc(count)


def sync_token_expired() -> None:
    _sync_gone.inc()


def token_refused(reason: str) -> None:
    _refused_tokens.count(reason)


def sign_in_failed(reason: str) -> None:
    _failed_sign_ins.count(reason)


def rate_limited(limit: str) -> None:
    """Count a request that the limit called *limit* refused."""
    _rate_limited.count(limit)


def keys_fetched(*, ok: bool) -> None:
    _key_fetches.count("ok" if ok else "failed")


def database_unavailable(reason: str) -> None:
    _unavailable.count(reason)


def tasks_purged(outcome: str, count: int) -> None:
    _purged.count(outcome, amount=count)


def statement_ran(name: str, seconds: float) -> None:
    _statements.observe(name, seconds)


class _Connections(Collector):
    """The database connections of the service in this process, read at each scrape."""

    usage: Callable[[], dict[str, int]] | None = None

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            "database_connections", "Connections in use and idle, and waiting requests.", labels=["state"]
        )
        for state, number in (self.usage() if self.usage else {}).items():
            family.add_metric([state], number)
        yield family


_connections = _Connections()
REGISTRY.register(_connections)


def watch_connections(usage: Callable[[], dict[str, int]]) -> None:
    """Report what *usage* returns: how many connections are in which state."""
    _connections.usage = usage


def render(registry: CollectorRegistry = REGISTRY) -> bytes:
    """Return the metrics of *registry* in Prometheus' text format."""
    return prometheus_client.generate_latest(registry)


def serve(host: str, port: int, registry: CollectorRegistry = REGISTRY) -> Callable[[], None]:
    """Serve the metrics of *registry* at a port of their own, on a thread; the returned function stops it.

    Raises:
        OSError: the port is in use or not permitted.
    """
    server, thread = prometheus_client.start_http_server(port, host, registry)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
