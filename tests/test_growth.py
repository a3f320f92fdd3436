"""The rules by which a tunnel gets more sessions, or fewer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.client.growth import (
    FIRST_PAUSE,
    IDLE,
    IN_FLIGHT,
    LONGEST_PAUSE,
    LOOK,
    LOOKS,
    WAITING_LOOKS,
    Gauge,
    Pauses,
)

MIB = 1024 * 1024


def looks(rate: float, round_trip: float, count: int = 2 * LOOKS, up: bool = False) -> list[bool]:
    """What a gauge says at each of ``count`` looks while ``rate`` bytes a second move."""
    gauge = Gauge(100.0)
    said = []
    for number in range(1, count + 1):
        moved = round(rate * LOOK * number)
        received, sent = (moved, 0) if up else (0, moved)
        said.append(gauge.limits(100.0 + LOOK * number, received, sent, round_trip))
    return said


@pytest.mark.parametrize(
    ("rate", "round_trip", "limits"),
    [
        (84 * MIB, 0.050, True),  # 4 MiB in flight: what Linux allows at most
        (25 * MIB, 0.050, True),
        (15 * MIB, 0.050, False),
        (119 * MIB, 0.100, True),  # a line of 1 Gbit/s
        (119 * MIB, 0.001, False),  # … across the street
        (2000 * MIB, 0.004, False),  # loopback, and a process that has just started
        (1 * MIB, 0.300, False),
        (100 * MIB, 0.0, False),  # no round trip is known yet
    ],
)
@pytest.mark.parametrize("up", [False, True])
def test_much_in_flight_limits(rate: float, round_trip: float, limits: bool, up: bool) -> None:
    assert looks(rate, round_trip, up=up) == [False] * (LOOKS - 1) + [limits] * (LOOKS + 1)


def holds(waiting: int, round_trip: float, now: float, rate: float = MIB) -> list[bool]:
    """What a gauge says while that many bytes wait in the kernel."""
    gauge = Gauge(0.0)
    return [
        gauge.limits(LOOK * number, 0, round(rate * LOOK * number), round_trip, waiting, now)
        for number in range(1, 2 * WAITING_LOOKS + 1)
    ]


@pytest.mark.parametrize(
    ("waiting", "round_trip", "now", "limits"),
    [
        (200_000, 0.050, 0.052, True),  # losses, or a small window, with the line far from full
        (17_000, 0.005, 0.005, True),
        (16_000, 0.050, 0.052, False),  # the service is what limits
        (200_000, 0.050, 0.090, False),  # a queue stands: the line is what limits
        (200_000, 0.004, 0.004, False),  # short: a loss costs nothing
        (0, 0.050, 0.0, False),  # the kernel does not tell
    ],
)
def test_bytes_that_wait_here_without_a_queue_on_the_way_limit(
    waiting: int, round_trip: float, now: float, limits: bool
) -> None:
    said = holds(waiting, round_trip, now)
    assert said == [False] * (WAITING_LOOKS - 1) + [limits] * (WAITING_LOOKS + 1)


def test_a_connection_on_which_nothing_moves_is_not_helped_by_another() -> None:
    assert not any(holds(200_000, 0.05, 0.05, rate=0))


def test_one_burst_is_not_enough_and_a_pause_begins_anew() -> None:
    gauge = Gauge(0.0)
    assert not gauge.limits(0.1, 0, 100 * MIB, 0.1)
    assert not gauge.limits(0.2, 0, 100 * MIB, 0.1)
    assert not gauge.limits(0.3, 0, 200 * MIB, 0.1)
    assert gauge.limits(0.4, 0, 300 * MIB, 0.1)


def test_directions_do_not_add_up() -> None:
    gauge = Gauge(0.0)
    for number in range(1, 5):
        moved = round(number * 0.75 * IN_FLIGHT)  # each in a round trip that is as long as a look
        assert not gauge.limits(number * LOOK, moved, moved, LOOK)


def test_a_long_sleep_is_averaged_over() -> None:
    gauge = Gauge(0.0)
    assert not gauge.limits(60.0, 0, 100 * MIB, 0.05)
    assert not gauge.limits(60.0, 0, 200 * MIB, 0.05), "two looks at once tell nothing"


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2**40), st.integers(0, 2**40)), max_size=30))
def test_it_limits_only_after_looks_that_each_found_much(
    steps: list[tuple[float, int, int]],
) -> None:
    gauge = Gauge(0.0)
    now, received, sent, full = 0.0, 0, 0, 0
    for pause, more_received, more_sent in steps:
        now, before = now + pause, now
        received, sent = received + more_received, sent + more_sent
        much = now > before and max(more_received, more_sent) / (now - before) * 0.02 >= IN_FLIGHT
        full = full + 1 if much else 0
        assert gauge.limits(now, received, sent, 0.02) == (full >= LOOKS)
        assert gauge.moving == bool(more_received or more_sent)


def test_a_session_is_idle_when_it_had_no_visitor_for_long() -> None:
    gauge = Gauge(0.0)
    assert not gauge.is_idle(IDLE - 0.1, 0, 0)
    assert gauge.is_idle(IDLE, 0, 0)
    assert not gauge.is_idle(IDLE + 1, 1, 1)
    assert not gauge.is_idle(5 * IDLE, 1, 1), "a visitor who is silent is one"
    assert not gauge.is_idle(6 * IDLE - 0.1, 1, 0)
    assert not gauge.is_idle(6 * IDLE, 2, 0), "one came and left between two looks"
    assert gauge.is_idle(7 * IDLE, 2, 0)


def test_pauses_double_up_to_their_limit() -> None:
    pauses = Pauses()
    now, waits = 100.0, []
    assert pauses.is_over(now)
    for _ in range(9):
        waits.append(pauses.failed(now))
        assert not pauses.is_over(now + waits[-1] - 0.01)
        now += waits[-1]
        assert pauses.is_over(now)
    assert waits == [min(FIRST_PAUSE * 2**step, LONGEST_PAUSE) for step in range(9)]
    assert waits[-1] == LONGEST_PAUSE
    pauses.worked()
    assert pauses.failed(now) == FIRST_PAUSE


def test_attempts_that_failed_together_count_once() -> None:
    pauses = Pauses()
    assert [pauses.failed(100.0 + step) for step in (0, 1, 2)] == [
        FIRST_PAUSE,
        FIRST_PAUSE - 1,
        FIRST_PAUSE - 2,
    ]
    assert pauses.failed(200.0) == 2 * FIRST_PAUSE


def test_a_server_may_ask_for_a_longer_pause_within_bounds() -> None:
    assert Pauses().failed(0.0, asked=60.0) == 60.0
    assert Pauses().failed(0.0, asked=1.0) == FIRST_PAUSE
    assert Pauses().failed(0.0, asked=86400.0) == LONGEST_PAUSE
