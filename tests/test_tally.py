"""What the server counts: exchanges, bytes that never fall, tunnels that come back, goodbyes, refusals."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from conftest import OpenTunnel, StartServer, StartService
from hypothesis import given
from hypothesis import strategies as st
from raw_client import RawClient
from support import Peer, connect, eventually, get, read_head, request, reset, respond

from tinytun_gevent import TunnelServer
from tinytun_gevent.server.tally import (
    EXCHANGE_BOUNDS,
    GOAWAY_REASONS,
    NO_ANSWER,
    Histogram,
    Refusal,
    Tally,
)


@given(st.lists(st.floats(0, 100)))
def test_a_histogram_counts_each_value_once(values: list[float]) -> None:
    histogram = Histogram(EXCHANGE_BOUNDS)
    for value in values:
        histogram.add(value)
    assert sum(histogram.counts) == len(values)
    assert histogram.sum == pytest.approx(sum(values))
    for number, bound in enumerate(EXCHANGE_BOUNDS):
        assert sum(histogram.counts[: number + 1]) == sum(value <= bound for value in values)


def test_the_bounds_go_from_a_millisecond_to_a_minute() -> None:
    assert (EXCHANGE_BOUNDS[0], EXCHANGE_BOUNDS[-1]) == (0.001, 60)
    assert list(EXCHANGE_BOUNDS) == sorted(EXCHANGE_BOUNDS)


@pytest.mark.parametrize(
    ("status", "place"), [(0, NO_ANSWER), (101, 1), (200, 2), (304, 3), (404, 4), (503, 5), (999, 5)]
)
def test_statuses_count_by_their_class(status: int, place: int) -> None:
    tally = Tally()
    tally.exchange(status, 0.1)
    assert [index for index, count in enumerate(tally.statuses) if count] == [place]


def test_how_long_an_upgraded_connection_lasted_is_no_answer_s_time() -> None:
    tally = Tally()
    tally.exchange(101, 5000)
    assert tally.durations.sum == 0
    assert sum(tally.durations.counts) == 0


@pytest.mark.parametrize(
    ("code", "name"),
    [(0, "NO_ERROR"), (7, "REFUSED_STREAM"), (11, "ENHANCE_YOUR_CALM"), (2**32 - 1, "other")],
)
def test_goaways_count_by_http2_s_names(code: int, name: str) -> None:
    tally = Tally()
    tally.goaway_sent(code)
    assert [GOAWAY_REASONS[i] for i, count in enumerate(tally.goaways_sent) if count] == [name]
    tally.goaway_received(code)
    assert tally.goaways_received == tally.goaways_sent


def test_bytes_of_a_session_that_is_gone_are_kept_once() -> None:
    tally = Tally()
    session: Any = Counted()
    tally.sessions.add(session)
    assert (tally.bytes_in, tally.bytes_out) == (5, 7)
    tally.part(session)
    tally.part(session)
    assert (tally.bytes_in, tally.bytes_out) == (5, 7)
    assert not tally.sessions


class Counted:
    """A session as far as it is counted."""

    data_sent, data_received = 5, 7


# -- in a server -----------------------------------------------------------------------------------


def test_exchanges_and_bytes_of_a_real_server(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tally = server.core.tally
    tunnel = open_tunnel(start_service())
    for _ in range(3):
        assert get(server.proxy_port).status == 200
    assert get(server.proxy_port, "nobody").status == 404
    eventually(lambda: sum(tally.statuses) == 4)
    assert (tally.statuses[2], tally.statuses[4]) == (3, 1)
    assert sum(tally.durations.counts) == 4
    before = tally.bytes_in, tally.bytes_out
    assert before[0] > 0
    assert before[1] >= 3 * len(respond())
    assert (tally.tunnels_opened, tally.tunnels_resumed, len(tally.sessions)) == (1, 0, 1)
    tunnel.close()
    eventually(lambda: not tally.sessions)
    assert tally.bytes_in >= before[0]
    assert tally.bytes_out >= before[1]
    assert tally.tunnels_lost == 0
    assert tally.goaways_received[0] == 1


def test_bytes_do_not_fall_while_a_tunnel_that_said_goodbye_finishes(server: TunnelServer) -> None:
    tally = server.core.tally
    with RawClient(server) as client, connect(server.proxy_port) as sock:
        sock.sendall(request())
        stream, _ = client.next_request()
        client.send(stream, b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf")
        assert read_head(sock).status == 200
        before = tally.bytes_out
        client.goaway()
        eventually(lambda: "demo" not in server.registry.tunnels)
        assert tally.bytes_out >= before > 0
        assert len(tally.sessions) == 1


def test_a_visitor_who_leaves_counts_as_none(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    begun = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_request()
        begun.set()
        peer.wait_end()

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(request())
        assert begun.wait(60)
        reset(sock)
    eventually(lambda: server.core.tally.statuses[NO_ANSWER] == 1)


def test_a_lost_tunnel_counts_as_lost_and_then_as_resumed(server: TunnelServer) -> None:
    tally = server.core.tally
    with RawClient(server, resume=b"") as client:
        token = client.token
    eventually(lambda: tally.tunnels_lost == 1)
    with RawClient(server, resume=token):
        eventually(lambda: tally.tunnels_resumed == 1)
    assert tally.tunnels_opened == 1


def test_refusals_count_by_their_reason(start_server: StartServer) -> None:
    server = start_server(max_tunnels=1, handshake_timeout=0.2, trusted_proxies="127.0.0.1")
    refusals = server.core.tally.refusals
    with RawClient(server):
        for name in ("demo", "other"):
            with pytest.raises(AssertionError, match=r"HTTP/1\.1 (409|503)"):
                RawClient(server, subdomain=name)
        eventually(lambda: refusals[Refusal.NAME] == 1 and refusals[Refusal.SERVER] == 1)
        for port, data, reason in (
            (
                server.connection_port,
                b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
                Refusal.HANDSHAKE,
            ),
            (server.proxy_port, b"nonsense\r\n\r\n", Refusal.REQUEST),
            (server.proxy_port, b"PROXY nonsense\r\n", Refusal.PROXY_HEADER),
            (server.tcp_proxy_port, b"nonsense nonsense nonsense\r\n", Refusal.PROXY_HEADER),
        ):
            before = refusals[reason]
            with connect(port) as sock:
                sock.sendall(data)
                eventually(lambda b=before, r=reason: refusals[r] == b + 1, what=f"{reason} of {data!r}")
        before = refusals[Refusal.HANDSHAKE]
        with connect(server.connection_port):  # says nothing
            eventually(lambda: refusals[Refusal.HANDSHAKE] == before + 1)


def test_connections_that_are_carried_count_while_they_are(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(tcp_ports="20000-32000")

    def script(peer: Peer) -> None:
        peer.sendall(b"hello")
        peer.wait_end()

    tunnel = open_tunnel(start_service(script), server=server, kind="tcp")
    sight = server._serving.sight  # type: ignore[union-attr]
    with connect(int(tunnel.url.rpartition(":")[2])) as sock:
        assert sock.recv(5) == b"hello"
        assert sight.visitors() == {"http": 0, "tcp": 1}
        assert sight.connections()["tcp"] == 1
    eventually(lambda: sight.visitors()["tcp"] == 0 and sight.connections()["tcp"] == 0)
