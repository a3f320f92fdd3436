"""Answers that end too early: what had come is delivered, at the visitor's pace, and does not look whole."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from certificates import AUTHORITY, install, issue
from conftest import FastClock, OpenTunnel, StartServer, StartService
from support import DEADLINE, Peer, eventually, request, reset

from tinytun_gevent import TunnelServer, relay, sockets, stream
from tinytun_gevent.server import pace
from tinytun_gevent.server.edge import Edge

SIZE = 3 * 1024 * 1024
BODY = bytes(range(256)) * (SIZE // 256)

HEADS = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (SIZE + 1024 * 1024),
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % (2 * SIZE),
}


def visit(port: int) -> socket.socket:
    """A visitor's connection whose kernel takes little; the caller closes it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    sock.settimeout(3 * DEADLINE)
    sock.connect(("127.0.0.1", port))
    return sock


def read_slowly(sock: Any) -> tuple[bytes, BaseException | None]:
    """Everything up to the end, in small pieces; and the error that it was, if it was one."""
    got = bytearray()
    try:
        while piece := sock.recv(16 * 1024):
            got += piece
    except OSError as error:
        return bytes(got), error
    return bytes(got), None


def body_of(got: bytes) -> bytes:
    """What came of the body; of one chunk that is not whole, where it was chunked."""
    head, _, body = got.partition(b"\r\n\r\n")
    return body.partition(b"\r\n")[2] if b"chunked" in head else body


def breaking_off(head: bytes) -> Callable[[Peer], None]:
    """A service that sends a part of what it promises, and closes."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(head + BODY)

    return script


def front_of(server: TunnelServer) -> Edge:
    """What serves the visitors of the proxy port."""
    return next(front for front in server.core.fronts if isinstance(front, Edge))


@pytest.mark.parametrize("framing", HEADS)
def test_all_that_the_service_sent_arrives_and_then_a_reset(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, framing: str
) -> None:
    open_tunnel(start_service(breaking_off(HEADS[framing])))
    with visit(server.proxy_port) as sock:
        sock.sendall(request())
        got, error = read_slowly(sock)
    assert body_of(got) == BODY
    assert isinstance(error, ConnectionResetError)


def test_a_request_behind_one_that_is_broken_off_is_not_waited_with(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(breaking_off(HEADS["length"]))
    open_tunnel(service)
    with visit(server.proxy_port) as sock:
        sock.sendall(2 * request())
        got, error = read_slowly(sock)
        assert body_of(got) == BODY
        assert isinstance(error, ConnectionResetError)
        eventually(lambda: not front_of(server).visitors)
    assert len(service.requests) == 1


def test_a_visitor_that_resets_while_what_had_come_is_on_the_way_is_gone(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """The kernel tells of a reset once, and the greenlet that reads may be the one that hears of it."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(HEADS["length"] + BODY[:200_000])  # less than a window

    open_tunnel(start_service(script))
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(visit(server.proxy_port)) for _ in range(5)]
        for sock in visitors:
            sock.sendall(request())
        inside = front_of(server)._visitors
        eventually(lambda: len(inside) == 5 and all(visitor.sink.cutting for visitor in inside))
        for sock in visitors:
            reset(sock)
        eventually(lambda: not inside)


@pytest.mark.parametrize("minor", [0, 1])
def test_what_a_reset_service_had_sent_arrives_before_the_reset(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, minor: int
) -> None:
    """Also where the connection's end is the body's: nothing else tells that it is not whole."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
        stream_has_all.wait(DEADLINE)
        peer.reset()

    stream_has_all = threading.Event()
    open_tunnel(start_service(script))
    with visit(server.proxy_port) as sock:
        sock.sendall(request(minor=minor))
        (session,) = server.registry.tunnels["demo"].sessions
        eventually(lambda: session.blocked or session.streams)
        got = bytearray()
        while b"\r\n\r\n" not in got:
            got += sock.recv(4096)
        while len(got) < SIZE - 512 * 1024:  # less than a window is left, so the client has read all of it
            got += sock.recv(65536)
        stream_has_all.set()
        rest, error = read_slowly(sock)
    assert body_of(bytes(got) + rest) == BODY
    assert isinstance(error, ConnectionResetError)


def test_by_https_too(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, tmp_path: Path
) -> None:
    install(tmp_path, issue("*.localhost", "demo.localhost"))
    server = start_server(tls_dir=str(tmp_path), proxy_tls_port=0)
    open_tunnel(start_service(breaking_off(HEADS["length"])), server=server)
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    with (
        visit(server.proxy_tls_port) as sock,
        context.wrap_socket(sock, server_hostname="demo.localhost", suppress_ragged_eofs=False) as visitor,
    ):
        visitor.sendall(request())
        got, error = read_slowly(visitor)
    assert body_of(got) == BODY
    assert error is not None


@pytest.mark.parametrize("kind", ["http", "upload", "tcp"])
def test_what_waits_in_the_client_s_kernel_when_the_service_resets_arrives(
    monkeypatch: pytest.MonkeyPatch,
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    kind: str,
) -> None:
    """The visitor takes nothing yet, so the client has no window; it only looks after the service."""
    monkeypatch.setattr(stream, "LOOK", 0.02)
    monkeypatch.setattr(relay, "LAST_WORDS", 0.02)
    head = b"" if kind == "tcp" else b"HTTP/1.1 200 OK\r\n\r\n"
    begun: list[bool] = []
    sent: list[int] = []
    gone = threading.Event()

    def script(peer: Peer) -> None:
        if kind != "tcp":
            peer.read_head()
        before = sockets.acknowledged(peer.sock) or 0
        peer.sock.settimeout(1)
        with contextlib.suppress(TimeoutError):  # nobody takes any more
            while True:
                peer.sendall(head + BODY if not begun else BODY)
                begun.append(True)
        sent.append((sockets.acknowledged(peer.sock) or 0) - before)
        peer.reset()
        gone.set()

    tunnel = open_tunnel(start_service(script), kind="tcp" if kind == "tcp" else "http")
    with visit(int(tunnel.url.rpartition(":")[2]) if kind == "tcp" else server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: %d" % (99 * SIZE if kind == "upload" else 0)))
        if kind == "upload":  # which the service does not read
            sock.setblocking(False)
            while not gone.is_set():
                with contextlib.suppress(BlockingIOError):
                    sock.send(BODY)
                gone.wait(0.01)
            sock.settimeout(DEADLINE)
        assert gone.wait(DEADLINE)
        threading.Event().wait(0.3)  # the client has looked, more than once
        got, error = read_slowly(sock)
    if kind != "tcp":
        got = head + got.partition(b"\r\n\r\n")[2]
    assert len(got) == sent[0]
    assert isinstance(error, ConnectionResetError)


def test_through_a_tcp_tunnel_too(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """What is in the service's kernel at its reset is lost there; the rest arrives, however slowly."""
    received = threading.Event()

    def script(peer: Peer) -> None:
        peer.sendall(BODY)
        assert received.wait(DEADLINE)
        peer.reset()

    tunnel = open_tunnel(start_service(script), kind="tcp")
    with visit(int(tunnel.url.rpartition(":")[2])) as sock:
        got = bytearray()
        while len(got) < SIZE - 512 * 1024:
            got += sock.recv(65536)
        received.set()
        rest, error = read_slowly(sock)
    assert bytes(got) + rest == BODY
    assert isinstance(error, ConnectionResetError)


def test_what_came_before_the_session_was_lost_arrives(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 * SIZE))
        for _ in range(16):
            peer.sendall(BODY)

    tunnel = open_tunnel(start_service(script))
    with visit(server.proxy_port) as sock:
        sock.sendall(request())
        (session,) = server.registry.tunnels["demo"].sessions
        eventually(lambda: session.backlog > 100_000, what="a window's worth waits at the server")
        (carried,) = session.streams.values()
        tunnel.close(grace=0)
        eventually(lambda: carried.closed)
        got, error = read_slowly(sock)
    head = got.index(b"\r\n\r\n") + 4
    assert got[head:] == (16 * BODY)[: len(got) - head]
    assert carried.received - 500 < len(got) < carried.received + 500  # the head was written anew
    assert isinstance(error, ConnectionResetError)
    assert session.backlog == 0


def test_a_visitor_that_takes_nothing_is_not_waited_for_ever(
    fast_clock: FastClock,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
) -> None:
    server = start_server()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (16 * SIZE)
    open_tunnel(start_service(breaking_off(head)), server=server)
    with visit(server.proxy_port) as sock:
        sock.sendall(request())
        eventually(lambda: not server.core.busy and front_of(server).visitors)
        eventually(lambda: (fast_clock.forward(pace.TAKING_GRACE), not front_of(server).visitors)[1])
        got, error = read_slowly(sock)
        assert len(got) < SIZE
        assert isinstance(error, ConnectionResetError)
