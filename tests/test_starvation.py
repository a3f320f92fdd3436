"""When resting streams starve fresh ones of a small service; by hand, with times that are passed in."""

from __future__ import annotations

from typing import Any, cast

from tinytun_gevent.server import starvation
from tinytun_gevent.server.starvation import ABSTINENCE, CAUSE, OVERTAKEN, PATIENCE, REPEAT, Starvation

NEAR = 0.0
"""A round trip, in seconds."""


class Fresh:
    """A stream; only whether it is over matters."""

    closed = False


class Clock:
    """A starvation whose time is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.tested = Starvation()

    def open(self, count: int = 1) -> list[Any]:
        streams = [cast(Any, Fresh()) for _ in range(count)]
        for stream in streams:
            self.tested.opened(stream, self.now)
        return streams

    def answer(self, stream: Any, resting: bool = True) -> bool:
        return self.tested.answered(stream, self.now, NEAR, resting)

    def excess(self, after: float = 0.0) -> int:
        self.now += after
        return self.tested.excess(self.now, NEAR)

    def end(self, count: int = 1) -> None:
        self.tested.ended(count, self.now)


def test_nothing_ends_while_nothing_waits() -> None:
    clock = Clock()
    assert clock.excess(100) == 0
    (one,) = clock.open()
    clock.answer(one)
    assert clock.excess(100) == 0


def test_one_ends_for_each_that_waits_after_a_while() -> None:
    clock = Clock()
    clock.open(3)
    assert clock.excess(PATIENCE * 0.9) == 0
    assert clock.excess(PATIENCE * 0.2) == 3
    clock.end(2)
    assert clock.excess() == 1
    clock.end(1)
    assert clock.excess() == 0


def test_every_first_byte_begins_the_while_anew() -> None:
    clock = Clock()
    for stream in clock.open(10):
        assert clock.excess(PATIENCE * 0.9) == 0
        clock.answer(stream)
    clock.open(2)
    clock.end(2)
    clock.now += PATIENCE
    clock.open()
    assert clock.excess(PATIENCE * 0.9) == 0, "the new one has only begun to wait"


def test_over_a_long_path_a_first_byte_takes_longer() -> None:
    tested = Starvation()
    tested.opened(cast(Any, Fresh()), 0.0)
    assert tested.excess(2 * 0.3 + PATIENCE * 0.9, 0.3) == 0
    assert tested.excess(2 * 0.3 + PATIENCE * 1.1, 0.3) == 1


def test_what_a_later_one_overtakes_is_slow_by_itself() -> None:
    clock = Clock()
    (poll,) = clock.open()
    assert clock.excess(10) == 1
    (later,) = clock.open()
    clock.answer(later)
    assert clock.excess(10) == 0
    assert clock.answer(poll) is False


def test_order_within_a_moment_says_nothing() -> None:
    """The client opens connections of one moment in any order."""
    clock = Clock()
    early, late = clock.open(2)
    clock.answer(late)
    assert clock.excess(PATIENCE * 2) == 1
    clock.now += OVERTAKEN
    clock.answer(early)
    assert clock.excess(PATIENCE * 2) == 0


def test_ends_in_vain_are_repeated_after_a_while() -> None:
    clock = Clock()
    clock.open(2)
    assert clock.excess(1) == 2
    clock.end(2)
    assert clock.excess(REPEAT * 0.9) == 0
    assert clock.excess(REPEAT * 0.2) == 2


def test_two_first_bytes_right_behind_an_end_prove_a_small_service() -> None:
    clock = Clock()
    first, second, third = clock.open(3)
    clock.answer(first, resting=False)
    for stream, proved in ((second, False), (third, True)):
        assert clock.excess(PATIENCE * 1.1) > 0
        clock.end()
        clock.now += CAUSE * 0.9
        assert clock.tested.may_rest(clock.now)
        assert clock.answer(stream) is proved
    assert not clock.tested.may_rest(clock.now)
    assert not clock.tested.may_rest(clock.now + ABSTINENCE * 0.99)
    assert clock.tested.may_rest(clock.now + ABSTINENCE * 1.01)


def prove(clock: Clock, late: float = CAUSE / 2) -> bool:
    """An end, and then the first byte of one that waited."""
    (stream,) = clock.open()
    assert clock.excess(PATIENCE * 1.1) == 1
    clock.end()
    clock.now += late
    return clock.answer(stream)


def test_a_late_first_byte_proves_nothing() -> None:
    clock = Clock()
    assert not prove(clock)
    assert not prove(clock, CAUSE * 1.1)  # which speaks against the one before
    assert not prove(clock)
    assert prove(clock)


def test_a_first_byte_of_one_that_has_not_waited_longest_proves_nothing() -> None:
    """A service with threads enough answers in any order, a small one in the order of asking."""
    clock = Clock()
    for _ in range(10):
        streams = clock.open(3)
        clock.excess(PATIENCE * 1.1)
        clock.end()
        clock.now += CAUSE / 2
        assert not clock.answer(streams[1])
        for stream in (streams[0], streams[2]):
            clock.now += CAUSE * 2
            assert not clock.answer(stream)


def test_one_that_comes_before_the_end_can_have_an_effect_proves_nothing() -> None:
    tested, far = Starvation(), 0.4
    for begun in (0.0, 10.0, 20.0):
        stream = cast(Any, Fresh())
        tested.opened(stream, begun)
        tested.ended(1, begun + 1.0)
        assert not tested.answered(stream, begun + 1.1, far, True)


def test_proofs_wear_off() -> None:
    clock = Clock()
    assert not prove(clock)
    clock.now += starvation.PROOF_LIFE + 1
    assert not prove(clock)
    assert prove(clock)


def test_more_first_bytes_than_ends_show_that_the_service_has_threads() -> None:
    """It was only paused: they come all at once."""
    clock = Clock()
    for _ in range(5):
        streams = clock.open(8)
        assert clock.excess(PATIENCE * 1.1) == 8
        clock.end(2)
        for stream in streams:
            assert not clock.answer(stream)


def test_those_that_are_over_wait_no_more() -> None:
    clock = Clock()
    gone, *waiting = clock.open(3)
    gone.closed = True
    assert clock.excess(1) == 2
    waiting[1].closed = True
    clock.tested.sort_out()
    assert clock.excess() == 1
    clock.tested.forget(waiting[0])
    assert clock.excess() == 0


def test_what_waits_is_bounded_by_what_is_open() -> None:
    """A visitor who opens and leaves, again and again, behind one that waits."""
    clock = Clock()
    clock.open()
    for _ in range(10_000):
        (gone,) = clock.open()
        gone.closed = True
    assert len(clock.tested.waiting) < 200
