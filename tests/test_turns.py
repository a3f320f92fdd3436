"""Turns on a session: the order of asking, and greenlets that are killed while they wait."""

from __future__ import annotations

import gevent
import pytest
from helpers import deadline, socket_pair, wait_until

from tinytun_gevent.turns import TurnLock, let_others_run


def test_turns_are_given_in_the_order_of_asking() -> None:
    lock, order = TurnLock(), []
    lock.acquire()

    def take(number: int) -> None:
        lock.acquire()
        order.append(number)
        gevent.sleep(0)
        lock.release()

    takers = [gevent.spawn(take, number) for number in range(8)]
    wait_until(lambda: len(lock._waiting) == 8)
    assert lock.wanted
    lock.release()
    with deadline():
        gevent.joinall(takers, raise_error=True)
    assert order == list(range(8))
    assert not lock.held


@pytest.mark.parametrize("moment", ["before its turn", "as its turn comes", "with its turn"])
def test_a_killed_waiter_loses_no_turn(moment: str) -> None:
    lock = TurnLock()
    lock.acquire()

    def take() -> None:
        lock.acquire()
        try:
            gevent.sleep(0)
        finally:
            lock.release()

    victim, taker = gevent.spawn(take), gevent.spawn(take)
    wait_until(lambda: len(lock._waiting) == 2)
    if moment == "before its turn":
        victim.kill()
        lock.release()
    elif moment == "as its turn comes":
        victim.kill(block=False)
        lock.release()
    else:
        lock.release()
        victim.kill(block=False)
    with deadline():
        gevent.joinall([victim, taker])
    assert taker.successful()
    assert not lock.held




def test_a_greenlet_that_lets_others_run_waits_for_each_socket_that_is_ready() -> None:
    """Which ``gevent.sleep(0)`` does not: it looks at sockets when 5 ms are over."""
    one, other = socket_pair()
    got = []

    def read() -> None:
        for _ in range(3):
            got.append(other.recv(1))
            one.send(b"x")

    reader = gevent.spawn(read)
    one.send(b"x")
    rounds = 0
    with deadline():
        while not reader.ready():
            let_others_run()
            rounds += 1
    assert got == [b"x"] * 3
    assert rounds <= 8
    one.close()
    other.close()
