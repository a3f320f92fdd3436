"""How long a client waits before it tries again, on a clock that the test turns."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tinytun_gevent.client.backoff import EARLY_MAX, FIRST, HANDOVER, LASTING, MAX, SHARE, Backoff


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def backoff(clock: Clock) -> Backoff:
    """One that takes the longest wait that it may take."""
    return Backoff(clock, uniform=lambda low, high: high)


def attempts(backoff: Backoff, clock: Clock, seconds: float) -> list[float]:
    """When the attempts are made during an absence of so long, in seconds since its start."""
    start, seen = clock.now, []
    while clock.now - start < seconds:
        clock.now += backoff.next()
        seen.append(clock.now - start)
    return seen


def test_waits_double_to_two_seconds_within_the_first_thirty(backoff: Backoff, clock: Clock) -> None:
    assert attempts(backoff, clock, 30) == [0.5, 1.5, *(3.5 + 2 * i for i in range(14)), 31.5]


def test_waits_grow_with_the_absence_and_no_further_than_to_the_longest(
    backoff: Backoff, clock: Clock
) -> None:
    seen = attempts(backoff, clock, 3600)
    for before, after in pairwise(seen):
        assert after - before <= max(EARLY_MAX, before / SHARE) + 1e-9
        assert after - before <= MAX + 1e-9
    assert seen[-1] - seen[-2] == pytest.approx(MAX)
    assert len([at for at in seen if at <= 60]) < 30
    assert len(seen) < 60 + 3600 / MAX


@pytest.mark.parametrize("away", [1.0, 10.0, 30.0, 60.0, 75.0])
def test_a_server_that_was_away_for_a_minute_is_reached_within_five_seconds(
    backoff: Backoff, clock: Clock, away: float
) -> None:
    assert attempts(backoff, clock, away)[-1] <= away + 5


def test_waits_are_shortened_at_random_by_up_to_half() -> None:
    seen = []
    for seed in range(200):
        backoff = Backoff(Clock(), random.Random(seed).uniform)
        seen.append([backoff.next() for _ in range(4)][-1])
    assert EARLY_MAX / 2 <= min(seen) < EARLY_MAX * 0.6
    assert EARLY_MAX * 0.9 < max(seen) <= EARLY_MAX


def test_a_connection_that_served_for_a_while_makes_its_loss_a_new_one(
    backoff: Backoff, clock: Clock
) -> None:
    attempts(backoff, clock, 600)
    assert backoff.next() == MAX
    backoff.served(LASTING - 0.1)
    assert backoff.next() == MAX
    backoff.served(LASTING)
    clock.now += 600
    assert [backoff.next(), backoff.next()] == [FIRST, 2 * FIRST]


def test_a_server_that_answers_and_dies_again_and_again_is_asked_less_and_less_often(
    backoff: Backoff, clock: Clock
) -> None:
    start, count = clock.now, 0
    while clock.now - start < 3600:
        count += 1
        clock.now += 1.0  # that long it serves
        backoff.served(1.0)
        clock.now += backoff.next()
    assert count < 250
    assert backoff.next() == MAX


def test_a_goodbye_is_answered_at_once_unless_it_is_said_all_the_time(backoff: Backoff, clock: Clock) -> None:
    backoff.served(1.0)
    assert backoff.hand_over() == HANDOVER
    backoff.served(1.0)
    assert backoff.hand_over() == FIRST
    backoff.served(1.0)
    assert backoff.hand_over() == 2 * FIRST
    backoff.served(LASTING)
    assert backoff.hand_over() == HANDOVER
    assert backoff.next() == FIRST, "the other process is not there yet"


def test_the_way_to_another_process_is_spread_over_the_whole_wait() -> None:
    seen = [Backoff(Clock(), random.Random(seed).uniform).hand_over() for seed in range(100)]
    assert min(seen) < 0.1 * HANDOVER
    assert max(seen) > 0.9 * HANDOVER
