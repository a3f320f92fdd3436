"""Bulk transfers: one visitor down and up, 20 at once, and 20 beside one that stopped reading."""

from __future__ import annotations

import time
from contextlib import ExitStack

from ..loads.curl import Curl, at_once
from ..loads.outcome import Outcome
from ..loads.streams import Downloads, Flow, stalled
from ..loads.visitors import knock
from ..peers import CONTENDERS, DIRECT, OURS, OURS_TCP
from ..processes import BenchmarkError, memory_bytes
from ..services import NGINX, SINK
from .base import GB, HEAVY, MIB, SETTLE, Processes, Scenario, Stage, counted_cpu

GRACE = 1.0  # seconds that the last transfer of a cell gets to become complete
MANY = 20


class Bulk(Scenario):
    """Files of 1 GiB one after another, one visitor. The last one is cut off if it takes too long."""

    groups = ("bulk", "encrypted")
    programs = ("curl",)
    encrypted = True
    seconds = 3
    quick = 2
    overhead = 1.0

    def __init__(self, upload: bool) -> None:
        self.upload = upload
        self.name = "upload" if upload else "download"
        self.services = (SINK,) if upload else (NGINX,)

    def warm_up(self, stage: Stage) -> None:
        outcome = Outcome()
        if self._start(stage, warm=True, limit=10).result(outcome) is None:
            raise BenchmarkError(f"in the warm-up: {'; '.join(outcome.reasons)}")

    def run(self, stage: Stage) -> Outcome:
        outcome, moved, took = Outcome(), 0, 0.0
        end = time.monotonic() + stage.seconds
        with counted_cpu(stage.running) as cpu:
            while (now := time.monotonic()) < end and not outcome.failures:
                transfer = self._start(stage, warm=False, limit=end - now + GRACE).result(outcome)
                if transfer:
                    moved, took = moved + transfer.bytes, took + transfer.seconds
        if moved:
            outcome.values[self.name] = moved / took / GB
            # CPU that a failed transfer used would make the figure wrong.
            if stage.running.processes and not outcome.failures:
                outcome.values[f"{self.name}-cpu"] = cpu.seconds / (moved / GB)
        return outcome

    def _start(self, stage: Stage, *, warm: bool, limit: float) -> Curl:
        path = stage.services.warm if warm else stage.services.bulk
        endpoint = stage.running.endpoints[self.services[0]]
        return Curl(endpoint, path.name, limit, upload=path if self.upload else None)


class ManyDownloads(Scenario):
    """20 visitors at once, each a file of 1 GiB; what has come when the time is over is counted."""

    name = "download-20"
    groups = ("bulk",)
    programs = ("curl",)
    absent = HEAVY | {DIRECT}
    seconds = 3
    quick = 2.5
    overhead = 0.5

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, MANY)
        at_once(stage.nginx, stage.services.warm.name, 2, 5, Outcome())

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        with counted_cpu(stage.running) as cpu:
            rate = at_once(stage.nginx, stage.services.bulk.name, MANY, stage.seconds, outcome)
        if rate:
            outcome.values[self.name] = rate / GB
            if not outcome.failures:
                outcome.values[f"{self.name}-cpu"] = cpu.seconds / (rate * stage.seconds / GB)
        return outcome


class BesideStalled(Scenario):
    """20 downloads, beside whom a visitor who stopped reading comes and goes; and what he costs, alone.

    He is measured twice: he never reads, or he reads at full speed for a second and then stops.
    """

    name = "download-20-stalled"
    groups = ("bulk",)
    processes = Processes.FRESH
    #: Its targets hold ours against ours; one peer is there to compare with.
    absent = frozenset(contender.name for contender in CONTENDERS) - {OURS, OURS_TCP, "rathole"}
    needs_long_file = True
    seconds = 8
    overhead = 6
    READS = 1.0  # seconds until the second kind stops
    NEVER = 8  # of the first kind at once, or what a process takes only once would be charged to one
    WARM = 1.5  # seconds: the first time that so many come is slower than any later one
    TURNS = 4  # each of four slices: without, with, with, without; so a drift of the machine favours neither

    def warm_up(self, stage: Stage) -> None:
        """Small requests only: windows that have grown in a warm-up may be handed to him who never reads."""
        knock(stage.nginx, MANY, 5)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        path = stage.services.long.name
        for key, read, count in (
            ("stalled-memory", 0.0, self.NEVER),
            ("stalled-late-memory", self.READS, 1),
        ):
            before = memory_bytes(stage.running.pids)
            with ExitStack() as stack:
                outcome.attempts += count
                for _ in range(count):
                    stalled(stack, stage.nginx, path, read)
                time.sleep(2 * SETTLE)  # until whatever there is to fill is full
                outcome.values[key] = (memory_bytes(stage.running.pids) - before) / count / MIB
            time.sleep(SETTLE)
        self._beside(stage, path, outcome)
        return outcome

    def _beside(self, stage: Stage, path: str, outcome: Outcome) -> None:
        """The 20 go on all the time; he comes and goes."""
        flows: dict[bool, list[Flow]] = {True: [], False: []}
        seconds = stage.seconds / self.TURNS / 4
        with Downloads(stage.nginx, path, MANY, outcome) as visitors:
            visitors.read(self.WARM)
            for present in (False, True, True, False) * self.TURNS:
                with ExitStack() as stack:
                    if present:
                        stalled(stack, stage.nginx, path)
                    flows[present].append(visitors.read(seconds))
        with_him, without = (
            sum(flow.bytes for flow in found) / sum(flow.seconds for flow in found)
            for found in (flows[True], flows[False])
        )
        if with_him and without:
            outcome.values[self.name] = with_him / GB
            outcome.values["stalled-ratio"] = with_him / without
