"""Turns under a limit of bytes a second: how much, in which order, and what is given back."""

from __future__ import annotations

import time

import gevent
import pytest
from helpers import deadline

from tinytun_gevent import rate as module
from tinytun_gevent.rate import Rate


def move(rate: Rate, until: float, wanted: int = 1 << 20) -> int:
    """What one who always wants more may move until a moment."""
    moved = 0
    while time.monotonic() < until:
        moved += rate.take(wanted)
    return moved


def test_many_get_the_rate_together_and_each_the_same() -> None:
    rate = Rate(2_000_000)
    while rate.take_now(20_000):  # what is saved is whose who comes first
        pass
    began = time.monotonic()
    with deadline():
        greenlets = [gevent.spawn(move, rate, began + 0.4) for _ in range(8)]
        gevent.joinall(greenlets)
    shares = [greenlet.get() for greenlet in greenlets]
    seconds = time.monotonic() - began
    assert sum(shares) <= 2_000_000 * (seconds + module.BURST) + 8 * 20_000
    assert sum(shares) >= 2_000_000 * seconds * 0.9
    assert max(shares) - min(shares) <= 20_000  # one turn


def test_turns_are_in_the_order_of_asking() -> None:
    rate, order = Rate(1_000_000), []

    def ask(number: int) -> None:
        rate.take(1 << 20)
        order.append(number)

    with deadline():
        gevent.joinall([gevent.spawn(ask, number) for number in range(20)])
    assert order == sorted(order)


def test_who_wants_little_waits_for_one_turn_of_the_others_only() -> None:
    rate = Rate(1_000_000)
    with deadline():
        others = [gevent.spawn(move, rate, time.monotonic() + 0.5) for _ in range(5)]
        gevent.sleep(0.15)
        began = time.monotonic()
        assert rate.take(100) == 100
        waited = time.monotonic() - began
        gevent.joinall(others)
    assert waited < 5 * module.TURN + 0.04


def test_what_is_not_moved_goes_to_others() -> None:
    rate = Rate(1_000_000)
    with deadline():
        while rate.take_now(10_000):
            pass
        waiting = gevent.spawn(rate.take, 10_000)
        gevent.sleep(0)
        rate.refund(10_000)
        began = time.monotonic()
        waiting.get()
    assert time.monotonic() - began < 0.005


def test_nobody_is_overtaken_without_waiting() -> None:
    rate = Rate(1_000_000)
    with deadline():
        while rate.take_now(10_000):
            pass
        waiting = gevent.spawn(rate.take, 10_000)
        gevent.sleep(0)
        assert not rate.take_now(1)
        waiting.get()


def test_who_is_killed_in_the_queue_takes_nothing_with_him() -> None:
    rate = Rate(1_000_000)
    with deadline():
        while rate.take_now(10_000):
            pass
        killed = [gevent.spawn(rate.take, 10_000) for _ in range(50)]
        last = gevent.spawn(rate.take, 10_000)
        gevent.sleep(0)
        gevent.killall(killed)
        began = time.monotonic()
        last.get()
    assert time.monotonic() - began < 0.1  # 50 turns would be half a second


def test_two_limits_hold_at_once() -> None:
    above = Rate(1_000_000)
    one, other = Rate(3_000_000, above), Rate(200_000, above)
    began = time.monotonic()
    with deadline():
        first = gevent.spawn(move, one, began + 0.5)
        second = gevent.spawn(move, other, began + 0.5)
        gevent.joinall([first, second])
    assert second.get() == pytest.approx(200_000 * 0.5, rel=0.35)
    assert first.get() + second.get() == pytest.approx(1_000_000 * 0.5, rel=0.2)


def test_a_change_counts_for_those_who_wait() -> None:
    rate = Rate(1000)
    with deadline():
        rate.take(1024)
        waiting = gevent.spawn(rate.pass_all, 100_000)  # 100 s
        gevent.sleep(0.01)
        rate.change(0)
        began = time.monotonic()
        waiting.get()
    assert time.monotonic() - began < 0.5
    assert rate.rests
