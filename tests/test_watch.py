"""What takes too long at the edge, and is ended."""

from __future__ import annotations

import select
import socket
import threading

import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from support import (
    Peer,
    Source,
    answering,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    read_rest,
    request,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.server import leaving, pace
from tinytun_gevent.server.edge import Edge

LONG = 2 * pace.TAKING_GRACE
"""Seconds that are too long for whoever is waited for."""


def upload(*fields: bytes) -> bytes:
    return request("demo", "/", b"Content-Length: 100000", *fields, method=b"POST")


def wait_accepted(server: TunnelServer) -> None:
    """Waits until the visitor's request is on its way, and nobody is waited for but him and the service."""
    front = next(front for front in server.core.fronts if isinstance(front, Edge))

    def is_accepted() -> bool:
        exchanges = [visitor.exchange for visitor in front._visitors if visitor.exchange]
        streams = [exchange.stream for exchange in exchanges]
        return bool(streams) and all(stream and stream.accepted for stream in streams)

    eventually(is_accepted)


def has_come(sock: socket.socket) -> bool:
    """Whether something can be read, be it the end."""
    return bool(select.select([sock], [], [], 0)[0])


def test_a_body_that_pauses_for_too_long_is_408(
    fast_clock: FastClock,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
) -> None:
    server = start_server()
    service = start_service(lambda peer: peer.read_head() and peer.wait_end())
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(upload() + b"x" * 1000)
        wait_accepted(server)
        seconds = 0
        while not has_come(sock):
            fast_clock.forward(1)
            seconds += 1
        response = read_response(sock)
        assert (response.status, response.get(b"connection")) == (408, b"close")
        assert sock.recv(1) == b""
    assert 2 * pace.SENDING_GRACE < seconds <= pace.BODY_PAUSE + 2  # and the time that it took
    assert service.wait_peer().ended.wait(60), "the service was not told"
    front = next(front for front in server.core.fronts if isinstance(front, Edge))
    eventually(lambda: not server.core.busy and not front.visitors)


def test_a_slow_body_gives_its_place_to_whoever_waits_for_it(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """And only then: as `curl -T -` with a line now and then."""
    server = start_server()
    service = start_service(answering(lambda got: respond(got.target)))
    open_tunnel(service, server=server, concurrency=2)
    with connect(server.proxy_port) as slow, connect(server.proxy_port) as fast:
        for sock in (slow, fast):
            sock.sendall(upload() + b"x" * 1000)
        eventually(lambda: len(service.peers) == 2)
        for _ in range(int(2 * pace.BODY_PAUSE)):
            slow.sendall(b"x")
            fast.sendall(b"x" * 500)  # twice as much as is asked for
            fast_clock.forward(1)
        assert not has_come(slow)
        assert get(server.proxy_port, "demo", "/waited").body == b"/waited"
        assert read_response(slow).status == 408
        assert not has_come(fast)


@pytest.mark.parametrize("rate", [2, 0], ids=["fast enough", "no limit"])
def test_a_body_that_comes_fast_enough_is_waited_for(
    fast_clock: FastClock,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    rate: int,
) -> None:
    server = start_server(min_body_rate=rate)
    open_tunnel(start_service(answering(lambda got: respond(got.body))), server=server)
    body = b"0123456789" * 10
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: %d" % len(body), method=b"POST"))
        wait_accepted(server)
        for start in range(0, len(body), 10):
            fast_clock.forward(10 / rate if rate else LONG)
            sock.sendall(body[start : start + 10])
        assert read_response(sock).body == body


def test_a_service_that_reads_slowly_is_not_held_against_the_visitor(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """His body waits in the kernels and windows of the whole way, so nothing is his turn."""
    go_on, size = threading.Event(), 24 * 1024 * 1024

    def script(peer: Peer) -> None:
        peer.read_head()
        go_on.wait(60)
        left = size
        while left:
            left -= len(peer.sock.recv(min(left, 1 << 20)))
        peer.sendall(respond(b"all"))

    server = start_server()
    open_tunnel(start_service(script), server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: %d" % size, method=b"POST"))
        sender = threading.Thread(target=sock.sendall, args=(bytes(size),))
        sender.start()
        (session,) = next(iter(server.registry.tunnels.values())).sessions
        eventually(lambda: session.blocked, what="the stream's window is used up")
        wait_accepted(server)
        fast_clock.forward(LONG)
        assert session.blocked
        go_on.set()
        assert read_response(sock).body == b"all"
        sender.join()


def test_a_body_s_pause_behind_the_begun_answer_is_nobody_s_business(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """As with two-way streams over one request."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        peer.exactly(5)
        peer.sendall(b"5\r\nhello\r\n0\r\n\r\n")

    server = start_server()
    open_tunnel(start_service(script), server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: 5", method=b"POST"))
        assert read_head(sock).status == 200
        fast_clock.forward(LONG)
        sock.sendall(b"hello")
        assert sock.recv(100) == b"5\r\nhello\r\n0\r\n\r\n"


def test_whoever_waits_for_a_100_has_the_answer_s_time(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(answer_timeout=LONG)
    service = start_service(lambda peer: peer.read_head() and peer.wait_end())
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(upload(b"Expect: 100-continue"))
        wait_accepted(server)
        fast_clock.forward(LONG / 2)
        assert not has_come(sock)
        fast_clock.forward(LONG / 2)
        assert read_response(sock).status == 504


def test_a_visitor_who_takes_nothing_of_his_answer_is_cut_off(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Also one whose exchange is over for the service; his place is for somebody else."""
    server = start_server()
    big = respond(bytes(48 * 1024 * 1024))
    service = start_service(answering(lambda got: big if got.target == b"/big" else respond(b"small")))
    open_tunnel(service, server=server, concurrency=1)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/big"))
        assert read_head(sock).status == 200
        front = next(front for front in server.core.fronts if isinstance(front, Edge))
        eventually(lambda: (fast_clock.forward(LONG), not front.visitors)[1])
        assert get(server.proxy_port).body == b"small"
        with pytest.raises(ConnectionResetError):
            read_rest(sock)


def test_a_visitor_who_takes_a_little_all_the_time_is_not(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server()
    size = 48 * 1024 * 1024
    open_tunnel(start_service(answering(lambda _: respond(bytes(size)))), server=server)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # so that it is told of each step
        sock.settimeout(60)
        sock.connect(("127.0.0.1", server.proxy_port))
        sock.sendall(request("demo"))
        assert read_head(sock).status == 200
        source, step = Source(sock), 256 * 1024
        for _ in range(20):
            source.exactly(step)
            fast_clock.forward(pace.TAKING_GRACE / 4)
        source.exactly(size - 20 * step)


def test_an_upgrade_is_not_waited_for_by_somebody_who_cannot_use_it(
    fast_clock: FastClock,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
) -> None:
    """He has half-closed, which an answer that comes soon does not mind."""

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            if got.target == b"/refused":
                peer.sendall(respond(b"no"))
            else:
                peer.wait_end()

    server, service = start_server(), start_service(script)
    open_tunnel(service, server=server)
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket")
    for target, answer in (("/refused", b"no"), ("/silent", b"")):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", target, *upgrade))
            sock.shutdown(socket.SHUT_WR)
            if answer:
                assert read_response(sock).body == answer
            else:
                wait_accepted(server)
                while not has_come(sock):
                    fast_clock.forward(leaving.HALF_CLOSED_GRACE)
            assert sock.recv(1) == b""
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/silent", *upgrade))
        wait_accepted(server)
        fast_clock.forward(2 * leaving.HALF_CLOSED_GRACE)
        assert not has_come(sock)
