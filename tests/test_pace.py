"""How long a slow visitor is waited for: the arithmetic."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.server import pace as pace_module
from tinytun_gevent.server.pace import SENDING_GRACE, Pace, Pause, Sending


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


def test_what_was_overdue_for_an_hour_is_made_good_by_a_fast_second() -> None:
    pace = Pace(100, 20, 0.0)
    assert [pace.look(float(second), 0, True) for second in (0, 3600)] == [False, True]
    assert pace.look(3601.0, 99, True)
    assert not pace.look(3602.0, 300, True)


def test_a_pause_is_as_long_as_nothing_comes_from_who_is_waited_for() -> None:
    pause = Pause(60, 0.0)
    assert not pause.look(60.0, 0, True)
    assert pause.look(60.1, 0, True)
    assert not pause.look(61.0, 1, True)  # a byte
    assert not pause.look(121.0, 1, True)
    assert not pause.look(122.0, 1, False)  # the service does not read
    assert not pause.look(182.0, 1, True)
    assert pause.look(182.1, 1, True)


def test_a_slow_body_gives_way_only_to_those_who_wait() -> None:
    """As `curl -T -` sends it: a line every eight seconds."""
    sending, wanted = Sending(240, 0.0), False
    for second in range(1, 1000):
        assert not sending.look(float(second), second // 8 * 20, True, lambda: wanted)
    wanted = True
    assert sending.look(1000.0, 1000 // 8 * 20, True, lambda: wanted)


def test_a_body_that_comes_fast_enough_gives_way_to_nobody() -> None:
    sending = Sending(240, 0.0)
    for second in range(1, 1000):
        assert not sending.look(float(second), second * 240, True, lambda: True)


def test_a_body_that_pauses_for_too_long_is_given_up_in_any_case() -> None:
    sending, over = Sending(240, 0.0), 0
    while not sending.look(float(over), 0, True, lambda: False):
        over += 1
    assert over == int(pace_module.BODY_PAUSE) + 1


def test_whoever_waits_for_a_place_is_asked_about_only_when_it_matters() -> None:
    asked: list[int] = []
    sending = Sending(240, 0.0)
    for second in range(1, int(SENDING_GRACE) + 2):
        sending.look(float(second), 0, True, lambda second=second: bool(asked.append(second)))  # type: ignore[misc]
    assert asked == []
    sending.look(SENDING_GRACE + 2, 0, True, lambda: bool(asked.append(0)))
    assert asked == [0]


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
