"""How long small requests take while another visitor downloads at full speed."""

from __future__ import annotations

import time

from ..loads.curl import Curl
from ..loads.outcome import Outcome
from ..loads.visitors import knock
from ..loads.wrk import run_wrk
from .base import ANCHORS, GB, HEAVY, Scenario, Stage


class Mixed(Scenario):
    """One kept connection, by wrk, beside a curl."""

    name = "mixed"
    programs = ("curl", "wrk")
    needs_long_file = True
    absent = ANCHORS | HEAVY
    seconds = 2
    quick = 2
    overhead = 1.5
    LEAD = 0.5  # seconds that the download has to get up to speed
    TAIL = 0.5  # seconds that it goes on: wrk takes a moment to begin and to end

    def warm_up(self, stage: Stage) -> None:
        knock(stage.nginx, 2, 10)

    def run(self, stage: Stage) -> Outcome:
        outcome = Outcome()
        curl = Curl(stage.nginx, stage.services.long.name, self.LEAD + stage.seconds + self.TAIL)
        time.sleep(self.LEAD)
        result = run_wrk(stage.nginx, 1, round(stage.seconds), outcome)
        beside = curl.running()
        transfer = curl.result(outcome)
        if transfer and not beside:
            outcome.failed("the download ended before the requests did")
        elif transfer and result:
            outcome.values["mixed-p50"] = result.p50
            outcome.values["mixed-p99"] = result.p99
            outcome.values["mixed-download"] = transfer.bytes / transfer.seconds / GB
        return outcome
