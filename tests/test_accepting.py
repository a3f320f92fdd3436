"""Accepting when the process has run out of descriptors."""

from __future__ import annotations

import errno
import logging
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer
from helpers import deadline

from tinytun_gevent.server import accepting
from tinytun_gevent.server.accepting import Acceptor


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
    server = Acceptor(("127.0.0.1", 0), lambda sock, _: sock.sendall(b"at last"))
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
    server = Acceptor(("127.0.0.1", 0), lambda sock, _: None)
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
