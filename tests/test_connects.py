"""How often one address may connect."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import gevent
import pytest
from helpers import deadline, socket_pair

from tinytun_gevent.server import connects as module
from tinytun_gevent.server.connects import Connects
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.sockets import PlainEnd, set_reset

PROXY = "192.0.2.99"


class Moment:
    """A clock that stands still, and waits that are over at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        #: The waits so far, in seconds.
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        gevent.sleep(0)


@pytest.fixture(autouse=True)
def moment(monkeypatch: pytest.MonkeyPatch) -> Moment:
    moment = Moment()
    monkeypatch.setattr(module, "time", moment)
    mine = SimpleNamespace(sleep=moment.sleep, with_timeout=gevent.with_timeout)
    monkeypatch.setattr(module, "gevent", mine)
    return moment


def make(rate: int = 10, burst: int = 3, patience: float = 1.0) -> tuple[Connects, Tally]:
    tally = Tally()
    return Connects(rate, burst, patience, lambda ip: ip == PROXY, tally), tally


def test_a_burst_may_come_and_then_the_rate() -> None:
    connects, tally = make(rate=1)
    assert [connects.admit("192.0.2.1") for _ in range(4)] == [0, 0, 0, 1]
    assert connects.admit("192.0.2.2") == 0
    assert tally.refusals[Refusal.CONNECTS] == 1


def test_the_time_to_wait_is_told_in_whole_seconds(moment: Moment) -> None:
    connects, _ = make(rate=1, burst=1)
    connects.admit("192.0.2.1")
    connects._bucket("192.0.2.1").charge(moment.now, 5)
    assert connects.admit("192.0.2.1") == 6
    moment.now += 4.5
    assert connects.admit("192.0.2.1") == 2
    moment.now += 1.5
    assert connects.admit("192.0.2.1") == 0


def test_a_trusted_proxy_is_not_counted() -> None:
    connects, tally = make()
    assert not any(connects.admit(PROXY) for _ in range(100))
    assert all(connects.wait_turn(PROXY) for _ in range(100))
    assert not tally.refusals
    assert len(connects) == 0


def test_addresses_of_one_ipv6_network_count_as_one() -> None:
    connects, _ = make(rate=1, burst=1)
    assert connects.admit("2001:db8::1") == 0
    assert connects.admit("2001:db8::ffff:1") == 1
    assert connects.admit("2001:db8:0:1::1") == 0


def test_no_more_addresses_are_remembered_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 3)
    connects, _ = make(rate=1, burst=1)
    for last in range(10):
        assert connects.admit("192.0.2.1") == (1 if last else 0)  # used all the time, so never forgotten
        connects.admit(f"192.0.3.{last}")
        assert len(connects) <= 3
    assert connects.admit("192.0.3.0") == 0  # forgotten


def test_of_many_who_are_turned_away_one_may_be_gone_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOLD", 0)
    connects, _ = make()
    one, other = socket_pair()
    set_reset(other)
    other.close()
    end = PlainEnd(one)
    with deadline():
        end.wait_readable()
        connects.turn_away(end, 1)
    end.close()


def test_who_comes_too_often_waits_for_his_turn(moment: Moment) -> None:
    connects, tally = make(rate=20, burst=1)
    with deadline():
        greenlets = [gevent.spawn(connects.wait_turn, "192.0.2.1") for _ in range(4)]
        assert connects.wait_turn("192.0.2.2")
        gevent.joinall(greenlets)
    assert all(greenlet.get() for greenlet in greenlets)
    assert moment.slept == [0.05, 0.1, 0.15]
    assert not tally.refusals


def test_nobody_waits_for_longer_than_the_patience() -> None:
    connects, tally = make(rate=10, burst=1, patience=0.25)
    with deadline():
        greenlets = [gevent.spawn(connects.wait_turn, "192.0.2.1") for _ in range(10)]
        gevent.joinall(greenlets)
    assert sum(greenlet.get() for greenlet in greenlets) == 3
    assert tally.refusals[Refusal.CONNECTS] == 7


def test_so_many_wait_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_HELD", 2)
    connects, _ = make(rate=20, burst=1, patience=10)
    with deadline():
        greenlets = [gevent.spawn(connects.wait_turn, "192.0.2.1") for _ in range(10)]
        gevent.joinall(greenlets)
    assert sum(greenlet.get() for greenlet in greenlets) == 3


def test_the_log_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    connects, _ = make(rate=1, burst=1)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            connects.admit("192.0.2.1")
    assert [record.getMessage() for record in caplog.records] == [
        "an address of visitors has reached a limit: connects"
    ]
