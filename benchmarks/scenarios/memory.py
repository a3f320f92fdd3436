"""Memory: of a visitor who does nothing, with the cost of a request meanwhile, and of an idle tunnel."""

from __future__ import annotations

import time

from ..loads.outcome import Outcome
from ..loads.tunnels import IdleTunnels
from ..loads.visitors import Visitors, knock
from ..loads.wrk import run_wrk
from ..peers import CONTENDERS, OURS, Contender
from ..processes import BenchmarkError, memory_bytes
from ..services import NGINX
from .base import ANCHORS, HEAVY, SETTLE, Processes, Scenario, Stage, counted_cpu
from .requests import PER

SPARE = 100  # descriptors that a process needs beside those of visitors


def fitting(wanted: int, contender: Contender, files: int) -> int:
    """How many visitors it can hold with ``files`` descriptors a process: ``wanted``, or fewer."""
    return min(wanted, (files - SPARE) // max(1, contender.descriptors))


class IdleVisitors(Scenario):
    """Visitors that made one request each and keep their connection; one more makes requests meanwhile."""

    groups = ("idle", "memory")
    programs = ("wrk",)
    processes = Processes.FRESH
    WARM_VISITORS = 50

    def __init__(self, count: int) -> None:
        self.count = count
        self.name = f"idle-{count}"
        self.absent = ANCHORS
        self.seconds = 2
        self.overhead = 2 + count / 2000
        if count > 5000:
            # ssh ends at its 10,000th channel, and looks at all of them whenever one has something.
            self.absent |= HEAVY | {"ssh -R"}
        else:
            self.quick = 1

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, self.WARM_VISITORS)
        time.sleep(SETTLE)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        before = memory_bytes(stage.running.pids)
        with Visitors(stage.nginx, outcome) as crowd:
            crowd.come(fitting(self.count, stage.contender, stage.ground.files))
            time.sleep(SETTLE)
            if not crowd.held:
                return outcome
            growth = memory_bytes(stage.running.pids) - before
            outcome.values[f"{self.name}-memory"] = growth / len(crowd.held) / 1024
            with counted_cpu(stage.running) as cpu:
                result = run_wrk(stage.nginx, 1, round(stage.seconds), outcome)
            if result:
                outcome.values[f"{self.name}-rate"] = result.good / result.seconds
                outcome.values[f"{self.name}-p99"] = result.p99
                outcome.values[f"{self.name}-cpu"] = cpu.seconds / result.good * PER
        return outcome


class ManyTunnels(Scenario):
    """1,000 tunnels that nobody visits, opened by a small client of ours: memory of each in the server."""

    name = "tunnels-1000"
    groups = ("memory",)
    processes = Processes.OWN
    absent = frozenset(contender.name for contender in CONTENDERS) - {OURS}
    services = (NGINX,)
    seconds = 1
    overhead = 5
    COUNT = 1000
    WARM = 50

    def warm_up(self, stage: Stage) -> None:
        """Nothing here: the server is started by `run`, and the first tunnels warm it up."""

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        server = stage.contender.start_server(stage.ground)
        pids = [process.pid for process in server.processes]
        with IdleTunnels(server.port) as tunnels:
            try:
                tunnels.open(self.WARM)
                tunnels.serve(SETTLE)
                before = memory_bytes(pids)
                tunnels.open(self.COUNT)
                tunnels.serve(stage.seconds)
            except (OSError, BenchmarkError) as error:
                outcome.count(1, 1, str(error))
                return outcome
            outcome.attempts = self.COUNT
            outcome.values["tunnel-memory"] = (memory_bytes(pids) - before) / self.COUNT / 1024
        return outcome
