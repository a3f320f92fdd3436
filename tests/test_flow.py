"""The receive window of a stream: credit, growth, giving back. The clock is turned by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.flow import CREDIT_STEP, INITIAL_WINDOW, WINDOW_CEILING, ReceiveWindow

ROUND_TRIP = 0.1


def test_a_peer_within_its_credit_is_fine_and_one_beyond_it_is_not() -> None:
    window = ReceiveWindow(0.0)
    assert window.receive(INITIAL_WINDOW)
    assert not window.receive(1)


def test_bytes_that_wait_here_are_not_credited() -> None:
    window = ReceiveWindow(0.0)
    assert window.receive(INITIAL_WINDOW)
    assert window.deliver(100_000)
    assert window.refill(0.0, ROUND_TRIP) == 100_000
    assert window.undelivered == INITIAL_WINDOW - 100_000
    assert window.credit == 100_000


def test_small_deliveries_wait_for_a_quarter_of_the_window() -> None:
    window = ReceiveWindow(0.0)
    quarter = INITIAL_WINDOW // 4
    assert window.receive(quarter)
    assert not window.deliver(quarter - 1)
    assert window.deliver(1)


def test_credit_comes_after_a_step_even_in_the_widest_window() -> None:
    window = ReceiveWindow(0.0)
    window.size = window.credit = WINDOW_CEILING
    assert window.receive(CREDIT_STEP)
    assert not window.deliver(CREDIT_STEP - 1)
    assert window.deliver(1)
    assert window.refill(0.0, ROUND_TRIP) == CREDIT_STEP


def drive(window: ReceiveWindow, start: float, seconds: float, rate: float, round_trip: float) -> float:
    """A peer that sends and a reader that takes ``rate`` bytes a second, whatever the window allows."""
    now, step = start, 0.005
    while now < start + seconds:
        now += step
        count = min(window.credit, int(rate * step))
        assert window.receive(count)
        if window.deliver(count):
            window.refill(now, round_trip)
    return now


def test_the_window_grows_towards_twice_what_the_path_holds() -> None:
    window = ReceiveWindow(0.0)
    rate = 50_000_000
    drive(window, 0.0, 5.0, rate, ROUND_TRIP)
    assert 1.6 * rate * ROUND_TRIP <= window.size <= 2.2 * rate * ROUND_TRIP


def test_a_short_fast_path_keeps_the_first_window() -> None:
    window = ReceiveWindow(0.0)
    drive(window, 0.0, 2.0, 1_000_000_000, 0.0001)
    assert window.size == INITIAL_WINDOW


def test_the_window_at_most_doubles_at_a_time_and_has_a_ceiling() -> None:
    window = ReceiveWindow(0.0)
    now = 0.0
    for _ in range(20):
        before = window.size
        now += ROUND_TRIP
        count = window.credit
        assert window.receive(count)
        window.deliver(count)
        window.refill(now, ROUND_TRIP)
        assert before <= window.size <= min(2 * before, WINDOW_CEILING)
    assert window.size == WINDOW_CEILING


def test_a_window_does_not_grow_while_bytes_wait_or_when_told_not_to() -> None:
    window = ReceiveWindow(0.0)
    assert window.receive(INITIAL_WINDOW)
    window.deliver(INITIAL_WINDOW - 1)
    window.refill(ROUND_TRIP, ROUND_TRIP)
    assert window.size == INITIAL_WINDOW
    window.deliver(1)
    window.refill(ROUND_TRIP, ROUND_TRIP, grow=False)
    assert window.size == INITIAL_WINDOW
    window.refill(ROUND_TRIP, ROUND_TRIP)
    assert window.size == 2 * INITIAL_WINDOW


def test_a_slow_reader_does_not_shrink_the_window() -> None:
    window = ReceiveWindow(0.0)
    now = drive(window, 0.0, 2.0, 50_000_000, ROUND_TRIP)
    grown = window.size
    drive(window, now, 2.0, 100_000, ROUND_TRIP)
    assert window.size == grown > INITIAL_WINDOW


def test_a_grown_window_is_given_back_as_the_peer_uses_it_up() -> None:
    window = ReceiveWindow(0.0)
    now = drive(window, 0.0, 5.0, 50_000_000, ROUND_TRIP)
    assert window.credit > INITIAL_WINDOW
    window.shrink(now)
    while window.credit > INITIAL_WINDOW:
        before = window.credit
        count = min(window.credit, 64_000)
        assert window.receive(count)
        window.deliver(count)
        assert window.refill(now, ROUND_TRIP) in range(INITIAL_WINDOW + 1)
        assert window.credit <= before
    assert window.credit + window.undelivered <= INITIAL_WINDOW


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2 * INITIAL_WINDOW),  # bytes the peer sends, as far as it may
            st.floats(0, 1),  # which part of what waits is delivered
            st.floats(0, 0.5),  # seconds that pass
            st.booleans(),
        ),
        max_size=60,
    ),
    st.floats(0.00001, 1),
)
def test_whatever_happens_credit_and_backlog_fit_the_window(
    steps: list[tuple[int, float, float, bool]], round_trip: float
) -> None:
    window = ReceiveWindow(0.0)
    now, credited, received = 0.0, INITIAL_WINDOW, 0
    for wanted, part, seconds, grow in steps:
        now += seconds
        count = min(wanted, window.credit)
        assert window.receive(count)
        received += count
        delivered = int(window.undelivered * part)
        if window.deliver(delivered):
            increment = window.refill(now, round_trip, grow)
            assert increment >= 0
            credited += increment
        assert window.credit == credited - received
        assert 0 <= window.credit + window.undelivered <= window.size <= WINDOW_CEILING


@given(st.integers(1, INITIAL_WINDOW), st.floats(0.00001, 1))
def test_a_reader_that_takes_everything_never_starves_its_peer(piece: int, round_trip: float) -> None:
    window = ReceiveWindow(0.0)
    now, total = 0.0, 0
    while total < 4 * INITIAL_WINDOW:
        assert window.credit > 0
        now += 0.001
        count = min(piece * 1009, window.credit)
        assert window.receive(count)
        total += count
        if window.deliver(count):
            window.refill(now, round_trip)
