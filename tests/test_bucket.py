"""A token bucket's arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.bucket import ROUNDING, Bucket

RATES = st.floats(0.1, 1e9)
COUNTS = st.floats(0, 1)
"""Parts of the burst."""


def test_the_burst_comes_at_once_and_the_rest_at_the_rate() -> None:
    bucket = Bucket(10, 3)
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait(100.0) == pytest.approx(0.1)
    assert not bucket.take(100.09)
    assert bucket.take(100.1)
    assert not bucket.take(100.1)


def test_no_rate_is_no_limit() -> None:
    bucket = Bucket(0, 0)
    assert all(bucket.take(1.0, 1e12) for _ in range(3))
    bucket.charge(1.0, 5)
    bucket.refund(5)
    assert bucket.is_full(1.0)


def test_what_is_given_back_may_be_taken_again() -> None:
    bucket = Bucket(10, 3)
    assert bucket.take(1.0, 3)
    assert not bucket.is_full(1.0)
    bucket.refund(2)
    assert bucket.take(1.0, 2)
    assert not bucket.take(1.0, 1)


def test_a_debt_is_waited_for() -> None:
    bucket = Bucket(10, 3)
    bucket.charge(1.0, 13)
    assert bucket.wait(1.0, 1) == pytest.approx(1.1)


def test_other_figures_leave_what_was_taken() -> None:
    bucket = Bucket(10, 10)
    bucket.take(1.0, 10)
    bucket.change(20, 20, 1.0)
    assert bucket.take(1.0, 10)
    assert not bucket.take(1.0, 1)
    bucket.change(0, 0, 1.0)
    assert bucket.take(1.0, 1000)
    bucket.change(1, 5, 1.0)
    assert bucket.take(1.0, 5)
    assert not bucket.take(1.0, 1)


@settings(max_examples=200, deadline=None)
@given(RATES, st.floats(0.01, 10), st.lists(st.tuples(st.floats(0, 5), COUNTS), max_size=60))
def test_never_more_than_the_rate_and_one_burst(
    rate: float, seconds: float, steps: list[tuple[float, float]]
) -> None:
    """In any span of time, whoever takes what whenever, and no wait is negative or too short."""
    burst = rate * seconds
    bucket, now, taken = Bucket(rate, burst), 1000.0, []
    for pause, part in steps:
        now += pause
        count = burst * part
        wait = bucket.wait(now, count)
        assert wait >= 0
        assert bucket.take(now, count) == (wait == 0)
        if wait:
            now += wait * (1 + 1e-9) + 1e-9
            assert bucket.take(now, count)
        taken.append((now, count))
    for first in range(len(taken)):
        total = 0.0
        for at, count in taken[first:]:
            total += count
            most = rate * (at - taken[first][0]) + burst
            assert total <= most * (1 + 1e-6) + rate * 2 * ROUNDING


@settings(max_examples=100, deadline=None)
@given(RATES, st.lists(st.floats(0, 3), max_size=20))
def test_nothing_that_is_allowed_is_withheld(rate: float, pauses: list[float]) -> None:
    """Whoever waits as long as he is told gets exactly the rate."""
    bucket, now = Bucket(rate, rate), 1000.0
    bucket.charge(now, rate)
    for _ in pauses:
        wait = bucket.wait(now, rate)
        assert wait == pytest.approx(1.0, rel=1e-3)
        now += wait * (1 + 1e-12) + 1e-9
        assert bucket.take(now, rate)


def test_so_many_at_once_and_so_many_a_second() -> None:
    bucket = Bucket(33, 200)
    assert sum(bucket.take(1000.0) for _ in range(1000)) == 200
    assert sum(bucket.take(1000.0 + 1) for _ in range(1000)) == 33
    assert sum(bucket.take(1000.0 + 2) for _ in range(1000)) == 33
    assert sum(bucket.take(1000.0 + 1000) for _ in range(1000)) == 200


def test_what_is_refused_is_not_charged() -> None:
    bucket = Bucket(1, 10)
    assert not bucket.take(1000.0, 11)
    assert bucket.take(1000.0, 10)


@given(
    st.integers(1, 40),
    st.sampled_from([1, 2, 8, 64]),
    st.lists(st.tuples(st.integers(0, 640), st.integers(1, 60)), max_size=12),
)
def test_it_is_the_bucket_of_the_textbook(burst: int, rate: int, asked: list[tuple[int, int]]) -> None:
    """Times are 64ths of a second, which floating point has exactly."""
    bucket, now, tokens = Bucket(rate, burst), 1000.0, float(burst)
    for pause, count in asked:
        now += pause / 64
        tokens = min(burst, tokens + pause / 64 * rate)
        for _ in range(count):
            granted = bucket.take(now)
            assert granted == (tokens >= 1)
            tokens -= granted
