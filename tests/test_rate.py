"""Turns under a limit of bytes a second: how much, in which order, and what is given back."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from helpers import deadline

from tinytun_gevent import rate as module
from tinytun_gevent.rate import Rate


class Timer:
    """One of a `Moment`: it is due at a moment of that clock."""

    def __init__(self, moment: Moment, due: float) -> None:
        self.due = due
        self.callback: Callable[[], object] | None = None
        self._moment = moment

    def start(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self._moment.timers.append(self)
        self._moment.go_on()

    def stop(self) -> None:
        if self in self._moment.timers:
            self._moment.timers.remove(self)

    def close(self) -> None:
        self.stop()


class Moment:
    """A clock, and a loop with timers, that go on to the next timer when nobody has anything left to do."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[Timer] = []
        #: How often a timer was due.
        self.count = 0

    def monotonic(self) -> float:
        return self.now

    def get_hub(self) -> SimpleNamespace:
        return SimpleNamespace(loop=self)

    def timer(self, delay: float) -> Timer:
        return Timer(self, self.now + delay)

    def run_callback(self, function: Callable[..., object], *arguments: object) -> None:
        gevent.get_hub().loop.run_callback(function, *arguments)

    def go_on(self) -> None:
        """Later, when all greenlets that can run have run."""
        real = gevent.get_hub().loop.timer(0)
        real.start(self._go_on, real)

    def _go_on(self, real: Any) -> None:
        real.close()
        if self.timers:
            timer = min(self.timers, key=lambda timer: timer.due)
            self.timers.remove(timer)
            self.now = max(self.now, timer.due)
            self.count += 1
            assert timer.callback is not None
            timer.callback()


@pytest.fixture(autouse=True)
def moment(monkeypatch: pytest.MonkeyPatch) -> Moment:
    moment = Moment()
    monkeypatch.setattr(module, "time", moment)
    monkeypatch.setattr(module, "gevent", moment)
    return moment


def move(rate: Rate, until: float, wanted: int = 1 << 20) -> int:
    """What one who always wants more may move until a moment."""
    moved = 0
    while module.time.monotonic() < until:
        moved += rate.take(wanted)
    return moved


def together(*rates: Rate, seconds: float = 2.0) -> tuple[float, list[int]]:
    """How long it took, and what each moved who always wants more."""
    began = module.time.monotonic()
    with deadline():
        greenlets = [gevent.spawn(move, rate, began + seconds) for rate in rates]
        gevent.joinall(greenlets, raise_error=True)
    return module.time.monotonic() - began, [greenlet.get() for greenlet in greenlets]


def empty(rate: Rate) -> Rate:
    """What is saved is whose who comes first."""
    while rate.take_now(100):
        pass
    return rate


def test_many_get_no_more_than_the_rate_together_and_each_the_same() -> None:
    seconds, moved = together(*[empty(Rate(2_000_000))] * 8)
    assert sum(moved) <= 2_000_000 * (seconds + module.BURST) + 8 * 20_000
    # One turn, and one more, for not all of them see the end in the same round.
    assert max(moved) - min(moved) <= 2 * 20_000


def test_the_rate_is_used() -> None:
    seconds, moved = together(*[empty(Rate(2_000_000))] * 8)
    assert sum(moved) >= 2_000_000 * seconds * 0.99


def test_turns_are_in_the_order_of_asking() -> None:
    rate, order = Rate(1_000_000), []

    def ask(number: int) -> None:
        rate.take(1 << 20)
        order.append(number)

    with deadline():
        gevent.joinall([gevent.spawn(ask, number) for number in range(20)])
    assert order == sorted(order)


def test_who_wants_little_waits_for_one_turn_of_the_others_only() -> None:
    rate, turns = Rate(1_000_000), 0

    def ask_for_much() -> None:
        nonlocal turns
        while turns >= 0:
            rate.take(1 << 20)
            turns += 1

    with deadline():
        others = [gevent.spawn(ask_for_much) for _ in range(5)]
        while turns < 10:
            gevent.sleep(0)
        before = turns
        assert rate.take(100) == 100
        assert turns - before <= 6  # one each, and one that has just come
        gevent.killall(others)


def test_what_is_not_moved_goes_to_others(moment: Moment) -> None:
    rate = Rate(1024)
    with deadline():
        assert rate.take_now(1024)
        waiting = gevent.spawn(rate.take, 1024)  # a second
        gevent.sleep(0)
        rate.refund(1024)
        waiting.get()
    assert moment.count == 0, "it waited for that second"


def test_nobody_is_overtaken_without_waiting() -> None:
    rate = Rate(1_000_000)
    with deadline():
        while rate.take_now(10_000):
            pass
        waiting = gevent.spawn(rate.take, 10_000)
        gevent.sleep(0)
        assert not rate.take_now(1)
        waiting.get()


def test_who_is_killed_in_the_queue_takes_nothing_with_him(moment: Moment) -> None:
    rate = Rate(1_000_000)
    with deadline():
        while rate.take_now(10_000):
            pass
        killed = [gevent.spawn(rate.take, 10_000) for _ in range(50)]
        last = gevent.spawn(rate.take, 10_000)
        gevent.sleep(0)
        gevent.killall(killed)
        began = moment.now
        last.get()
    assert moment.now - began < 0.02  # 50 turns would be half a second


def test_who_is_killed_in_the_queue_of_the_limit_above_gives_it_nothing() -> None:
    above = empty(Rate(100_000))
    own = Rate(10_000_000, above)
    waiting = gevent.spawn(above.take, 1000)  # somebody is before him
    gevent.sleep(0)
    killed = [gevent.spawn(own.take, 1000) for _ in range(20)]
    gevent.sleep(0)
    with deadline():
        gevent.killall(killed)
        waiting.get()
    assert own.rests
    assert not above.take_now(2000)  # 20 turns that nobody had


def test_two_limits_hold_at_once() -> None:
    above = empty(Rate(1_000_000))
    seconds, (_, other) = together(Rate(3_000_000, above), Rate(200_000, above))
    assert other <= 200_000 * (seconds + module.BURST) + 2048
    seconds, moved = together(Rate(3_000_000, above), Rate(3_000_000, above))
    assert sum(moved) <= 1_000_000 * (seconds + module.BURST) + 2 * 10_000


def test_a_change_counts_for_those_who_wait(moment: Moment) -> None:
    rate = Rate(1000)
    with deadline():
        rate.take(1024)
        waiting = gevent.spawn(rate.pass_all, 100_000)  # 100 s
        gevent.sleep(0)
        began = moment.now
        rate.change(0)
        waiting.get()
    assert moment.now - began < 1.1, "the turn that was due"
    assert rate.rests
