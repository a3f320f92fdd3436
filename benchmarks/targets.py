"""What this program is to reach, as data, and how far a run reached it."""

from __future__ import annotations

from dataclasses import dataclass

from .measures import MEASURES, MORE
from .peers import HAPROXY, OURS, OURS_HTTPS, OURS_TCP, OURS_TLS
from .report import NOTHING, TIMES, Results, Summary, figure, spread, table

#: What a figure is held against, beside the name of a contender.
BEST_PEER = "the best peer"
ABSOLUTE = ""

KEPT = "kept"
MISSED = "MISSED"
NOT_MEASURED = "not measured"

#: 1 Gbit/s, in MB/s.
LINE = 125.0
#: The largest window that a stream can have, in MiB: what a visitor who stalled late may cost at most.
WINDOW = 32


@dataclass(frozen=True)
class Target:
    """A bound for one measure of one of ours."""

    what: str
    measure: str
    bound: float
    against: str = BEST_PEER
    contender: str = OURS

    @property
    def at_least(self) -> bool:
        """Whether ``bound`` is the least that is to be reached, or the most that may be."""
        return _MEASURES[self.measure].better == MORE


_MEASURES = {measure.key: measure for measure in MEASURES}

TARGETS: tuple[Target, ...] = (
    Target("bulk download, one visitor", "download", 1.5),
    Target("bulk download, one visitor", "download", 0.6, HAPROXY),
    Target("bulk upload, one visitor", "upload", 1.3),
    Target("bulk download, tcp tunnel", "download", 1.5, contender=OURS_TCP),
    Target("bulk upload, tcp tunnel", "upload", 1.5, contender=OURS_TCP),
    Target("20 downloads at once", "download-20", 1.2),
    Target("20 downloads beside a stalled one, of what they get without it", "stalled-ratio", 0.95, ABSOLUTE),
    Target("one that stalled before its window grew, both processes, MiB", "stalled-memory", 1, ABSOLUTE),
    Target("one that stalled later: its window, MiB", "stalled-late-memory", WINDOW, ABSOLUTE),
    Target("keep-alive requests, 32 connections", "keepalive-32", 1.0),
    Target("keep-alive requests, 256 connections", "keepalive-256", 1.0),
    Target("p99 at 32 keep-alive connections", "keepalive-32-p99", 1.0),
    Target("latency that the tunnel adds, one keep-alive connection", "added", 1.0),
    Target("new connections, 32 at a time", "connections", 1.3),
    Target("new connections, tcp tunnel", "connections", 0.7, contender=OURS_TCP),
    Target("CPU for a GB down", "download-cpu", 0.7),
    Target("CPU for a GB up", "upload-cpu", 0.7),
    Target("CPU for 10,000 requests", "keepalive-32-cpu", 1.0),
    Target("CPU for 10,000 new connections", "connections-cpu", 0.8),
    Target("an idle visitor, of 2,000", "idle-2000-memory", 0.7),
    Target("an idle visitor, of 10,000", "idle-10000-memory", 0.7),
    Target("an idle visitor, of 2,000, tcp tunnel", "idle-2000-memory", 1.1, contender=OURS_TCP),
    Target("an idle visitor, of 10,000, tcp tunnel", "idle-10000-memory", 1.1, contender=OURS_TCP),
    Target("an idle tunnel in the server, KiB", "tunnel-memory", 100, ABSOLUTE),
    Target("50 ms, no rate limit, one visitor", "far-50ms-1", 0.9),
    Target("50 ms, no rate limit, eight visitors", "far-50ms-8", 1.0),
    Target("50 ms, 4 MiB in flight a connection, one visitor", "far-50ms-4MiB-1", 0.95),
    Target("50 ms, 4 MiB in flight a connection, eight visitors", "far-50ms-4MiB-8", 0.9),
    Target("100 ms, 1 Gbit/s, one visitor, MB/s", "far-100ms-1Gbit-1", 0.95 * LINE, ABSOLUTE),
    Target("100 ms, 1 Gbit/s, eight visitors, MB/s", "far-100ms-1Gbit-8", 0.95 * LINE, ABSOLUTE),
    Target("first byte for a new visitor, 50 ms, ms", "first-byte", 54, ABSOLUTE),
    Target("first byte, burst of 32, p99", "burst-p99", 0.6),
    Target("small request beside a download, median, ms", "mixed-p50", 0.6, ABSOLUTE),
    Target("small request beside a download, p99, ms", "mixed-p99", 10, ABSOLUTE),
    Target("the same over 100 ms, 1 Gbit/s: p99 over its own, ms", "far-mixed-added", 30, ABSOLUTE),
    Target("download, TLS to the client", "download", 0.5, OURS, contender=OURS_TLS),
    Target("download, TLS to the visitor", "download", 0.5, OURS, contender=OURS_HTTPS),
    Target("upload, TLS to the client", "upload", 0.5, OURS, contender=OURS_TLS),
    Target("upload, TLS to the visitor", "upload", 0.5, OURS, contender=OURS_HTTPS),
    Target("32 connections, TLS to the client", "keepalive-32", 0.7, OURS, contender=OURS_TLS),
    Target("32 connections, TLS to the visitor", "keepalive-32", 0.7, OURS, contender=OURS_HTTPS),
    Target("client process start to first request, s", "start", 0.25, ABSOLUTE),
    Target("`tinytun --version`, s", "version", 0.05, ABSOLUTE),
)


@dataclass(frozen=True)
class Judgement:
    """How far one target was reached."""

    target: Target
    ours: Summary | None
    reference: str | None  # who it is held against, or for absolute ones the best peer
    theirs: Summary | None
    ratio: Summary | None
    verdict: str

    def row(self) -> list[str]:
        """A row of `targets_table`."""
        sign = "≥" if self.target.at_least else "≤"
        bound = f"{sign} {figure(self.target.bound)}"
        if self.target.against == BEST_PEER:
            bound += f"{TIMES} the best peer"
        elif self.target.against:
            bound += f"{TIMES} {self.target.against}"
        theirs = f"{spread(self.theirs)}, {self.reference}" if self.reference else NOTHING
        return [
            self.target.what, bound, spread(self.ours), theirs, spread(self.ratio, TIMES), self.verdict
        ]  # fmt: skip


def judge(target: Target, results: Results) -> Judgement:
    """Compares the medians of a run with one target."""
    measure = _MEASURES[target.measure]
    best = results.best_peer(measure)
    reference = best if target.against in (BEST_PEER, ABSOLUTE) else target.against
    ours = results.summary(target.contender, target.measure)
    theirs = results.summary(reference, target.measure) if reference else None
    ratio = results.ratio(target.contender, reference, target.measure) if reference else None
    if theirs is None:
        reference = None
    decisive = ours if target.against == ABSOLUTE else ratio
    if results.unreliable(target.contender, measure.scenario):
        verdict = MISSED  # whatever the figure: it is one of something that failed
    elif decisive is None:
        verdict = NOT_MEASURED
    else:
        good = decisive.median >= target.bound if target.at_least else decisive.median <= target.bound
        verdict = KEPT if good else MISSED
    return Judgement(target, ours, reference, theirs, ratio, verdict)


def targets_table(results: Results) -> str:
    """Every target: kept, missed or not measured."""
    head = ["target", "bound", "ours", "best peer, or what it is held against", "ratio", ""]
    return table(head, [judge(target, results).row() for target in TARGETS])
