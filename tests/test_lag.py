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
    with gevent.Timeout(120):
        while sum(loop_lag.lateness.counts) < count:
            gevent.sleep(0.005)


def stall(seconds: float) -> float:
    """Holds everybody up: for how long it really was."""
    began = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - began


@pytest.mark.parametrize("before", [0.0, 0.1])
def test_a_stall_is_measured(before: float) -> None:
    """Also where the loop has not looked at the clock for a while when it begins."""
    gevent.sleep(0.001)  # from here on a timer wakes this greenlet, and no callback, which looks at the clock
    stall(before)
    loop_lag = LoopLag()
    loop_lag.start()
    loop_lag.start()
    looks(loop_lag, 2)
    sum_before = loop_lag.lateness.sum
    stalled = stall(0.3)
    count = sum(loop_lag.lateness.counts)
    looks(loop_lag, count + 1)
    least = stalled - lag.INTERVAL  # the next look was due so much later at most
    assert loop_lag.worst >= least
    assert loop_lag.lateness.sum - sum_before >= least
    worst = loop_lag.worst
    looks(loop_lag, count + 3)
    loop_lag.stop()
    assert loop_lag.worst == worst or loop_lag.worst > stalled  # it is counted once


def test_it_is_quiet_after_the_end() -> None:
    loop_lag = LoopLag()
    loop_lag.start()
    looks(loop_lag, 1)
    loop_lag.stop()
    loop_lag.stop()
    count = sum(loop_lag.lateness.counts)
    gevent.sleep(0.06)
    assert sum(loop_lag.lateness.counts) == count
