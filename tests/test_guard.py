"""What a peer may send for nothing: the figures, and the buckets that they are kept in."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent import guard
from tinytun_gevent.errors import PeerProtocolError
from tinytun_gevent.guard import ENHANCE_YOUR_CALM, FLOW_CONTROL_ERROR, MOMENT, Guard, is_rapid

NOW = 1_000_000.0
"""A machine that has been up for eleven days: floating point has fewer digits left for a moment there."""


def count_until_refused(charge: Callable[[], object]) -> int:
    count = 0

    def charge_on() -> None:
        nonlocal count
        while count < 100_000:
            charge()
            count += 1

    with pytest.raises(PeerProtocolError) as caught:
        charge_on()
    assert caught.value.code == ENHANCE_YOUR_CALM
    return count


# -- what is counted ----------------------------------------------------------


@pytest.mark.parametrize(
    ("charge", "limit"),
    [
        (lambda g: g.reset(NOW), 200),
        (lambda g: g.stray_reset(NOW), 200),
        (lambda g: g.settings(NOW, 1), 64),
        (lambda g: g.settings(NOW, 0), 64),
        (lambda g: g.settings(NOW, 6), 10),
        (lambda g: g.empty_data(NOW), 100),
        (lambda g: g.idle(NOW), 256),
        (lambda g: g.headers(NOW, 10), 200),
        (lambda g: g.stray_data(NOW, 0, ends=False), 100),
        (lambda g: g.stray_data(NOW, 0, ends=True), 100),
        (lambda g: g.continuation(0), 16),
        (lambda g: g.continuation(16384), 2),
    ],
    ids=[
        "resets",
        "resets of what is over",
        "settings",
        "empty SETTINGS",
        "six settings at a time",
        "empty DATA",
        "idle frames",
        "header blocks",
        "empty DATA on what is over",
        "ends of what is over",
        "empty CONTINUATION",
        "long CONTINUATION",
    ],
)
def test_the_limits_are_those_promised(charge: Callable[[Guard], None], limit: int) -> None:
    watched = Guard(NOW)
    assert count_until_refused(lambda: charge(watched)) == limit


def test_a_frame_with_more_settings_than_allowed_is_refused_at_once() -> None:
    with pytest.raises(PeerProtocolError):
        Guard(NOW).settings(NOW, 65)


def test_each_header_block_begins_anew() -> None:
    watched = Guard(NOW)
    for _ in range(50):
        watched.headers(NOW, 16384)
        watched.continuation(16384)


def test_each_stream_brings_its_header_blocks_and_an_end_and_a_reset_that_cross_ours() -> None:
    watched = Guard(NOW)
    for _ in range(10_000):
        watched.opened()
    for _ in range(10_000):  # all at once, after a path has stalled
        for _ in range(guard.BLOCKS_PER_STREAM):
            watched.headers(NOW, 100)
        watched.stray_reset(NOW)
        watched.stray_data(NOW, 0, ends=True)


def test_what_was_under_way_when_we_reset_a_stream_may_come_and_no_more() -> None:
    watched = Guard(NOW)
    watched.abandoned(1000)
    watched.abandoned(-5)  # a window that had shrunk
    watched.stray_data(NOW, 600, ends=False)
    watched.stray_data(NOW, 400, ends=True)
    with pytest.raises(PeerProtocolError) as caught:
        watched.stray_data(NOW, 1, ends=False)
    assert caught.value.code == FLOW_CONTROL_ERROR


def test_no_more_is_under_way_than_a_connection_holds() -> None:
    watched = Guard(NOW)
    for _ in range(1000):
        watched.abandoned(2**25)
    watched.stray_data(NOW, guard.STRAY_BYTES, ends=False)
    with pytest.raises(PeerProtocolError):
        watched.stray_data(NOW, 1, ends=False)


def update(watched: Guard, now: float, sent: int) -> None:
    """As whoever gets a WINDOW_UPDATE does it."""
    watched.updates_left -= 1
    if watched.updates_left < 0:
        watched.updates(now, sent)


def test_window_updates_are_measured_by_what_we_send() -> None:
    """One for each KiB at 1 GiB/s, which is 32 times as many as the most eager of our peers says."""
    watched, sent = Guard(NOW), 0
    for _ in range(200_000):
        sent += 1024
        update(watched, NOW, sent)
    assert count_until_refused(lambda: update(watched, NOW, sent)) <= 2 * guard.UPDATES[0]


def test_window_updates_for_nothing_end_soon() -> None:
    watched = Guard(NOW)
    assert count_until_refused(lambda: update(watched, NOW, 0)) == guard.UPDATES[0]
    watched = Guard(NOW)
    for second in range(100):
        for _ in range(guard.UPDATES[1] // 2):
            update(watched, NOW + second, 0)


# -- rapid resets -------------------------------------------------------------


def test_what_a_rapid_reset_is() -> None:
    assert is_rapid(NOW, math.inf, 0), "not even accepted"
    assert is_rapid(NOW, NOW, 0)
    assert is_rapid(NOW, NOW - 0.9 * MOMENT, 0)
    assert not is_rapid(NOW, NOW - 1.1 * MOMENT, 0)
    assert not is_rapid(NOW, NOW, 1), "it has answered something"


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.booleans())
def test_what_is_no_rapid_reset_for_the_opener_is_none_for_the_acceptor(
    there: float, back: float, life: float, answered: bool
) -> None:
    """However long the path takes in each direction: the acceptor knows of its answer first."""
    accepted = NOW
    opener_knows = accepted + there
    reset_at = opener_knows + life
    arrives_at = reset_at + back
    if not is_rapid(reset_at, opener_knows, answered):
        assert not is_rapid(arrives_at, accepted, answered)


def test_streams_that_went_well_save_up_no_endless_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MOST_SAVED", 1000)
    watched = Guard(NOW)
    for _ in range(2000):
        watched.opened()
    assert count_until_refused(lambda: watched.stray_reset(NOW)) == 1000 + guard.RESETS[0]
    assert count_until_refused(lambda: watched.headers(NOW, 1)) == 1000 + guard.HEADERS[0]
