"""What is handed on after a turn of the event loop: never before its sockets were served."""

from __future__ import annotations

import socket

import gevent
from gevent.event import Event
from gevent.socket import wait_read
from support import DEADLINE

from tinytun_gevent.server.next_turn import NextTurn


def test_items_come_in_order_and_once() -> None:
    got: list[list[int]] = []
    turn: NextTurn[int] = NextTurn(got.append)
    for number in range(3):
        turn.add(number)
    assert got == []
    for _ in range(5):
        gevent.sleep(0.001)
    assert got == [[0, 1, 2]]


def test_what_was_readable_when_an_item_came_is_read_before() -> None:
    """Whichever of the two the loop looks at first."""
    for late in (False, True):
        here, there = socket.socketpair()
        with here, there:
            order: list[str] = []
            done = Event()

            def deliver(items: list[str], order: list[str] = order, done: Event = done) -> None:
                order.extend(items)
                done.set()

            def read(here: socket.socket = here, order: list[str] = order) -> None:
                wait_read(here.fileno())
                order.append("read")

            turn: NextTurn[str] = NextTurn(deliver)
            reader = gevent.spawn(read)
            gevent.sleep(0.001)  # it waits
            if late:
                turn.add("item")
            there.send(b"x")
            if not late:
                turn.add("item")
            assert done.wait(DEADLINE)
            reader.join(DEADLINE)
            assert order == ["read", "item"]


def test_items_that_come_meanwhile_have_a_turn_of_their_own() -> None:
    got: list[list[int]] = []
    done = Event()

    def deliver(items: list[int]) -> None:
        got.append(items)
        if items[0] < 3:
            turn.add(items[0] + 1)
        else:
            done.set()

    turn: NextTurn[int] = NextTurn(deliver)
    turn.add(0)
    assert done.wait(DEADLINE)
    assert got == [[0], [1], [2], [3]]
