"""Upgrades through the edge: WebSockets with the ``websockets`` package, and any other protocol."""

from __future__ import annotations

import base64
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from support import (
    DEADLINE,
    Peer,
    answering,
    connect,
    eventually,
    read_head,
    read_response,
    read_rest,
    request,
    reset,
    respond,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket
from websockets.sync.server import ServerConnection, serve

from tinytun_gevent import TunnelServer
from tinytun_gevent.server import edge


def edge_of(server: TunnelServer) -> edge.Edge:
    return next(front for front in server.core.fronts if isinstance(front, edge.Edge))


def streams_of(server: TunnelServer, name: str = "demo") -> int:
    """Streams that are open for a tunnel."""
    return sum(session.stream_count for session in server.registry.tunnels[name].sessions)


@contextmanager
def websocket_service() -> Iterator[int]:
    """An echoing WebSocket server's port; ``close <code> <reason>`` makes it close."""

    def handle(connection: ServerConnection) -> None:
        for message in connection:
            if isinstance(message, str) and message.startswith("close "):
                _, code, reason = message.split(" ", 2)
                connection.close(int(code), reason)
                return
            connection.send(message)

    with serve(handle, "127.0.0.1", 0, max_size=None, compression=None, ping_interval=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.socket.getsockname()[1]
        server.shutdown()
        thread.join(60)


@pytest.fixture
def websocket_port(open_tunnel: OpenTunnel) -> Iterator[int]:
    """A tunnel ``demo`` to an echoing WebSocket server."""
    with websocket_service() as port:
        open_tunnel(port)
        yield port


def open_websocket(server: TunnelServer, **options: object) -> ClientConnection:
    sock = connect(server.proxy_port)
    return connect_websocket(
        "ws://demo.localhost/chat",
        sock=sock,
        compression=None,
        max_size=None,
        ping_interval=None,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.usefixtures("websocket_port")
def test_messages_of_all_sizes_come_back(server: TunnelServer) -> None:
    with open_websocket(server) as websocket:
        for size in (0, 1, 125, 126, 65535, 65536, 1 << 20, 8 << 20):
            message = os.urandom(size)
            websocket.send(message)
            assert websocket.recv(20) == message, size
        websocket.send("text ✓")
        assert websocket.recv(DEADLINE) == "text ✓"


@pytest.mark.usefixtures("websocket_port")
def test_many_websockets_at_once(server: TunnelServer) -> None:
    with ExitStack() as stack:
        websockets = [stack.enter_context(open_websocket(server)) for _ in range(20)]
        for number, websocket in enumerate(websockets):
            websocket.send(f"hello {number}")
        for number, websocket in enumerate(websockets):
            assert websocket.recv(DEADLINE) == f"hello {number}"
        assert streams_of(server) == 20
    eventually(lambda: edge_of(server).visitors == 0, what="the visitors' greenlets end")
    eventually(lambda: streams_of(server) == 0, what="the streams end")


@pytest.mark.usefixtures("websocket_port")
@pytest.mark.parametrize(("code", "reason"), [(1000, "fine"), (1011, "broken"), (4321, "own")])
def test_close_codes_of_the_service_arrive(server: TunnelServer, code: int, reason: str) -> None:
    with open_websocket(server) as websocket:
        websocket.send(f"close {code} {reason}")
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(DEADLINE)
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, reason)


def test_close_codes_of_the_visitor_arrive(server: TunnelServer, open_tunnel: OpenTunnel) -> None:
    closed: list[tuple[int, str]] = []
    done = threading.Event()

    def handle(connection: ServerConnection) -> None:
        with pytest.raises(ConnectionClosed) as end:
            connection.recv(DEADLINE)
        if end.value.rcvd is not None:
            closed.append((end.value.rcvd.code, end.value.rcvd.reason))
        done.set()

    with serve(handle, "127.0.0.1", 0) as service:
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        open_tunnel(service.socket.getsockname()[1])
        with open_websocket(server) as websocket:
            websocket.close(4000, "bye")
        assert done.wait(60)
        service.shutdown()
        thread.join(60)
    assert closed == [(4000, "bye")]


@pytest.mark.usefixtures("websocket_port")
def test_a_lost_visitor_ends_the_service_s_connection(server: TunnelServer) -> None:
    with open_websocket(server) as websocket:
        websocket.send("x")
        assert websocket.recv(DEADLINE) == "x"
        # Closing the descriptor behind the library's back would leave its thread in recv.
        abort = struct.pack("ii", 1, 0)
        websocket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, abort)
        websocket.close_socket()
    eventually(lambda: streams_of(server) == 0)
    eventually(lambda: edge_of(server).visitors == 0)


@pytest.mark.usefixtures("fast_clock")
@pytest.mark.parametrize("ahead", [b"", request()], ids=["an upgrade", "a second request"])
def test_a_visitor_who_leaves_before_the_service_answers_is_noticed(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, ahead: bytes
) -> None:
    """Nobody reads from him then: after an upgrade nothing is read, nor behind the next head."""
    server = start_server()
    service = start_service(lambda peer: peer.read_head() and peer.wait_end())
    open_tunnel(service, server=server)
    fields = () if ahead else (b"Connection: Upgrade", b"Upgrade: websocket")
    visitor = connect(server.proxy_port)
    visitor.sendall(request("demo", "/", *fields) + ahead)
    peer = service.wait_peer()
    eventually(lambda: peer.requests)
    reset(visitor)
    assert peer.ended.wait(60)
    eventually(lambda: streams_of(server) == 0 and edge_of(server).visitors == 0)


def test_a_websocket_survives_an_idle_day(
    fast_clock: FastClock, start_server: StartServer, open_tunnel: OpenTunnel
) -> None:
    server = start_server()
    with websocket_service() as port:
        open_tunnel(port, server=server)
        with open_websocket(server) as websocket:
            websocket.send("before")
            assert websocket.recv(DEADLINE) == "before"
            fast_clock.forward(24 * 3600)
            websocket.send("after")
            assert websocket.recv(DEADLINE) == "after"


def test_tunnel_idle_timeout_ends_idle_upgraded_connections(
    fast_clock: FastClock, start_server: StartServer, open_tunnel: OpenTunnel
) -> None:
    server = start_server(tunnel_idle_timeout=300)
    with websocket_service() as port:
        open_tunnel(port, server=server)
        with open_websocket(server) as websocket:
            for _ in range(4):  # 400 s in all, but never idle for 300
                websocket.send("x")
                assert websocket.recv(DEADLINE) == "x"
                fast_clock.forward(100)
            fast_clock.forward(300)
            with pytest.raises(ConnectionClosed):
                websocket.recv(DEADLINE)
    eventually(lambda: edge_of(server).visitors == 0)


# -- the handshake ---------------------------------------------------------------------------------

UPGRADE = (b"Connection: keep-alive, Upgrade", b"Upgrade: chess/2, websocket")
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chess/2\r\n\r\n"


def shout(peer: Peer) -> None:
    """Agrees to any upgrade, then answers everything in upper case until the visitor's end."""
    got = peer.read_request()
    assert got is not None
    if got.target == b"/no":
        peer.sendall(respond(b"no", status=b"403 Forbidden"))
        shout(peer)
        return
    peer.sendall(SWITCH + b"welcome ")
    while data := peer.take(65536):
        peer.sendall(data.upper())
    peer.sendall(b" BYE")


def test_any_protocol_is_carried_as_it_is(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(shout)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/game", *UPGRADE, b"X-Move: e4"))
        answer = read_head(sock)
        assert answer.status == 101
        assert answer.get(b"connection") == b"Upgrade"
        assert answer.get(b"upgrade") == b"chess/2"
        sock.sendall(b"get / http/1.1\r\nhost: x\r\n\r\n\0\xff")  # looks like a request, is none
        expected = b"welcome GET / HTTP/1.1\r\nHOST: X\r\n\r\n\0\xff"
        got = b""
        while len(got) < len(expected):
            got += sock.recv(65536)
        assert got == expected
        sock.shutdown(socket.SHUT_WR)  # half-close travels: the service still answers
        assert read_rest(sock) == b" BYE"
    asked = service.requests[0]
    assert asked.get(b"connection") == b"Upgrade"
    assert asked.get(b"upgrade") == b"chess/2, websocket"
    assert asked.get(b"x-move") == b"e4"
    eventually(lambda: edge_of(server).visitors == 0, what="the visitor's greenlet ends")
    eventually(lambda: streams_of(server) == 0, what="the stream ends")


def test_bytes_right_behind_the_request_belong_to_the_new_protocol(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(shout))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", *UPGRADE) + b"early ")
        assert read_head(sock).status == 101
        sock.sendall(b"late")
        sock.shutdown(socket.SHUT_WR)
        assert read_rest(sock) == b"welcome EARLY LATE BYE"


def test_a_service_that_ends_first(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Its end reaches the visitor, who may still send; an abort reaches him as an abort."""
    rest: list[bytes] = []

    def script(peer: Peer) -> None:
        got = peer.read_request()
        peer.sendall(SWITCH)
        if got is not None and got.target == b"/abort":
            peer.take(1)
            peer.reset()
            return
        peer.sock.shutdown(socket.SHUT_WR)
        rest.append(peer.rest())

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", *UPGRADE))
        assert read_head(sock).status == 101
        assert read_rest(sock) == b""
        sock.sendall(b"still there")
    eventually(lambda: rest == [b"still there"])
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/abort", *UPGRADE) + b"x")
        assert read_head(sock).status == 101
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    eventually(lambda: edge_of(server).visitors == 0)


def test_an_abort_after_the_visitor_s_half_close(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(SWITCH)
        peer.rest()
        peer.reset()

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", *UPGRADE))
        assert read_head(sock).status == 101
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    eventually(lambda: edge_of(server).visitors == 0)


def test_a_refused_upgrade_leaves_both_connections_good(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(shout)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        # Pipelined behind a request that asks to upgrade: opaque only once the service agreed.
        sock.sendall(request("demo", "/no", *UPGRADE) + request("nobody", "/"))
        response = read_response(sock)
        assert (response.status, response.body) == (403, b"no")
        assert response.get(b"connection") is None
        assert read_response(sock).status == 404
        sock.sendall(request("demo", "/yes", *UPGRADE))
        assert read_head(sock).status == 101
    assert [got.target for got in service.requests] == [b"/no", b"/yes"]
    assert len(service.peers) == 1


@pytest.mark.usefixtures("websocket_port")
def test_a_websocket_refused_by_the_service(server: TunnelServer, open_tunnel: OpenTunnel) -> None:
    with (
        pytest.raises(InvalidStatus) as refused,
        connect_websocket("ws://nobody.localhost/", sock=connect(server.proxy_port)),
    ):
        pass
    assert refused.value.response.status_code == 404


@pytest.mark.parametrize(
    "fields",
    [
        (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"),
        (b"Connection: Upgrade", b"Upgrade: H2C, HTTP/3.0"),
        (b"Upgrade: websocket",),
        (b"Connection: keep-alive", b"Upgrade: websocket"),
    ],
)
def test_h2c_and_what_is_not_asked_for_properly_is_no_upgrade(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, fields: tuple[bytes, ...]
) -> None:
    service = start_service()
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        for _ in range(2):
            sock.sendall(request("demo", "/", *fields))
            assert read_response(sock).body == b"ok"
    for got in service.requests:
        assert got.get(b"upgrade") is None
        assert got.get(b"connection") is None
        assert got.get(b"http2-settings") is None


def test_h2c_beside_another_protocol_leaves_the_other(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Connection: Upgrade", b"Upgrade: h2c, chess/2"))
        assert read_response(sock).body == b"ok"
    assert service.requests[0].get(b"upgrade") == b"chess/2"


def test_a_switch_that_nobody_asked_for_is_502(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda _: SWITCH)))
    with connect(server.proxy_port) as sock:
        sock.sendall(request())
        assert read_response(sock).status == 502
        sock.sendall(request("nobody"))
        assert read_response(sock).status == 404, "the connection has become opaque"


def test_an_upgrade_with_a_body(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(shout)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", *UPGRADE, method=b"POST", body=b"hello"))
        assert read_head(sock).status == 101
        sock.sendall(b"x")
        sock.shutdown(socket.SHUT_WR)
        assert read_rest(sock) == b"welcome X BYE"
    assert service.requests[0].body == b"hello"


def test_an_upgraded_stream_is_never_used_again(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(shout)
    open_tunnel(service)
    for _ in range(3):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/", *UPGRADE))
            assert read_head(sock).status == 101
            sock.shutdown(socket.SHUT_WR)
            assert read_rest(sock) == b"welcome  BYE"
    assert len(service.peers) == 3


def test_the_handshake_s_own_fields_pass(server: TunnelServer, websocket_port: int) -> None:
    key = base64.b64encode(os.urandom(16))
    with connect(server.proxy_port) as sock:
        sock.sendall(
            request(
                "demo",
                "/",
                b"Connection: Upgrade",
                b"Upgrade: websocket",
                b"Sec-WebSocket-Version: 13",
                b"Sec-WebSocket-Key: " + key,
            )
        )
        answer = read_head(sock)
        assert answer.status == 101
        assert answer.get(b"sec-websocket-accept")
