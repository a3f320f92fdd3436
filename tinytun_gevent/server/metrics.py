"""The server's numbers for Prometheus: read when they are scraped, from plain counters.

What a stranger chooses (names of tunnels, hosts, paths, addresses) is no label: it would be his to decide
how many series there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from .. import __version__
from .sight import Sight, most_descriptors, open_descriptors, status_classes
from .tally import GOAWAY_REASONS, Histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

METRICS: Final[Mapping[str, str]] = {
    "tinytun_tunnels": "Established tunnels.",
    "tinytun_tunnels_leased": "Names kept for a client that was lost.",
    "tinytun_sessions": "Connections of tunnel clients that carry visitors.",
    "tinytun_visitors": "HTTP exchanges, upgraded ones too, and TCP connections under way.",
    "tinytun_connections": "Connections by the port that they came to.",
    "tinytun_exchanges_total": "HTTP exchanges that are over, by class of status; none: visitors that left.",
    "tinytun_bytes_total": "Bytes through all tunnels; in: from visitors, out: to them.",
    "tinytun_exchange_seconds": "From a request's head to its answer's end; without upgraded connections.",
    "tinytun_refusals_total": "What was refused.",
    "tinytun_goaways_total": "GOAWAY frames of sessions, by HTTP/2's error code.",
    "tinytun_tunnels_opened_total": "Tunnels that were opened.",
    "tinytun_tunnels_resumed_total": "Tunnels whose owner came back.",
    "tinytun_tunnels_lost_total": "Tunnels whose client went without a goodbye.",
    "tinytun_open_fds": "Open file descriptors.",
    "tinytun_max_fds": "Most file descriptors that may be open.",
    "tinytun_loop_lag_seconds": "How late the event loop wakes; measured four times a second.",
    "tinytun_draining": "1 while the server is stopping.",
    "tinytun_build_info": "The version that runs.",
    "tinytun_start_time_seconds": "When this process began to serve, since the epoch.",
    "tinytun_certificate_expiry_seconds": "When a certificate ends, since the epoch.",
}
"""Every metric and its meaning, as the README has them."""


class ServerCollector:
    """What prometheus_client asks at each scrape; it registers nothing anywhere by itself."""

    def __init__(self, sight: Sight) -> None:
        self._sight = sight

    def collect(self) -> Iterator[Metric]:
        yield from self._now()
        yield from self._since_the_start()
        yield from self._process()

    def _now(self) -> Iterator[Metric]:
        sight = self._sight
        yield _gauge("tinytun_tunnels", sight.tunnels(), "kind")
        yield _gauge("tinytun_tunnels_leased", sight.leased())
        yield _gauge("tinytun_sessions", len(sight.core.tally.sessions))
        yield _gauge("tinytun_visitors", sight.visitors(), "kind")
        yield _gauge("tinytun_connections", sight.connections(), "port")

    def _since_the_start(self) -> Iterator[Metric]:
        sight, tally = self._sight, self._sight.core.tally
        yield _counter("tinytun_exchanges_total", status_classes(tally.statuses), "class")
        yield _counter("tinytun_bytes_total", {"in": tally.bytes_in, "out": tally.bytes_out}, "direction")
        yield _histogram("tinytun_exchange_seconds", tally.durations)
        yield _counter("tinytun_refusals_total", sight.refusals(), "reason")
        goaways = {
            (direction, reason): count
            for direction, counts in (("sent", tally.goaways_sent), ("received", tally.goaways_received))
            for reason, count in zip(GOAWAY_REASONS, counts, strict=True)
        }
        yield _counter("tinytun_goaways_total", goaways, "direction", "reason")
        yield _counter("tinytun_tunnels_opened_total", tally.tunnels_opened)
        yield _counter("tinytun_tunnels_resumed_total", tally.tunnels_resumed)
        yield _counter("tinytun_tunnels_lost_total", tally.tunnels_lost)
        yield _histogram("tinytun_loop_lag_seconds", sight.lag.lateness)

    def _process(self) -> Iterator[Metric]:
        from prometheus_client.core import InfoMetricFamily

        sight = self._sight
        for name, number in (
            ("tinytun_open_fds", open_descriptors()),
            ("tinytun_max_fds", most_descriptors()),
        ):
            if number is not None:
                yield _gauge(name, number)
        yield _gauge("tinytun_draining", int(sight.core.draining))
        name = "tinytun_build_info"
        yield InfoMetricFamily(name.removesuffix("_info"), METRICS[name], {"version": __version__})
        yield _gauge("tinytun_start_time_seconds", sight.started)
        if certificates := sight.certificates():
            yield _gauge("tinytun_certificate_expiry_seconds", certificates, "name")


Values = float | Mapping[str, float] | Mapping[tuple[str, str], float]


def _labelled(values: Values) -> Iterator[tuple[tuple[str, ...], float]]:
    """``values`` with their labels: of one without any, of several by one label or by two."""
    if isinstance(values, Mapping):
        for labels, value in values.items():
            yield (labels,) if isinstance(labels, str) else labels, value
    else:
        yield (), values


def _gauge(name: str, values: Values, *labels: str) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    metric = GaugeMetricFamily(name, METRICS[name], labels=labels)
    for which, value in _labelled(values):
        metric.add_metric(which, value)
    return metric


def _counter(name: str, values: Values, *labels: str) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    metric = CounterMetricFamily(name, METRICS[name], labels=labels)
    for which, value in _labelled(values):
        metric.add_metric(which, value)
    return metric


def _histogram(name: str, histogram: Histogram) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    bounds = [*(f"{bound}" for bound in histogram.bounds), "+Inf"]
    counts = accumulate(histogram.counts)
    metric = HistogramMetricFamily(name, METRICS[name])
    metric.add_metric([], list(zip(bounds, counts, strict=True)), histogram.sum)
    return metric


def exposition(sight: Sight, accept: str) -> tuple[str, bytes]:
    """The media type and the text of all metrics, in the format that ``accept`` asks for.

    Prometheus's library is imported when the first scrape comes: nobody else needs it.
    """
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import choose_encoder

    registry = CollectorRegistry()
    registry.register(ServerCollector(sight))
    encode, media_type = choose_encoder(accept)
    return media_type, encode(registry)
