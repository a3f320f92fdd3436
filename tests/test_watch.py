"""What takes too long at the edge, and is ended."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from conftest import OpenTunnel, StartServer, StartService
from support import (
    Peer,
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

from tinytun_gevent.server import leaving, pace
from tinytun_gevent.server.edge import Edge

GRACE = 0.3
"""Seconds of patience in the tests at the edge, whose clock looks fifty times a second."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, fast_clock: None) -> None:
    monkeypatch.setattr(pace, "SENDING_GRACE", GRACE)
    monkeypatch.setattr(pace, "TAKING_GRACE", GRACE)


def upload(*fields: bytes) -> bytes:
    return request("demo", "/", b"Content-Length: 100000", *fields, method=b"POST")


def stay(sock: socket.socket, piece: bytes, pause: float, seconds: float) -> None:
    """Sends ``piece`` again and again until something comes back or the time is over."""
    sock.settimeout(pause)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sock.sendall(piece)
        try:
            sock.recv(1, socket.MSG_PEEK)
            break
        except TimeoutError:
            continue
    sock.settimeout(60)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("piece", [b"", b"x"], ids=["stalled", "dripping"])
def test_a_body_that_comes_too_slowly_is_408(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, piece: bytes
) -> None:
    server = start_server()
    service = start_service(lambda peer: peer.read_head() and peer.wait_end())
    open_tunnel(service, server=server)
    began = time.monotonic()
    with connect(server.proxy_port) as sock:
        sock.sendall(upload() + b"x" * 1000)
        stay(sock, piece, 0.05, 5)
        response = read_response(sock)
        assert (response.status, response.get(b"connection")) == (408, b"close")
        assert sock.recv(1) == b""
    assert GRACE < time.monotonic() - began < 5
    assert service.wait_peer().ended.wait(60), "the service was not told"
    front = next(front for front in server.core.fronts if isinstance(front, Edge))
    eventually(lambda: not server.core.busy and not front.visitors)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rate", [2, 0], ids=["fast enough", "no limit"])
def test_a_body_that_comes_fast_enough_is_waited_for(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, rate: int
) -> None:
    server = start_server(min_body_rate=rate)
    open_tunnel(start_service(answering(lambda got: respond(got.body))), server=server)
    body = b"0123456789"
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: %d" % len(body), method=b"POST"))
        for place in range(len(body)):
            stay(sock, body[place : place + 1], GRACE / 5, 0.01)
        assert read_response(sock).body == body


@pytest.mark.usefixtures("impatient")
def test_a_service_that_reads_slowly_is_not_held_against_the_visitor(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
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
        threading.Event().wait(2 * GRACE)  # what would be too long is what this is about
        assert session.blocked
        go_on.set()
        assert read_response(sock).body == b"all"
        sender.join()


@pytest.mark.usefixtures("impatient")
def test_a_body_s_pause_behind_the_begun_answer_is_nobody_s_business(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
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
        threading.Event().wait(2 * GRACE)
        sock.sendall(b"hello")
        assert sock.recv(100) == b"5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.usefixtures("impatient")
def test_whoever_waits_for_a_100_has_the_answer_s_time(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(answer_timeout=3 * GRACE)
    service = start_service(lambda peer: peer.read_head() and peer.wait_end())
    open_tunnel(service, server=server)
    began = time.monotonic()
    with connect(server.proxy_port) as sock:
        sock.sendall(upload(b"Expect: 100-continue"))
        assert read_response(sock).status == 504
    assert time.monotonic() - began > 3 * GRACE


@pytest.mark.usefixtures("impatient")
def test_a_visitor_who_takes_nothing_of_his_answer_is_cut_off(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Also one whose exchange is over for the service; his place is for somebody else."""
    server = start_server()
    big = respond(bytes(48 * 1024 * 1024))
    service = start_service(answering(lambda got: big if got.target == b"/big" else respond(b"small")))
    open_tunnel(service, server=server, concurrency=1)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/big"))
        assert read_head(sock).status == 200
        assert get(server.proxy_port).body == b"small"
        with pytest.raises(ConnectionResetError):
            read_rest(sock)


@pytest.mark.usefixtures("impatient")
def test_a_visitor_who_takes_a_little_all_the_time_is_not(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server()
    size = 8 * 1024 * 1024
    open_tunnel(start_service(answering(lambda _: respond(bytes(size)))), server=server)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)  # so that it is told of each step
        sock.settimeout(60)
        sock.connect(("127.0.0.1", server.proxy_port))
        sock.sendall(request("demo"))
        assert read_head(sock).status == 200
        until, got = time.monotonic() + 3 * GRACE, 0
        while time.monotonic() < until:
            got += len(sock.recv(16384))
            threading.Event().wait(0.02)
        assert got < size
        while got < size:
            got += len(sock.recv(1 << 20))


@pytest.mark.usefixtures("fast_clock")
def test_an_upgrade_is_not_waited_for_by_somebody_who_cannot_use_it(
    monkeypatch: pytest.MonkeyPatch,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
) -> None:
    """He has half-closed, which an answer that comes soon does not mind."""
    monkeypatch.setattr(leaving, "HALF_CLOSED_GRACE", GRACE)

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
            assert sock.recv(1) == b""
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/silent", *upgrade))
        sock.settimeout(3 * GRACE)
        with pytest.raises(TimeoutError):
            sock.recv(1)
