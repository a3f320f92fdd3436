"""A connection that is carried to another process."""

from __future__ import annotations

import socket as native
from collections.abc import Iterator

import gevent
import pytest
from gevent import socket
from helpers import MIB, deadline, socket_pair

from tinytun_gevent.server import ferry as module
from tinytun_gevent.server.ferry import ferry
from tinytun_gevent.sockets import end_of, set_reset

Carried = tuple[socket.socket, socket.socket, "gevent.Greenlet[..., None]"]


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> Iterator[Carried]:
    """The visitor, the process, and what runs between them."""
    monkeypatch.setattr(module, "LOOK", 0.01)
    visitor, ours = socket_pair()
    process, theirs = socket.socketpair(native.AF_UNIX, native.SOCK_STREAM)
    running = gevent.spawn(ferry, end_of(ours), end_of(theirs))
    yield visitor, process, running
    running.kill()
    visitor.close()
    process.close()


def receive(sock: socket.socket, count: int) -> int:
    got = 0
    while got < count and (piece := sock.recv(65536)):
        got += len(piece)
    return got


def test_megabytes_go_both_ways_and_ends_travel(carried: Carried) -> None:
    visitor, process, running = carried
    with deadline():
        senders = [gevent.spawn(sock.sendall, bytes(2 * MIB)) for sock in (visitor, process)]
        readers = [gevent.spawn(receive, sock, 2 * MIB) for sock in (visitor, process)]
        assert [reader.get() for reader in readers] == [2 * MIB] * 2
        gevent.joinall(senders, raise_error=True)
        visitor.shutdown(native.SHUT_WR)
        assert process.recv(1) == b""
        process.sendall(b"answer")
        process.shutdown(native.SHUT_WR)
        assert visitor.recv(10) == b"answer"
        assert visitor.recv(10) == b""
        running.join()


def test_it_ends_when_the_process_has_closed_whatever_the_visitor_does(carried: Carried) -> None:
    visitor, process, running = carried
    with deadline():
        process.sendall(b"last")
        process.close()
        assert visitor.recv(10) == b"last"
        assert visitor.recv(10) == b""
        running.join()


def test_it_goes_on_while_the_process_has_only_half_closed(carried: Carried) -> None:
    visitor, process, running = carried
    with deadline():
        process.shutdown(native.SHUT_WR)
        assert visitor.recv(10) == b""
        gevent.sleep(0.05)
        visitor.sendall(b"more")
        assert process.recv(10) == b"more"
        assert not running.ready()


def test_a_reset_travels(carried: Carried) -> None:
    visitor, process, running = carried
    with deadline():
        set_reset(visitor)
        visitor.close()
        assert process.recv(10) == b""
        running.join()
