"""The receive window of a stream: credit, growth, giving back. The clock is turned by hand."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.flow import CREDIT_STEP, INITIAL_WINDOW, TURNAROUND, WINDOW_CEILING, ReceiveWindow

ROUND_TRIP = 0.1


def test_a_peer_within_its_credit_is_fine_and_one_beyond_it_is_not() -> None:
    window = ReceiveWindow()
    assert window.receive(INITIAL_WINDOW)
    assert not window.receive(1)


def test_bytes_that_wait_here_are_not_credited() -> None:
    window = ReceiveWindow()
    assert window.receive(INITIAL_WINDOW)
    assert window.deliver(100_000)
    assert window.refill(0.0, ROUND_TRIP) == 100_000
    assert window.undelivered == INITIAL_WINDOW - 100_000
    assert window.credit == 100_000


def test_small_deliveries_wait_for_a_quarter_of_the_window() -> None:
    window = ReceiveWindow()
    quarter = INITIAL_WINDOW // 4
    assert window.receive(quarter)
    assert not window.deliver(quarter - 1)
    assert window.deliver(1)


def test_credit_comes_after_a_step_even_in_the_widest_window() -> None:
    window = ReceiveWindow()
    window.size = window.credit = WINDOW_CEILING
    assert window.receive(CREDIT_STEP)
    assert not window.deliver(CREDIT_STEP - 1)
    assert window.deliver(1)
    assert window.refill(0.0, ROUND_TRIP) == CREDIT_STEP


class Path:
    """A sender, a line and a reader, in steps of a millisecond: credit travels back as long as bytes do."""

    STEP = 0.001

    def __init__(self, window: ReceiveWindow, rate: float, round_trip: float) -> None:
        """``rate``: bytes a second that line and reader take."""
        self.window, self.rate, self.round_trip = window, rate, round_trip
        self.now = self.passed = 0.0
        self._allowed = float(window.credit)
        self._bytes: deque[tuple[float, int]] = deque()
        self._credit: deque[tuple[float, int]] = deque()

    def run(self, seconds: float, usual: int = INITIAL_WINDOW) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += self.STEP
            while self._credit and self._credit[0][0] <= self.now:
                self._allowed += self._credit.popleft()[1]
            count = int(min(self._allowed, self.rate * self.STEP))
            self._allowed -= count
            if count:
                self._bytes.append((self.now + self.round_trip / 2, count))
            while self._bytes and self._bytes[0][0] <= self.now:
                self._arrive(self._bytes.popleft()[1], usual)

    def _arrive(self, count: int, usual: int) -> None:
        assert self.window.receive(count)
        self.passed += count
        if self.window.deliver(count):
            increment = self.window.refill(self.now, self.round_trip, usual)
            if increment:
                self._credit.append((self.now + self.round_trip / 2, increment))


def test_the_window_grows_towards_twice_what_the_path_holds() -> None:
    window = ReceiveWindow()
    rate = 50_000_000
    path = Path(window, rate, ROUND_TRIP)
    path.run(5.0)
    assert 1.6 * rate * ROUND_TRIP <= window.size <= 4.4 * rate * ROUND_TRIP


def test_a_long_fast_line_is_full_within_a_second() -> None:
    path = Path(ReceiveWindow(), 125_000_000, ROUND_TRIP)
    path.run(1.0)
    before = path.passed
    path.run(1.0)
    assert path.passed - before >= 0.95 * 125_000_000


def test_what_the_path_is_known_to_hold_is_had_in_a_few_round_trips() -> None:
    window = ReceiveWindow()
    path = Path(window, 125_000_000, ROUND_TRIP)
    path.run(0.1, usual=WINDOW_CEILING)
    assert window.size == INITIAL_WINDOW  # nobody has shown yet that he needs it
    path.run(0.3, usual=WINDOW_CEILING)
    assert window.size == WINDOW_CEILING


def test_whoever_is_slower_than_his_window_keeps_it_whatever_others_need() -> None:
    window = ReceiveWindow()
    path = Path(window, 1_000_000, ROUND_TRIP)
    path.run(3.0, usual=WINDOW_CEILING)
    assert window.size <= 2 * INITIAL_WINDOW


@pytest.mark.parametrize("round_trip", [0.0001, 0.001])
def test_a_short_fast_path_keeps_a_small_window(round_trip: float) -> None:
    window = ReceiveWindow()
    path = Path(window, 1_000_000_000, round_trip)
    path.run(2.0)
    assert window.size <= 4.4 * 1_000_000_000 * max(round_trip, TURNAROUND)


def test_the_window_has_a_ceiling() -> None:
    window = ReceiveWindow()
    now = 0.0
    for _ in range(20):
        before = window.size
        now += ROUND_TRIP
        count = window.credit
        assert window.receive(count)
        window.deliver(count)
        window.refill(now, ROUND_TRIP)
        assert before <= window.size <= WINDOW_CEILING
    assert window.size == WINDOW_CEILING


def test_a_window_does_not_grow_while_bytes_wait() -> None:
    window = ReceiveWindow()
    window.refill(0.0, ROUND_TRIP)  # the first look begins
    assert window.receive(INITIAL_WINDOW)
    window.deliver(INITIAL_WINDOW - 1)
    window.refill(ROUND_TRIP, ROUND_TRIP)
    assert window.size == INITIAL_WINDOW
    window.deliver(1)
    window.refill(ROUND_TRIP, ROUND_TRIP)
    assert window.size > INITIAL_WINDOW


def test_a_window_grows_though_the_rest_of_a_frame_is_still_to_come() -> None:
    window = ReceiveWindow()
    window.refill(0.0, ROUND_TRIP)
    assert window.receive(INITIAL_WINDOW)  # charged as a whole when the frame begins
    window.deliver(INITIAL_WINDOW - 1000)
    window.refill(ROUND_TRIP, ROUND_TRIP, coming=999)  # one byte waits
    assert window.size == INITIAL_WINDOW
    window.refill(ROUND_TRIP, ROUND_TRIP, coming=1000)
    assert window.size > INITIAL_WINDOW


def test_a_slow_reader_does_not_shrink_the_window() -> None:
    window = ReceiveWindow()
    path = Path(window, 50_000_000, ROUND_TRIP)
    path.run(2.0)
    grown = window.size
    path.rate = 100_000
    path.run(2.0)
    assert window.size == grown > INITIAL_WINDOW


def test_a_grown_window_is_given_back_as_the_peer_uses_it_up() -> None:
    window = ReceiveWindow()
    path = Path(window, 50_000_000, ROUND_TRIP)
    path.run(5.0)
    assert window.credit > INITIAL_WINDOW
    window.shrink()
    while window.credit > INITIAL_WINDOW:
        before = window.credit
        count = min(window.credit, 64_000)
        assert window.receive(count)
        window.deliver(count)
        assert window.refill(path.now, ROUND_TRIP) in range(INITIAL_WINDOW + 1)
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
    window = ReceiveWindow()
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
    window = ReceiveWindow()
    now, total = 0.0, 0
    while total < 4 * INITIAL_WINDOW:
        assert window.credit > 0
        now += 0.001
        count = min(piece * 1009, window.credit)
        assert window.receive(count)
        total += count
        if window.deliver(count):
            window.refill(now, round_trip)
