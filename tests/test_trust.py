"""What strangers cannot do: lead the server to where they like, or read its metadata on public ports."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from certificates import install, issue
from conftest import OpenTunnel, StartServer, StartService
from raw_client import RawClient
from support import DEADLINE, Service, answering, eventually, read_response, request, respond
from test_entrance import visit as visit_by_tls
from test_peers import FakePeer, has

from tinytun_gevent import TunnelServer
from tinytun_gevent.server.addresses import is_local
from tinytun_gevent.wire.proxyproto import build_v2

OUTSIDE = "127.0.0.2"
"""Where visitors are: a peer is at 127.0.0.1."""

pytestmark = pytest.mark.skipif(not is_local(OUTSIDE), reason=f"{OUTSIDE} is no address of this machine")


# -- where the server connects to ---------------------------------------------


class Calls:
    """Notes where every other thread of this process connects to, and what it resolves."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self._mine: int | None = None
        sys.addaudithook(self._hook)  # for good: there is no way to remove one

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._mine is None or threading.get_ident() == self._mine:
            return
        if event == "socket.connect":
            self.seen.append(arguments[1])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            self.seen.append(arguments[0])

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes them inside the block."""
        self.seen = []
        self._mine = threading.get_ident()
        try:
            yield
        finally:
            self._mine = None


CALLS = Calls()


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), DEADLINE, source_address=(OUTSIDE, 0))


def say(port: int, data: bytes) -> None:
    """Sends ``data`` and waits for whatever comes of it: the end, at last."""
    with contextlib.suppress(ConnectionError), dial(port) as sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):  # there may be nothing left to shut
            sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


@pytest.fixture
def victim() -> Iterator[int]:
    """A port that nobody shall be led to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def wishes(victim: int, name: bytes) -> list[bytes]:
    """Requests for the tunnel ``name``, or for nothing, that name the victim in every place that there is."""
    where, host = b"127.0.0.1:%d" % victim, name + b".localhost"

    def get(target: bytes, *fields: bytes, method: bytes = b"GET") -> bytes:
        return b"\r\n".join([b"%b %b HTTP/1.1" % (method, target), *fields, b"Connection: close", b"", b""])

    fields = (
        *(
            b"X-Forwarded-Host: " + where,
            b"Forwarded: host=%b;for=127.0.0.1" % where,
            b"X-Real-IP: 127.0.0.1",
        ),
        *(b"X-Forwarded-For: 127.0.0.1", b"X-Tinytun-Host-Header: " + where, b"X-Tinytun-Peer: " + where),
        *(b"X-Original-URL: http://%b/" % where, b"Location: http://%b/" % where, b"Via: 1.1 " + where),
    )
    return [
        get(b"/", b"Host: " + where),
        get(b"/", b"Host: localhost:%d" % victim),
        get(b"/", b"Host: %b:%d" % (host, victim), *fields),
        get(b"http://%b/" % where, b"Host: " + host),
        get(b"http://%b/" % where, b"Host: " + where),
        get(b"http://%b:%d/" % (host, victim), b"Host: " + where),
        get(b"http://%b@%b/" % (host, where), b"Host: " + host),
        get(b"//%b/" % where, b"Host: " + host),
        get(b"/?url=http://%b/" % where, b"Host: " + host),
        get(where, b"Host: " + host, method=b"CONNECT"),
        get(b"*", b"Host: " + where, method=b"OPTIONS"),
        get(b"/", b"Host: " + host, b"X-Tinytun-Hop: 1", *fields),
        get(b"/", b"Host: " + host, b"X-Tinytun-Hop: " + where),
        get(b"/", b"Host: " + host, b"Connection: upgrade", b"Upgrade: websocket", *fields),
    ]


def proxied(victim: int) -> list[bytes]:
    """PROXY headers that say that a visitor has come to the victim."""
    return [
        b"PROXY TCP4 127.0.0.1 127.0.0.1 1111 %d\r\n" % victim,
        b"PROXY TCP6 ::1 ::1 1111 %d\r\n" % victim,
        build_v2(("127.0.0.1", 1111), ("127.0.0.1", victim)),
    ]


def try_everything(server: TunnelServer, victim: int, name: bytes) -> None:
    for wish in wishes(victim, name):
        say(server.proxy_port, wish)
        for header in proxied(victim):
            say(server.proxy_port, header + wish)
        say(server.connection_port, wish)
    for header in proxied(victim):
        say(server.tcp_proxy_port, header + b"hello")
        say(server.connection_port, header + b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n\r\n" % victim)
    for fields in (b"x-tinytun-type: http\r\nx-tinytun-host-header: 127.0.0.1:%d", b"x-tinytun-type: tcp"):
        wish = b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % victim + fields.replace(b"%d", b"%d" % victim)
        say(server.connection_port, wish + b"\r\n\r\n")


@pytest.mark.parametrize("trusted", ["", OUTSIDE])
def test_without_peers_the_server_connects_to_nobody(
    start_server: StartServer, victim: int, trusted: str
) -> None:
    server = start_server(trusted_proxies=trusted, tcp_listen="off")
    with RawClient(server), CALLS.noted():
        try_everything(server, victim, b"nobody")
        try_everything(server, victim, b"-")
    assert CALLS.seen == []


@pytest.mark.parametrize("trusted", ["", OUTSIDE])
def test_with_peers_it_connects_to_them_alone(start_server: StartServer, victim: int, trusted: str) -> None:
    """The peer has every tunnel that is asked for, so that visitors are led to it as often as can be."""
    peer = FakePeer(has("demo", 30_000))
    with Service(answering(lambda _: respond(b"from the peer"))) as web, Service(lambda peer: None) as tcp:
        server = start_server(
            peers=f"127.0.0.1:{peer.port}:{web.port}:{tcp.port}",
            trusted_proxies=trusted,
            tcp_listen="off",
        )
        eventually(lambda: server.core.peers.is_peer("127.0.0.1"))
        with CALLS.noted():
            try_everything(server, victim, b"demo")
            with dial(server.proxy_port) as sock:
                sock.sendall(request())
                assert read_response(sock).body == b"from the peer"
            say(server.tcp_proxy_port, build_v2(("192.0.2.7", 1), ("127.0.0.1", 30_000)))
        peer.close()
    led = {("127.0.0.1", peer.port), ("127.0.0.1", web.port)}
    assert set(CALLS.seen) == led | ({("127.0.0.1", tcp.port)} if trusted else set())
    assert victim not in {port for _, port in led}


def test_a_hop_is_believed_from_peers_only(start_server: StartServer) -> None:
    """Who says that his request was forwarded once is a visitor like others: his is sent on all the same."""
    peer = FakePeer(has("demo"))
    with Service() as web:
        server = start_server(peers=f"127.0.0.1:{peer.port}:{web.port}:1")
        eventually(lambda: server.core.peers.is_peer("127.0.0.1"))
        with dial(server.proxy_port) as sock:
            sock.sendall(request("demo", "/", b"X-Tinytun-Hop: 1"))
            assert read_response(sock).status == 200
        with socket.create_connection(("127.0.0.1", server.proxy_port), DEADLINE) as sock:
            sock.sendall(request("demo", "/", b"X-Tinytun-Hop: 1"))
            assert read_response(sock).status == 404
        peer.close()
        (sent_on,) = web.requests
        assert sent_on.all(b"X-Tinytun-Hop") == [b"1"]  # the server's own


# -- metadata -----------------------------------------------------------------

PATHS = ("/tunnels", "/tunnels/app", "/tunnels/", "/metrics", "/healthz", "/ready", "/status")
METADATA_NAME = "meta.example.com"


@pytest.fixture
def public(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, tmp_path: Any
) -> TunnelServer:
    """A server with a tunnel ``app``, whose service says so."""
    install(tmp_path, issue("demo.localhost"))
    server = start_server(
        tls_dir=str(tmp_path),
        proxy_tls_port=0,
        trusted_proxies="192.0.2.1",
        metadata_hosts=METADATA_NAME,
    )
    open_tunnel(start_service(answering(lambda _: respond(b"the service"))), "app", server=server)
    return server


def hosts(server: TunnelServer) -> list[str]:
    names = [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        METADATA_NAME,
        "metadata.localhost",
        "evil.example",
    ]
    ports = (server.metadata_port, server.proxy_port, 80)
    return [*names, *(f"{name}:{port}" for name in names[:2] for port in ports)]


def requests_for(server: TunnelServer, path: str) -> list[bytes]:
    """Requests for a path of the metadata API in every way."""
    own, close = f"127.0.0.1:{server.metadata_port}", "Connection: close\r\n\r\n"
    texts = [
        *(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{close}" for host in hosts(server)),
        f"GET http://{own}{path} HTTP/1.1\r\nHost: evil.example\r\n{close}",
        f"GET http://localhost{path} HTTP/1.1\r\nHost: localhost\r\n{close}",
        f"GET {path} HTTP/1.1\r\n{close}",
        f"GET {path} HTTP/1.0\r\n\r\n",
    ]
    return [text.encode() for text in texts]


def whole_answer(sock: socket.socket, data: bytes) -> bytes:
    """Everything that is answered to ``data``, until the end."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        sock.sendall(data)
        while piece := sock.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize("path", PATHS)
def test_no_metadata_on_public_ports(public: TunnelServer, path: str) -> None:
    tunnel = public.registry.tunnels["app"]
    ways: dict[str, Callable[[], socket.socket]] = {
        "proxy": lambda: dial(public.proxy_port),
        "https": lambda: visit_by_tls(public.proxy_tls_port),
        "connection": lambda: dial(public.connection_port),
        "TCP proxy": lambda: dial(public.tcp_proxy_port),
    }
    for way, connect in ways.items():
        for wanted in requests_for(public, path):
            try:
                with connect() as sock:
                    answer = whole_answer(sock, wanted)
            except ConnectionError:
                answer = b""
            for secret in (
                tunnel.id.encode(),
                b"read_bytes",
                b"Subdomain",
                b"tinytun_",
                b"draining",
                b"ready",
            ):
                assert secret not in answer, (way, wanted)
            status = answer.split(b" ")[1] if answer else b""
            expected = {"connection": (b"200",), "TCP proxy": (b"",)}.get(way, (b"400", b"404", b"421"))
            assert status in expected, (way, wanted)
    # Where it is asked for at a tunnel, the service answers; where it may be asked for, the API does.
    with dial(public.proxy_port) as sock:
        sock.sendall(request("app", path))
        assert read_response(sock).body == b"the service"
    with dial(public.metadata_port) as sock:
        sock.sendall(b"GET /tunnels HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert tunnel.id.encode() in read_response(sock).body


def test_a_load_balancer_s_header_leads_to_no_port_of_the_server_s_own(start_server: StartServer) -> None:
    server = start_server(trusted_proxies=OUTSIDE)
    ports = (server.metadata_port, server.proxy_port, server.connection_port, server.tcp_proxy_port, 5553)
    with CALLS.noted():
        for port in ports:
            with dial(server.tcp_proxy_port) as sock:
                header = build_v2(("192.0.2.7", 1), ("127.0.0.1", port))
                assert whole_answer(sock, header + b"GET /tunnels HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
    assert CALLS.seen == []
