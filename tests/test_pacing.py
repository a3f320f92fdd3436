"""The resets of an opener: as many as its peer takes for honest, the others later; visitors in a hurry."""

from __future__ import annotations

import time

import gevent
import pytest
from conftest import OpenTunnel, StartServer
from helpers import Inbox, deadline, headers_frame, raw_peer, session_pair, wait_until
from hyperframe.frame import HeadersFrame, RstStreamFrame
from support import Service, connect, eventually, reset

from tinytun_gevent.guard import MOMENT, RESETS
from tinytun_gevent.pacing import PACE
from tinytun_gevent.stream import CANCEL

OK = b"\x88"
"""``:status 200``."""


def test_few_resets_leave_at_once_and_the_others_when_they_are_ordinary() -> None:
    count = PACE[0] + 50
    with raw_peer(opener=True) as (session, peer, _):
        session.peer_max_streams = count
        streams = [session.open() for _ in range(count)]
        session.flush()
        with deadline():
            for stream in streams:
                peer.wait(HeadersFrame, stream.id)
        peer.send(*(headers_frame(stream.id, OK) for stream in streams))
        wait_until(lambda: all(stream.accepted for stream in streams))
        accepted = time.monotonic()
        for stream in streams:
            stream.reset()
        assert all(stream.closed for stream in streams), "for everybody here they are over"
        assert 0 < session.stream_count <= 50, "for the peer they are not"
        with deadline():
            for stream in streams:
                assert peer.wait(RstStreamFrame, stream.id).error_code == CANCEL
            took = time.monotonic() - accepted
        assert took > MOMENT
        assert session.stream_count == 0


def test_an_answer_lets_a_reset_go() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        while session.pacing._allowance.take(time.monotonic()):
            pass
        stream = session.open()
        inbox = Inbox(stream)
        session.flush()
        with deadline():
            peer.wait(HeadersFrame, stream.id)
        stream.reset()
        assert session.stream_count == 1
        peer.send(headers_frame(stream.id, OK), b"\0\0\1\0\0" + stream.id.to_bytes(4, "big") + b"x")
        with deadline():
            peer.wait(RstStreamFrame, stream.id)
        assert session.stream_count == 0
        assert not inbox.received, "it was over"
        peer.send(b"\0\0\1\0\0" + stream.id.to_bytes(4, "big") + b"y")  # was under way
        peer.send(b"\0\0\0\0\1" + stream.id.to_bytes(4, "big"))
        gevent.idle()
        assert not session.closed.is_set()


@pytest.mark.parametrize("how", ["the peer ends it", "the session ends"])
def test_what_waits_is_forgotten_when_it_is_over_otherwise(how: str) -> None:
    with raw_peer(opener=True) as (session, peer, _):
        while session.pacing._allowance.take(time.monotonic()):
            pass
        stream = session.open()
        session.flush()
        with deadline():
            peer.wait(HeadersFrame, stream.id)
        stream.reset()
        assert session.pacing._held
        if how == "the peer ends it":
            peer.send(RstStreamFrame(stream.id, error_code=8))
        else:
            session.close()
        wait_until(lambda: not session.pacing._held and not session.stream_count)


def test_two_thousand_aborts_one_behind_the_other_leave_the_session_up() -> None:
    """More than the peer would take if they came as fast as they are made."""
    with session_pair(max_streams=1000) as pair:
        for _ in range(2000):
            wait_until(lambda: pair.opener.has_room)
            stream = pair.opener.open()
            pair.opener.flush()
            stream.reset()
        wait_until(lambda: not pair.opener.stream_count and not pair.acceptor.stream_count)
        assert not pair.acceptor.closed.is_set()
        near, far = pair.open()
        near.stream.sendall(b"still there")
        assert far.wait(11) == b"still there"


def test_visitors_who_leave_at_once_do_not_end_the_tunnel(
    start_server: StartServer, open_tunnel: OpenTunnel
) -> None:
    """Connect and abort, against a service that says nothing until it is asked."""

    def wait(peer: object) -> None:
        peer.wait_end()  # type: ignore[attr-defined]

    with Service(wait) as service:
        server = start_server()
        tunnel = open_tunnel(service, kind="tcp", server=server, concurrency=500)
        port = int(tunnel.url.rpartition(":")[2])

        for come in range(50, 2 * RESETS[0] + 50, 50):
            visitors = [connect(port) for _ in range(50)]
            eventually(lambda come=come: tunnel.counters.total >= come)
            for visitor in visitors:
                reset(visitor)
        eventually(lambda: not tunnel.counters.visitors)
        (found,) = server.registry.tunnels.values()
        assert found.ready
        assert tunnel.state.value == "connected"
