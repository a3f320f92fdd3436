"""From the start of a client's process to the first answered request, and how long ``--version`` takes."""

from __future__ import annotations

import statistics
import sys
import time

from ..loads.outcome import Outcome, call
from ..peers import CONTENDERS, OURS, wait_until_open
from ..peers.ours import BIN
from ..processes import BenchmarkError
from .base import ANCHORS, HEAVY, Processes, Scenario, Stage

STOP = 0.5  # seconds from SIGTERM to SIGKILL


class StartUp(Scenario):
    """A server is up, clients come one after another; the median of their times to the first right answer."""

    name = "start"
    processes = Processes.OWN
    absent = ANCHORS | HEAVY
    seconds = 2
    overhead = 1
    TIMES = 5
    POLL = 0.002  # seconds between two looks whether it answers: what the figure may be wrong by

    def warm_up(self, stage: Stage) -> None:
        """Nothing here: the first client of `run` takes the programs into the page cache."""

    def run(self, stage: Stage) -> Outcome:
        outcome, took = Outcome(), []
        server = stage.contender.start_server(stage.ground)
        for number in range(1 + self.TIMES):
            began = time.monotonic()
            outcome.attempts += 1
            try:
                client = stage.contender.start_client(stage.ground, server)
                wait_until_open(client, self.POLL)
            except BenchmarkError as error:
                outcome.failed(str(error))
                continue
            if number:
                took.append(time.monotonic() - began)
            stage.ground.workspace.stop(client.processes, STOP)
        if took:
            outcome.values["start"] = statistics.median(took)
        return outcome


class Version(Scenario):
    """``tinytun --version``, process start to end; the median."""

    name = "version"
    groups = ("start",)
    processes = Processes.OWN
    absent = frozenset(contender.name for contender in CONTENDERS) - {OURS}
    seconds = 1
    overhead = 0
    TIMES = 11

    def warm_up(self, stage: Stage) -> None:
        self._once(Outcome())

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        took = [self._once(outcome) for _ in range(self.TIMES)]
        if not outcome.failures:
            outcome.values["version"] = statistics.median(took)
        return outcome

    def _once(self, outcome: Outcome) -> float:
        began = time.monotonic()
        done = call([sys.executable, str(BIN / "tinytun"), "--version"], 10)
        took = time.monotonic() - began
        outcome.count(1, int(done.returncode != 0), done.stderr.strip())
        return took
