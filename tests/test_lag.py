"""The event loop's lateness: a stall is seen, quiet is not."""

from __future__ import annotations

import time

import gevent
import pytest

from tinytun_gevent.server import lag
from tinytun_gevent.server.lag import LoopLag


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lag, "INTERVAL", 0.02)


def looks(loop_lag: LoopLag, count: int) -> None:
    """Lets the loop run until there have been so many looks."""
    with gevent.Timeout(10):
        while sum(loop_lag.lateness.counts) < count:
            gevent.sleep(0.005)


def test_a_stall_is_measured() -> None:
    loop_lag = LoopLag()
    loop_lag.start()
    loop_lag.start()
    looks(loop_lag, 2)
    before = loop_lag.lateness.sum
    time.sleep(0.3)  # what holds everybody up
    looks(loop_lag, 4)
    loop_lag.stop()
    assert loop_lag.worst >= 0.25
    assert loop_lag.lateness.sum - before >= 0.25
    assert sum(loop_lag.lateness.counts[7:]) == 1  # beyond 0.1 s; what follows is on time again


def test_it_is_quiet_after_the_end() -> None:
    loop_lag = LoopLag()
    loop_lag.start()
    looks(loop_lag, 1)
    loop_lag.stop()
    loop_lag.stop()
    count = sum(loop_lag.lateness.counts)
    gevent.sleep(0.06)
    assert sum(loop_lag.lateness.counts) == count
