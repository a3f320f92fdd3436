"""How long a slow visitor is waited for: the arithmetic."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.server.pace import Pace


def ends_at(pace: Pace, rate: float, seconds: int, waiting: bool = True) -> int:
    """The second at which patience ends with ``rate`` bytes in each; 0 if it does not."""
    for second in range(1, seconds + 1):
        if pace.look(float(second), int(rate * second), waiting):
            return second
    return 0


def test_a_stall_is_waited_for_as_long_as_grace_lasts() -> None:
    assert ends_at(Pace(240, 20, 0.0), 0, 100) == 22  # the first look only begins to count


def test_the_rate_that_is_asked_for_is_enough() -> None:
    assert ends_at(Pace(240, 20, 0.0), 240, 10_000) == 0


def test_a_little_less_is_not_in_the_long_run() -> None:
    assert 200 < ends_at(Pace(240, 20, 0.0), 220, 10_000) < 300


def test_whoever_is_not_waited_for_may_take_any_time() -> None:
    assert ends_at(Pace(240, 20, 0.0), 0, 10_000, waiting=False) == 0


def test_whoever_was_fast_may_not_stall_the_longer_for_it() -> None:
    pace = Pace(240, 20, 0.0)
    assert not pace.look(1.0, 1_000_000_000, False)
    assert not pace.look(2.0, 1_000_000_000, True)
    assert not pace.look(22.0, 1_000_000_000, True)
    assert pace.look(22.1, 1_000_000_000, True)


def test_progress_gives_time_back() -> None:
    pace = Pace(100, 20, 0.0)
    pace.look(0.0, 0, True)
    assert not pace.look(19.0, 0, True)
    assert not pace.look(19.5, 500, True)  # 5 s more
    assert not pace.look(24.9, 500, True)
    assert pace.look(26.0, 500, True)


def test_what_passed_before_is_no_progress() -> None:
    pace = Pace(100, 20, 0.0, count=1_000_000)
    pace.look(0.0, 1_000_000, True)
    assert pace.look(20.1, 1_000_000, True)


def test_the_time_between_two_waits_does_not_count() -> None:
    """A look that finds nobody waiting says nothing of the time before it, nor of that after it."""
    pace = Pace(240, 20, 0.0)
    for second in range(0, 1000, 2):
        assert not pace.look(second, 0, True)
        assert not pace.look(second + 1, 0, False)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(240, 10_000), max_size=40))
def test_nobody_who_keeps_up_is_ever_cut_off(seconds: list[int]) -> None:
    pace, sent = Pace(240, 20, 0.0), 0
    for second, count in enumerate(seconds, 1):
        sent += count
        assert not pace.look(second, sent, True)
