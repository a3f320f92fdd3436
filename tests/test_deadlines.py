"""One clock for everybody's deadlines."""

from __future__ import annotations

import gevent
import pytest
from helpers import wait_until

from tinytun_gevent.server import deadlines
from tinytun_gevent.server.deadlines import Clock
from tinytun_gevent.turns import let_others_run


class Timed:
    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.ticks = 0

    def tick(self, now: float) -> None:
        self.ticks += 1
        if self.broken:
            raise RuntimeError("a mistake of ours")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "TICK", 0.002)


def test_what_is_watched_is_looked_at_until_it_is_forgotten() -> None:
    clock, one, other = Clock(), Timed(), Timed()
    clock.watch(one)
    clock.watch(other)
    assert len(clock) == 2
    wait_until(lambda: one.ticks >= 2 and other.ticks >= 2)
    clock.forget(one)
    clock.forget(one)
    seen, later = one.ticks, other.ticks
    wait_until(lambda: other.ticks >= later + 2)
    assert one.ticks == seen
    clock.stop()


def test_a_mistake_in_one_deadline_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    clock, broken, sound = Clock(), Timed(broken=True), Timed()
    clock.watch(broken)
    clock.watch(sound)
    wait_until(lambda: sound.ticks >= 3)
    assert broken.ticks >= 3
    assert "a deadline could not be looked at" in caplog.text
    clock.stop()


def test_a_stopped_clock_starts_again_with_the_next_to_watch() -> None:
    clock, timed = Clock(), Timed()
    clock.watch(timed)
    wait_until(lambda: timed.ticks)
    clock.stop()
    gevent.idle()
    seen = timed.ticks
    clock.watch(timed)
    wait_until(lambda: timed.ticks > seen)
    clock.stop()


def test_others_run_while_many_are_looked_at() -> None:
    clock, seen = Clock(), []

    class Watched(Timed):
        def tick(self, now: float) -> None:
            super().tick(now)
            seen.append(now)

    watched = [Watched() for _ in range(3 * deadlines.LOOKS_AT_ONCE)]
    for one in watched:
        clock.watch(one)
    while not seen:
        let_others_run()
    first = [one.ticks for one in watched]
    assert sum(first) < len(watched)  # this greenlet runs between two of them
    wait_until(lambda: len(seen) >= len(watched))
    assert len(set(seen[: len(watched)])) == 1  # all of a round are told of the same moment
    clock.stop()
