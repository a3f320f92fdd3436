"""Fair shares of a busy server: the rule by itself, and real programs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from helpers import deadline

from tinytun_gevent import shares as module
from tinytun_gevent.shares import Share, Shares

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peers.ours import Tinytun
from benchmarks.processes import Workspace
from benchmarks.shares import measure, start_service

TURN = 64 * 1024


def run(share: Share, until: float, between: Callable[[], None]) -> int:
    """Moves turn after turn, with something to do between them; how many bytes."""
    moved = 0
    while time.monotonic() < until:
        share.took(TURN)
        moved += TURN
        between()
        if share.ahead:
            share.wait()
    return moved


def work(seconds: float) -> Callable[[], None]:
    """Uses the processor, which all share, for so long, and lets the others have a turn."""

    def use() -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        gevent.sleep(0)

    return use


def compete(*between: Callable[[], None], seconds: float = 0.5) -> list[int]:
    shares = Shares()
    until = time.monotonic() + seconds
    with deadline():
        greenlets = [gevent.spawn(run, Share(shares), until, rest) for rest in between]
        gevent.joinall(greenlets, raise_error=True)
    return [greenlet.get() for greenlet in greenlets]


def often(times: int) -> Callable[[], None]:
    """One that gets a turn only each so many rounds of the loop, as one of many sockets that are ready."""
    use = work(0.0001)

    def rest() -> None:
        for _ in range(times):
            gevent.sleep(0)
        use()

    return rest


def test_one_that_has_more_turns_gets_no_more() -> None:
    moved = compete(often(0), often(4), often(9))
    assert max(moved) < 1.5 * min(moved), moved  # in so short a time; without the rule it is ten times


def test_what_has_to_be_shared_is_not_wasted() -> None:
    alone = compete(often(0))[0]
    together = sum(compete(often(0), often(4)))
    assert together > 0.7 * alone


def test_nobody_waits_for_a_slow_path() -> None:
    def slowly() -> None:
        gevent.sleep(0.005)  # 13 MB a second, whatever the others do

    alone = compete(work(0.0002))[0]
    fast, slow = compete(work(0.0002), slowly)
    assert fast > 0.6 * alone
    assert slow < 0.3 * fast


def test_a_slow_path_among_several_hurts_no_fairness() -> None:
    def slowly() -> None:
        gevent.sleep(0.005)

    one, other, _ = compete(often(0), often(5), slowly)
    assert one < 1.6 * other


def test_one_alone_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Share, "wait", lambda self: pytest.fail("waited"))
    compete(work(0), seconds=0.1)


def test_one_that_was_away_begins_where_the_others_are() -> None:
    shares = Shares()
    old, new = Share(shares), Share(shares)
    for _ in range(1000):
        old.took(TURN)
    until = time.monotonic() + 2 * module.ABSENT
    with deadline():
        moved = [gevent.spawn(run, share, until, work(0.0001)) for share in (new, old)]
        gevent.joinall(moved)
    assert moved[0].get() < 2 * moved[1].get()
    assert moved[1].get() < 2 * moved[0].get()


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    with Workspace() as workspace:
        yield workspace


def test_eight_tunnels_get_an_eighth_each(workspace: Workspace) -> None:
    """Downloads, where the operating system and the windows decide otherwise."""
    shares = measure(Tinytun("http"), workspace, start_service(workspace), [1] * 8, False, 1.0, 0.5)
    low, high = shares.spread
    assert low > 0.8, shares
    assert high < 1.2, shares


def test_a_hundred_visitors_get_no_more_than_two_shares(workspace: Workspace) -> None:
    """Uploads, where each visitor has turns of his own."""
    crowd, one = measure(Tinytun("tcp"), workspace, start_service(workspace), [100, 1], True, 1.0, 0.5).rates
    assert crowd < 2 * one
