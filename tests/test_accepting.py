"""Accepting when the process has run out of descriptors."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer
from helpers import deadline, wait_until

from tinytun_gevent.server import accepting
from tinytun_gevent.server.accepting import Acceptor
from tinytun_gevent.sockets import BareSocket
from tinytun_gevent.workers import Workers


def listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    sock.setblocking(False)
    return sock


def test_a_lack_of_descriptors_is_waited_out_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    accept = StreamServer.do_read
    tries = 0

    def starved(server: StreamServer) -> Any:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise OSError(errno.EMFILE, "nothing left")
        return accept(server)

    monkeypatch.setattr(StreamServer, "do_read", starved)
    monkeypatch.setattr(accepting, "PAUSE", 0.05)
    caplog.set_level(logging.INFO)
    server = Acceptor(listening(), lambda sock, _: sock.sendall(b"at last"), Workers(), 100)
    server.start()
    try:
        with deadline(), socket.socket() as visitor:
            visitor.connect(("127.0.0.1", server.server_port))
            assert visitor.recv(10) == b"at last"
    finally:
        server.stop()
    assert tries >= 4
    assert [record.getMessage() for record in caplog.records] == [
        "no connection can be accepted: Too many open files"
    ]
    assert "Traceback" not in capsys.readouterr().err


def test_nothing_is_accepted_while_it_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    def starved(server: StreamServer) -> Any:
        nonlocal tries
        tries += 1
        raise OSError(errno.EMFILE, "nothing left")

    monkeypatch.setattr(StreamServer, "do_read", starved)
    monkeypatch.setattr(accepting, "PAUSE", 60.0)
    server = Acceptor(listening(), lambda sock, _: None, Workers(), 100)
    server.start()
    try:
        with deadline(), socket.socket() as visitor:
            visitor.connect(("127.0.0.1", server.server_port))
            while not tries:
                gevent.sleep(0)
            for _ in range(100):
                gevent.idle()
    finally:
        server.stop()
    assert tries == 1


@pytest.mark.parametrize("raw", [False, True])
def test_no_more_are_served_at_once_than_may_be(raw: bool) -> None:
    served: list[Any] = []
    leave = Event()

    def handle(sock: Any, _: Any) -> None:
        served.append(sock)
        leave.wait()

    server = Acceptor(listening(), handle, Workers(), 2, raw=raw)
    server.start()
    visitors = []
    try:
        with deadline():
            for _ in range(3):
                visitor = socket.create_connection(("127.0.0.1", server.server_port))
                visitors.append(visitor)
            while len(served) < 2:
                gevent.sleep(0.01)
            for _ in range(100):
                gevent.idle()
            assert (len(served), server.connections) == (2, 2)
            leave.set()  # the third is accepted as soon as there is room
            while len(served) < 3 or server.connections:
                gevent.sleep(0.01)
            for visitor in visitors:
                assert visitor.recv(1) == b""  # closed when its handler returned
    finally:
        server.close()
        for visitor in visitors:
            visitor.close()


def test_a_raw_socket_is_what_the_data_path_wants() -> None:
    kinds: list[Any] = []
    handle = lambda sock, _: kinds.append((type(sock), sock.gettimeout()))  # noqa: E731
    server = Acceptor(listening(), handle, Workers(), 1, raw=True)
    server.start()
    try:
        with deadline(), socket.create_connection(("127.0.0.1", server.server_port)) as visitor:
            assert visitor.recv(1) == b""
    finally:
        server.close()
    assert kinds == [(BareSocket, 0.0)]


def test_visitors_leave_some_descriptors_to_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Who comes at the limit is the last one, until enough of them are free again."""
    taken = [os.dup(0)]
    monkeypatch.setattr(accepting, "ceiling", lambda: taken[0] + 10)
    monkeypatch.setattr(accepting, "PAUSE", 0.02)
    caplog.set_level(logging.INFO)
    leave = Event()
    server = Acceptor(listening(), lambda sock, _: leave.wait(), Workers(), 100, raw=True)
    looks, look_again = 0, server._look_again

    def counting() -> None:
        nonlocal looks
        looks += 1
        look_again()

    monkeypatch.setattr(server, "_look_again", counting)
    server.start()
    visitors: list[socket.socket] = []
    try:
        with deadline():
            while not server._scarce:
                visitors.append(socket.create_connection(("127.0.0.1", server.server_port)))
                gevent.sleep(0.01)
            served = server.connections
            visitors.append(socket.create_connection(("127.0.0.1", server.server_port)))
            looks = 0
            wait_until(lambda: looks > 3)
            assert server.connections == served
            leave.set()
            for visitor in visitors:
                assert visitor.recv(1) == b""
            for visitor in visitors:
                visitor.close()
    finally:
        os.close(taken[0])
        server.close()
    assert len(caplog.records) == 1


def test_the_end_of_a_visitor_starts_nothing_on_a_closed_listener(caplog: pytest.LogCaptureFixture) -> None:
    """It was one of as many as there may be, and descriptors were scarce."""
    workers, go = Workers(), Event()
    server = Acceptor(listening(), lambda sock, _: go.wait(), workers, 1, raw=True)
    server._ceiling = 0
    server.start()
    with deadline(), socket.socket() as visitor:
        visitor.connect(("127.0.0.1", server.server_port))
        wait_until(lambda: server.connections == 1)
        server.close()
        go.set()
        assert workers.join(60)
    assert server.connections == 0
    assert not [record for record in caplog.records if record.exc_info]
