"""When a silent peer counts as dead. The clock is turned by hand."""

from __future__ import annotations

import pytest

from tinytun_gevent.liveness import PATIENCE, QUIET, RECENT, Liveness, Pauses, waking_time

PING = 17  # bytes of a PING frame


def test_a_quiet_peer_is_asked_before_it_is_given_up() -> None:
    live = Liveness(0.0)
    assert live.next_check() == QUIET
    assert not live.is_dead(1000.0)  # it owes no answer


def test_a_peer_that_owes_an_answer_and_gives_no_sign_is_dead_in_time() -> None:
    live = Liveness(0.0)
    live.pinged(QUIET, acknowledged=500, behind=PING)
    live.acknowledged(QUIET + 1, 500)
    assert live.next_check() == QUIET + PATIENCE
    assert not live.is_dead(QUIET + PATIENCE - 0.001)
    assert live.is_dead(QUIET + PATIENCE)
    assert QUIET + PATIENCE < 10.0  # what the documentation promises


def test_an_answer_ends_the_wait() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, 0, PING)
    live.arrived(4.5)
    live.answered()
    assert not live.awaited
    assert not live.is_dead(1000.0)
    assert live.next_check() == 4.5 + QUIET


def test_any_byte_is_a_sign_of_life_while_the_answer_is_late() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, 0, PING)
    for now in range(5, 60, 4):
        assert not live.is_dead(now)
        live.arrived(now)
    assert live.awaited
    assert live.is_dead(57 + PATIENCE)


def test_acknowledgements_count_while_the_ping_is_behind_a_bulk_transfer() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=1_000_000, behind=4_000_000 + PING)
    now, acknowledged = 4.0, 1_000_000
    while acknowledged < 5_000_000:
        now, acknowledged = now + 1.0, acknowledged + 125_000
        assert not live.is_dead(now)
        live.acknowledged(now, acknowledged)
    assert now > 30.0
    live.acknowledged(now + 1, 5_000_000 + PING)
    assert not live.is_dead(now + PATIENCE)


def test_acknowledgements_do_not_count_once_they_cover_the_ping() -> None:
    """A stopped process's kernel goes on acknowledging what visitors send."""
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=0, behind=PING)
    live.acknowledged(4.1, PING)
    for now in range(5, 10):
        live.acknowledged(now, PING + now * 100_000)
    assert live.is_dead(4.1 + PATIENCE)


def test_the_acknowledgement_that_covers_the_ping_is_the_last_that_counts() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=0, behind=1000)
    live.acknowledged(6.0, 5000)
    assert live.next_check() == 6.0 + PATIENCE
    live.acknowledged(7.0, 9000)
    assert live.next_check() == 6.0 + PATIENCE


def test_acknowledgements_that_stand_still_are_no_sign() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=7000, behind=100_000)
    for now in (5.0, 6.0, 7.0, 8.0):
        live.acknowledged(now, 7000)
    assert live.is_dead(4.0 + PATIENCE)


def test_a_new_ping_is_covered_anew() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, 0, PING)
    live.acknowledged(4.1, PING)
    live.arrived(4.2)
    live.answered()
    live.pinged(8.2, acknowledged=PING, behind=50_000)
    live.acknowledged(9.2, 20_000)
    assert live.next_check() == 9.2 + PATIENCE


@pytest.mark.parametrize("count", [None, 0, 10**9])
def test_a_kernel_that_does_not_tell_leaves_the_answer_alone_to_count(count: int | None) -> None:
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=None, behind=PING)
    live.acknowledged(6.0, count)
    assert live.is_dead(4.0 + PATIENCE)


def test_a_count_that_becomes_unknown_changes_nothing() -> None:
    live = Liveness(0.0)
    live.pinged(4.0, acknowledged=0, behind=5000)
    live.acknowledged(5.0, None)
    assert live.next_check() == 4.0 + PATIENCE


# -- when this process did not run --------------------------------------------


def test_looks_in_time_are_no_pause() -> None:
    pauses = Pauses(0.0)
    for second in range(0, 60, int(QUIET)):
        pauses.look(second)
        assert pauses.since(second + 1) == 0


def test_a_pause_explains_what_happens_soon_after_it() -> None:
    pauses = Pauses(100.0)
    pauses.look(104.0)
    assert pauses.since(149.0) == 45.0
    pauses.look(152.0)
    assert pauses.since(154.0) == 50.0
    for second in range(156, 180, 2):
        pauses.look(second)
    assert pauses.since(149.0 + RECENT) == 0


def test_the_clock_goes_on() -> None:
    before = waking_time()
    assert waking_time() >= before
