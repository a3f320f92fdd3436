"""Fair shares of a busy server: the rule by itself. ``benchmarks.shares`` has the real programs."""

from __future__ import annotations

from collections.abc import Callable

import gevent
import pytest
from helpers import deadline

from tinytun_gevent import shares as module
from tinytun_gevent.shares import Share, Shares

TURN = 64 * 1024


class Machine:
    """One processor that tunnels share, with a clock of its own: what else this one does changes nothing."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._running = 0

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float = 0.0001) -> None:
        """Uses the processor for so long, and lets the others have a turn."""
        self.now += seconds
        gevent.sleep(0)

    def compete(self, *between: Callable[[], None], seconds: float = 0.5) -> list[tuple[int, float]]:
        """How many bytes each one moved, and for how many seconds it paused."""
        shares = Shares()
        until = self.now + seconds
        with deadline():
            greenlets = [gevent.spawn(self.run, Share(shares), until, rest) for rest in between]
            gevent.joinall(greenlets, raise_error=True)
        return [greenlet.get() for greenlet in greenlets]

    def run(self, share: Share, until: float, between: Callable[[], None]) -> tuple[int, float]:
        """Moves turn after turn, with something to do between them."""
        moved, paused = 0, 0.0
        self._running += 1
        while self.now < until:
            share.took(TURN)
            moved += TURN
            between()
            if share.ahead:
                began = self.now
                share.wait()
                paused += self.now - began
        self._running -= 1
        while self._running:  # time goes on for those who wait
            self.work()
        return moved, paused

    def rarely(self, times: int) -> Callable[[], None]:
        """One that has a turn only each so many rounds of the loop."""

        def rest() -> None:
            for _ in range(times):
                gevent.sleep(0)
            self.work()

        return rest

    def slowly(self) -> None:
        """13 MB a second, whatever the others do."""
        until = self.now + 0.005
        while self.now < until:
            self.work(0.00001)


class Moment:
    """An event on a machine, whose clock goes on when nobody has worked for many rounds of the loop."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def wait(self, timeout: float) -> bool:
        machine = self._machine
        until, before, idle = machine.now + timeout, machine.now, 0
        while not self._is_set and machine.now < until:
            gevent.sleep(0)
            idle = idle + 1 if machine.now == before else 0
            if idle > 20:
                machine.now += 0.001
            before = machine.now
        return self._is_set


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(module, "time", machine)
    monkeypatch.setattr(module, "Event", lambda: Moment(machine))
    return machine


def test_one_that_has_more_turns_gets_no_more(machine: Machine) -> None:
    moved = [count for count, _ in machine.compete(machine.work, machine.rarely(4), machine.rarely(9))]
    assert max(moved) < 1.2 * min(moved), moved


def test_nobody_waits_for_a_slow_path(machine: Machine) -> None:
    (fast, paused), (slow, _) = machine.compete(machine.work, machine.slowly)
    assert paused < 0.2  # of half a second
    assert slow > 0.9 * 0.5 / 0.005 * TURN
    assert fast > 10 * slow


def test_a_slow_path_among_several_hurts_no_fairness(machine: Machine) -> None:
    (one, _), (other, _), _ = machine.compete(machine.work, machine.rarely(5), machine.slowly)
    assert one < 1.3 * other


def test_one_alone_never_waits(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Share, "wait", lambda self: pytest.fail("waited"))
    machine.compete(machine.work)


def test_one_that_was_away_begins_where_the_others_are(machine: Machine) -> None:
    shares = Shares()
    old, new = Share(shares), Share(shares)
    for _ in range(1000):
        old.took(TURN)
    machine.now += 2 * module.ABSENT
    with deadline():
        until = machine.now + 0.2
        both = [gevent.spawn(machine.run, share, until, machine.work) for share in (new, old)]
        gevent.joinall(both, raise_error=True)
    (one, _), (other, _) = (greenlet.get() for greenlet in both)
    assert one < 1.2 * other
    assert other < 1.2 * one
