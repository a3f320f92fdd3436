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


def together(*rates: Rate, seconds: float = 0.4) -> tuple[float, list[int]]:
    """How long it took, and what each moved who always wants more."""
    began = time.monotonic()
    with deadline():
        greenlets = [gevent.spawn(move, rate, began + seconds) for rate in rates]
        gevent.joinall(greenlets, raise_error=True)
    return time.monotonic() - began, [greenlet.get() for greenlet in greenlets]


def empty(rate: Rate) -> Rate:
    """What is saved is whose who comes first."""
    while rate.take_now(10_000):
        pass
    return rate


def test_many_get_no_more_than_the_rate_together_and_each_the_same() -> None:
    seconds, moved = together(*[empty(Rate(2_000_000))] * 8)
    assert sum(moved) <= 2_000_000 * (seconds + module.BURST) + 8 * 20_000
    # One turn, and one more, for not all of them see the end in the same round.
    assert max(moved) - min(moved) <= 2 * 20_000


def test_the_rate_is_used() -> None:
    """Where the machine is busy with other things not always: who is late by more than the burst loses it."""
    for _ in range(5):
        seconds, moved = together(*[empty(Rate(2_000_000))] * 8)
        if sum(moved) >= 2_000_000 * seconds * 0.9:
            return
    pytest.fail(f"{moved} in {seconds:.3f} s")


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
            gevent.sleep(0.001)
        before = turns
        assert rate.take(100) == 100
        assert turns - before <= 6  # one each, and one that has just come
        gevent.killall(others)


def test_what_is_not_moved_goes_to_others() -> None:
    rate = Rate(1024)
    with deadline():
        assert rate.take_now(1024)
        waiting = gevent.spawn(rate.take, 1024)  # a second
        gevent.sleep(0)
        rate.refund(1024)
        began = time.monotonic()
        waiting.get()
    assert time.monotonic() - began < 0.5


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
    assert time.monotonic() - began < 0.4  # 50 turns would be half a second


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
