"""Small requests, by wrk: on so many kept connections, or each on a new one."""

from __future__ import annotations

from ..loads.outcome import Outcome
from ..loads.visitors import knock
from ..loads.wrk import run_wrk
from ..peers import DIRECT
from ..services import SMALL_PAGE, WHOLE_PAGE
from .base import ANCHORS, HEAVY, Scenario, Stage, counted_cpu

PER = 10_000  # requests, in the CPU figures
WARM_TIMES = 10


def _warm_up(stage: Stage, visitors: int, times: int) -> None:
    """So many visitors come, so many times; by https, where our own generator does not go, for a second."""
    if stage.nginx.tls:
        run_wrk(stage.nginx, visitors, 1, Outcome())
    else:
        knock(stage.nginx, visitors, times)


class KeptRequests(Scenario):
    """Each visitor makes one request after another on one connection."""

    programs = ("wrk",)
    page = SMALL_PAGE

    def __init__(self, connections: int) -> None:
        self.connections = connections
        self.name = f"keepalive-{connections}"
        self.groups = ("keepalive", "visitors") if connections == 1 else ("keepalive",)
        if connections == 32:
            self.groups, self.encrypted = ("keepalive", "encrypted"), True
        self.seconds = 2 if connections == 1 else 3
        if connections == 32:
            self.quick = 2
        if connections > 32:
            self.absent = HEAVY | {DIRECT}

    def warm_up(self, stage: Stage) -> None:
        _warm_up(stage, self.connections, WARM_TIMES if self.connections < 100 else 2)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        with counted_cpu(stage.running) as cpu:
            result = run_wrk(stage.nginx, self.connections, round(stage.seconds), outcome, page=self.page)
        if result:
            outcome.values[self.name] = result.good / result.seconds
            outcome.values[f"{self.name}-p50"] = result.p50
            outcome.values[f"{self.name}-p99"] = result.p99
            if stage.running.processes:
                outcome.values[f"{self.name}-cpu"] = cpu.seconds / result.good * PER
        return outcome


class WholeAnswers(KeptRequests):
    """One visitor again; but each answer comes from nginx as one packet, not as head and body.

    Whoever lets Nagle's algorithm hold back the second packet until the first is acknowledged loses
    up to 40 ms (delayed acknowledgements) in `KeptRequests`, and nothing here.
    """

    page = WHOLE_PAGE

    def __init__(self) -> None:
        super().__init__(1)
        self.name = "keepalive-1-whole"
        self.groups = ("keepalive",)
        self.absent = HEAVY
        self.seconds = 1


class GrowingCrowd(KeptRequests):
    """Throughput and CPU per request for a number of visitors, beside those of `KeptRequests`."""

    absent = ANCHORS | HEAVY | {"ssh -R"}

    def __init__(self, connections: int) -> None:
        super().__init__(connections)
        self.name = f"visitors-{connections}"
        self.groups = ("visitors",)
        self.absent = GrowingCrowd.absent
        self.seconds = 2

    def run(self, stage: Stage) -> Outcome:
        outcome = super().run(stage)
        kept = (self.name, f"{self.name}-cpu")
        outcome.values = {key: value for key, value in outcome.values.items() if key in kept}
        return outcome


class NewConnections(Scenario):
    """32 visitors at a time; each request on a connection of its own."""

    name = "connections"
    groups = ("encrypted",)
    encrypted = True
    programs = ("wrk",)
    seconds = 3
    quick = 2
    CONNECTIONS = 32

    def warm_up(self, stage: Stage) -> None:
        _warm_up(stage, self.CONNECTIONS, WARM_TIMES)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        with counted_cpu(stage.running) as cpu:
            result = run_wrk(stage.nginx, self.CONNECTIONS, round(stage.seconds), outcome, close=True)
        if result:
            outcome.values["connections"] = result.good / result.seconds
            outcome.values["connections-p99"] = result.p99
            if stage.running.processes:
                outcome.values["connections-cpu"] = cpu.seconds / result.good * PER
        return outcome
