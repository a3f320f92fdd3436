"""Over a long path: a relay between the two programs of a contender delays and may limit what passes."""

from __future__ import annotations

import math
import statistics
import time

from ..loads.curl import Curl
from ..loads.outcome import Outcome
from ..loads.streams import Downloads, read_streams
from ..loads.visitors import Visitors, kept_requests, knock
from ..loads.wrk import run_wrk
from .base import ANCHORS, HEAVY, LongPath, Scenario, Stage

MB = 1e6
MS = 1000.0

#: Named by the round trip. 4 MiB is what Linux lets a TCP connection have in flight by default (tcp_wmem).
PATHS = {
    "50ms": LongPath(0.025),
    "50ms-4MiB": LongPath(0.025, window=4 << 20),
    "50ms-1Gbit": LongPath(0.025, rate=125_000_000),
    "100ms": LongPath(0.050),
    "100ms-1Gbit": LongPath(0.050, rate=125_000_000),
}

#: Those that cannot be the best here: one TCP connection for all, with a fixed and small window in it.
SMALL_WINDOW = HEAVY | {"ssh -R"}


def percentile(figures: list[float], percent: float) -> float:
    """The smallest of ``figures`` that at least ``percent`` of them do not exceed."""
    ordered = sorted(figures)
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


class FarBulk(Scenario):
    """One or eight visitors download as fast as it goes: in the first second, and after it."""

    needs_long_file = True
    absent = ANCHORS | SMALL_WINDOW
    seconds = 3

    #: Seconds for windows to grow in; told apart, as the path plays no slow start to those without windows.
    FIRST = 1.0

    def __init__(self, path: str, visitors: int) -> None:
        """``path``: a key of `PATHS`."""
        self.path = PATHS[path]
        self.count = visitors
        self.name = f"far-{path}-{visitors}"
        self.groups = ("far", f"far-{path}")
        # One that may use several connections needs a moment to find out that it should.
        self.warm_seconds = 1.0 if visitors == 1 else 3.0
        self.overhead = self.warm_seconds + self.FIRST + 0.3

    def warm_up(self, stage: Stage) -> None:
        read_streams(stage.nginx, stage.services.long.name, self.count, 0, self.warm_seconds, Outcome())

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        with Downloads(stage.nginx, stage.services.long.name, self.count, outcome) as visitors:
            first, flow = visitors.read(self.FIRST), visitors.read(stage.seconds)
        if flow.bytes:
            outcome.values[self.name] = flow.rate / MB
            outcome.values[f"{self.name}-first"] = first.rate / MB
        return outcome


class FirstByte(Scenario):
    """A new visitor on a new connection: when the first byte of the answer is there. One at a time."""

    name = "first-byte"
    groups = ("far",)
    path = PATHS["50ms"]
    absent = ANCHORS
    seconds = 2
    overhead = 0.5
    AT_ONCE = 1
    PAUSE = 0.0

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, self.AT_ONCE, 2)

    def first_bytes(self, stage: Stage, outcome: Outcome) -> list[float]:
        """Seconds each, of visitors who come `AT_ONCE` at a time, leave, and are followed by the next."""
        end = time.monotonic() + stage.seconds
        with Visitors(stage.nginx, outcome) as crowd:
            while time.monotonic() < end and not outcome.failures:
                crowd.come(self.AT_ONCE, self.AT_ONCE)
                crowd.leave()
                time.sleep(self.PAUSE)
            return crowd.first_bytes

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        took = self.first_bytes(stage, outcome)
        if took:
            outcome.values["first-byte"] = statistics.median(took) * MS
        return outcome


class Burst(FirstByte):
    """32 new visitors at the same moment, several times."""

    name = "burst"
    absent = ANCHORS | HEAVY
    AT_ONCE = 32
    PAUSE = 0.2  # seconds, until those before have left

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        took = self.first_bytes(stage, outcome)
        if took:
            outcome.values["burst-p99"] = percentile(took, 99) * MS
        return outcome


class FarRequest(Scenario):
    """Requests one after another on one kept connection."""

    name = "far-request"
    groups = ("far",)
    path = PATHS["50ms"]
    absent = ANCHORS | HEAVY
    seconds = 1.5
    overhead = 0.3

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, 1, 2)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        took = kept_requests(stage.nginx, stage.seconds, outcome)
        outcome.values["far-request-p50"] = statistics.median(took) * MS
        outcome.values["far-request-p99"] = percentile(took, 99) * MS
        return outcome


class FarMixed(Scenario):
    """Small requests alone, then beside a download that fills the line: how much later their p99 is."""

    name = "far-mixed"
    groups = ("far", "mixed")
    path = PATHS["100ms-1Gbit"]
    programs = ("curl", "wrk")
    needs_long_file = True
    absent = ANCHORS | SMALL_WINDOW
    seconds = 5
    overhead = 3
    VISITORS = 16  # who make the requests: each alone makes only ten a second
    LEAD = 2.0  # seconds that the download has to fill the line
    FULL = 0.5  # of the rate, from its first second on, is the least for a download that fills the line
    TAIL = 0.7  # seconds that it goes on: wrk takes a moment to begin and to end

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, self.VISITORS, 2)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        alone = run_wrk(stage.nginx, self.VISITORS, round(stage.seconds * 2 / 5), outcome)
        seconds = round(stage.seconds * 3 / 5)
        curl = Curl(stage.nginx, stage.services.long.name, self.LEAD + seconds + self.TAIL)
        time.sleep(self.LEAD)
        beside = run_wrk(stage.nginx, self.VISITORS, seconds, outcome)
        still = curl.running()
        transfer = curl.result(outcome)
        if transfer and not still:
            outcome.failed("the download ended before the requests did")
        elif transfer and transfer.bytes / transfer.seconds < self.FULL * self.path.rate:
            outcome.failed("the download did not fill the line: requests beside it show nothing")
        elif alone and beside and transfer:
            outcome.values["far-mixed-p99"] = beside.p99
            outcome.values["far-mixed-added"] = beside.p99 - alone.p99
            outcome.values["far-mixed-download"] = transfer.bytes / transfer.seconds / MB
        return outcome
