"""Visitors that leave: what their FIN means, and who is told of it; by hand and end to end."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from certificates import AUTHORITY, install, issue
from conftest import FastClock, OpenTunnel, StartServer, StartService
from free_ports import free_ports
from support import (
    DEADLINE,
    Peer,
    Service,
    Source,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    read_rest,
    request,
    reset,
    respond,
)
from test_real_programs import daemon, listens, program

from tinytun_gevent import TunnelServer, sockets
from tinytun_gevent.server import leaving
from tinytun_gevent.server.core import Observed
from tinytun_gevent.server.edge import Edge
from tinytun_gevent.server.leaving import HalfClosed, is_gone
from tinytun_gevent.wire.http1 import HeadLimits, parse_request_head

CLOSE = b"Connection: close"
UPGRADE = (b"Connection: Upgrade", b"Upgrade: websocket")

BEGUN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n"
"""An answer that has begun, and pauses: as of server-sent events."""


# -- the rule ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("minor", "fields", "gone"),
    [
        (1, (), True),
        (1, (CLOSE,), False),
        (1, UPGRADE, False),
        (0, (), False),
        (0, (b"Connection: keep-alive",), False),
    ],
    ids=["1.1", "close", "upgrade", "1.0", "1.0 with keep-alive"],
)
def test_what_a_fin_means(minor: int, fields: tuple[bytes, ...], gone: bool) -> None:
    head = parse_request_head(request("demo", "/", *fields, minor=minor), HeadLimits(16384, 100))
    assert is_gone(head, proxied=False) is gone
    assert is_gone(head, proxied=True)


def test_silence_ends_the_grace_and_progress_begins_it_anew() -> None:
    visitor = HalfClosed(100.0, 0)
    assert not visitor.look(110.0, 0, taking=False)
    assert not visitor.look(110.1, 1, taking=False)  # a byte has passed
    assert not visitor.look(120.1, 1, taking=False)
    assert visitor.look(120.2, 1, taking=False)


def test_the_time_in_which_bytes_wait_for_the_visitor_is_no_silence() -> None:
    visitor = HalfClosed(0.0, 0)
    for second in range(1, 100):
        assert not visitor.look(float(second), 0, taking=True)
    assert visitor.look(99 + leaving.HALF_CLOSED_GRACE + 1, 0, taking=False)


# -- a service that never answers, or pauses for ever ----------------------------------------------


def slow(peer: Peer) -> None:
    """Answers ``/fast`` at once; begins with ``/events``; says nothing to anything else."""
    while (got := peer.read_head()) is not None:
        if got.target == b"/fast":
            peer.sendall(respond(b"fast"))
            continue
        if got.target == b"/events":
            peer.sendall(BEGUN)
        peer.wait_end()
        return


class Seen(list[Observed]):
    """The exchanges of a server that are over."""

    def __init__(self, server: TunnelServer) -> None:
        super().__init__()
        server.core.observers.append(self.append)

    def left(self, count: int, seconds: float = DEADLINE) -> None:
        """Waits until so many have ended because their visitors left, as 499 for the access log."""
        eventually(lambda: len(self.departed) == count, seconds, f"{count} visitors have left")

    @property
    def departed(self) -> list[Observed]:
        return [exchange for exchange in self if not exchange.status]


def told(service: Service, count: int = 1) -> None:
    """Waits until the service has learned of ``count`` visitors that left."""
    eventually(lambda: sum(peer.ended.is_set() for peer in service.peers) >= count)


@pytest.fixture
def seen(server: TunnelServer) -> Seen:
    return Seen(server)


def test_curls_that_give_up_free_their_places(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, seen: Seen
) -> None:
    service = start_service(slow)
    open_tunnel(service, concurrency=20)
    url = f"http://demo.localhost:{server.proxy_port}/slow"
    curl = [program("curl"), "-s", "--resolve", f"demo.localhost:{server.proxy_port}:127.0.0.1", url]
    curls = [subprocess.Popen(curl) for _ in range(20)]
    eventually(lambda: len(service.requests) == 20)
    for visitor in curls:
        visitor.terminate()
        visitor.wait(DEADLINE)
    seen.left(20)
    told(service, 20)
    assert get(server.proxy_port, "demo", "/fast").body == b"fast"


def test_closed_tabs_of_a_silent_event_stream_free_their_places(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, seen: Seen
) -> None:
    service = start_service(slow)
    open_tunnel(service, concurrency=20)
    for _ in range(20):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/events"))
            assert read_head(sock).status == 200
    seen.left(20)
    assert {exchange.response_bytes for exchange in seen} == {len(BEGUN.partition(b"\r\n\r\n")[2])}
    told(service, 20)
    assert get(server.proxy_port, "demo", "/fast").body == b"fast"


@pytest.mark.parametrize("target", ["/slow", "/events"])
def test_an_https_visitor_that_leaves_is_noticed(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    tmp_path: Path,
    target: str,
) -> None:
    install(tmp_path, issue("*.localhost", "demo.localhost"))
    server = start_server(tls_dir=str(tmp_path), proxy_tls_port=0)
    service, seen = start_service(slow), Seen(server)
    open_tunnel(service, server=server)
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    with (
        connect(server.proxy_tls_port) as sock,
        context.wrap_socket(sock, server_hostname="demo.localhost") as visitor,
    ):
        visitor.sendall(request("demo", target))
        eventually(lambda: service.requests)
        if target == "/events":
            assert visitor.recv(100).startswith(b"HTTP/1.1 200 ")
        with contextlib.suppress(OSError):
            visitor._sslobj.shutdown()  # type: ignore[attr-defined] # close_notify; unwrap waits for another
    seen.left(1)
    told(service)


def test_a_visitor_that_leaves_with_an_unread_upload_is_noticed(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, seen: Seen
) -> None:
    """The service reads nothing of the body, so the FIN waits in the kernel behind the rest of it."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        assert go_on.wait(3 * DEADLINE)

    service = start_service(script)
    open_tunnel(service)
    size = 32 * 1024 * 1024
    try:
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/", b"Content-Length: %d" % size, method=b"POST"))
            (session,) = server.registry.tunnels["demo"].sessions
            sock.setblocking(False)

            def is_full() -> bool:
                """Whether the service's kernel and all windows are; what the visitor may send is sent."""
                with contextlib.suppress(BlockingIOError):
                    sock.send(bytes(65536))
                return bool(session.blocked)

            eventually(is_full)
        seen.left(1)
    finally:
        go_on.set()


def test_a_visitor_that_leaves_the_queue_is_not_served(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, seen: Seen
) -> None:
    service = start_service(slow)
    open_tunnel(service, concurrency=1)
    with connect(server.proxy_port) as busy:
        busy.sendall(request("demo", "/events"))
        assert read_head(busy).status == 200
        with connect(server.proxy_port) as waiting:
            waiting.sendall(request("demo", "/waiting"))
            pool = server.registry.tunnels["demo"].pool
            eventually(lambda: pool.waiting_count == 1)
        seen.left(1, 4)  # it would wait for five seconds
        eventually(lambda: not pool.waiting_count)
    assert get(server.proxy_port, "demo", "/fast").body == b"fast"
    assert [got.target for got in service.requests] == [b"/events", b"/fast"]


@pytest.mark.parametrize("port", ["proxy_port", "proxy_tls_port"])
def test_the_kernel_asks_whether_a_silent_visitor_is_still_there(
    start_server: StartServer, tmp_path: Path, port: str
) -> None:
    """One that has vanished without a FIN; what is on the listening socket is on its connections."""
    install(tmp_path, issue("demo.localhost"))
    server = start_server(tls_dir=str(tmp_path), proxy_tls_port=0)
    front = next(front for front in server.core.fronts if isinstance(front, Edge))
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(connect(getattr(server, port)))
        if port == "proxy_tls_port":
            stack.enter_context(context.wrap_socket(sock, server_hostname="demo.localhost"))
        eventually(lambda: front.visitors)
        (visitor,) = front._visitors
        taken = visitor.end.sock
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        for name, value in sockets.KEEP_ALIVE:
            assert taken.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value


# -- visitors that only half-close -----------------------------------------------------------------


def until_left(clock: FastClock, seen: Seen) -> None:
    """Lets the grace pass, again and again, until a visitor has left."""
    eventually(lambda: (clock.forward(leaving.HALF_CLOSED_GRACE + 1), seen.departed)[1])


HALF_CLOSING = {
    "close": request("demo", "/slow", CLOSE),
    "1.0": request("demo", "/slow", minor=0),
    "upgrade": request("demo", "/slow", *UPGRADE),
    "pipelined": request("demo", "/slow") + request("demo", "/next"),
}


@pytest.mark.parametrize("sent", HALF_CLOSING.values(), ids=HALF_CLOSING)
def test_a_visitor_that_may_still_read_gets_an_answer_that_takes_a_while(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, seen: Seen, sent: bytes
) -> None:
    """The clock has looked at it more than once before the answer."""
    ticks = threading.Event()

    def script(peer: Peer) -> None:
        while (got := peer.read_head()) is not None:
            assert ticks.wait(DEADLINE)
            peer.sendall(respond(got.target))

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        looks: list[float] = []
        server.core.clock.watch(type("Looks", (), {"tick": staticmethod(looks.append)})())
        eventually(lambda: len(looks) > 1)
        ticks.set()
        assert read_response(sock).body == b"/slow"
    eventually(lambda: [exchange.status for exchange in seen][:1] == [200])


@pytest.mark.parametrize("sent", HALF_CLOSING.values(), ids=HALF_CLOSING)
def test_it_does_not_wait_for_ever(
    fast_clock: FastClock,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    sent: bytes,
) -> None:
    server = start_server()
    service, seen = start_service(slow), Seen(server)
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        until_left(fast_clock, seen)
        assert sock.recv(1) == b""
    seen.left(1)
    told(service)


def test_not_within_its_answer_either_which_must_not_look_whole(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server()
    service, seen = start_service(slow), Seen(server)
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/events", CLOSE))
        sock.shutdown(socket.SHUT_WR)
        assert read_head(sock).status == 200
        until_left(fast_clock, seen)
        with pytest.raises(ConnectionResetError):
            read_rest(sock)
    seen.left(1)
    told(service)


def test_an_answer_that_goes_on_is_delivered_to_its_end(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    more = threading.Semaphore(0)

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(BEGUN)
        for _ in range(10):
            assert more.acquire(timeout=DEADLINE)
            peer.sendall(b"data: more\n\n")

    server = start_server()
    open_tunnel(start_service(script), server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", CLOSE))
        sock.shutdown(socket.SHUT_WR)
        assert read_head(sock).status == 200
        source = Source(sock)
        assert source.exactly(9) == b"data: 1\n\n"
        for _ in range(10):
            fast_clock.forward(0)  # it has been looked at since the last piece
            fast_clock.forward(leaving.HALF_CLOSED_GRACE / 2)
            more.release()
            assert source.exactly(12) == b"data: more\n\n"
        assert source.rest() == b""


@pytest.mark.usefixtures("fast_clock")
def test_a_half_closed_visitor_is_the_first_to_go(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """As many of them go as others wait, and nobody else does."""
    server = start_server()
    service, seen = start_service(slow), Seen(server)
    open_tunnel(service, server=server, concurrency=3)
    with contextlib.ExitStack() as stack:
        for fields in ((), (CLOSE,), (CLOSE,)):
            sock = stack.enter_context(connect(server.proxy_port))
            sock.sendall(request("demo", "/events", *fields))
            assert read_head(sock).status == 200
            if fields:
                sock.shutdown(socket.SHUT_WR)
        assert get(server.proxy_port, "demo", "/fast").body == b"fast"
        assert len(seen.departed) == 1
        assert not seen.departed[0].request.keep_alive  # type: ignore[union-attr]


# -- through a reverse proxy -----------------------------------------------------------------------

NGINX = """
daemon off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{server};
    proxy_set_header Host $host; proxy_buffering off; {more} }} }}
}}
"""

HAPROXY = """
defaults
  mode http
  option abortonclose
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend visitors
  bind 127.0.0.1:{port}
  default_backend tunnels
backend tunnels
  server tinytun 127.0.0.1:{server}
"""


@contextlib.contextmanager
def in_front(name: str, server: TunnelServer, folder: Path) -> Iterator[int]:
    """The port of a reverse proxy in front of the server."""
    path, (port,) = program(name.partition(" ")[0]), free_ports(1)
    more = 'proxy_http_version 1.1; proxy_set_header Connection "";' if name == "nginx 1.1" else ""
    text = HAPROXY if name == "haproxy" else NGINX
    (folder / "conf").write_text(text.format(folder=folder, port=port, server=server.proxy_port, more=more))
    flags = ["-db", "-f"] if name == "haproxy" else ["-p", str(folder), "-c"]
    with daemon(path, *flags, str(folder / "conf"), ready=lambda: listens(port)):
        yield port


@pytest.mark.parametrize("target", ["/slow", "/events"])
@pytest.mark.parametrize("name", ["nginx", "nginx 1.1", "haproxy"])
def test_a_visitor_that_leaves_a_proxy_in_front_is_noticed(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    tmp_path: Path,
    name: str,
    target: str,
) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    service, seen = start_service(slow), Seen(server)
    open_tunnel(service, server=server)
    with in_front(name, server, tmp_path) as port:
        with connect(port) as sock:
            sock.sendall(request("demo", target))
            eventually(lambda: service.requests)
            if target == "/events":
                assert read_head(sock).status == 200
        seen.left(1, 5)
        told(service)
        with connect(port) as sock:
            sock.sendall(request("demo", target))
            eventually(lambda: len(service.requests) == 2)
            reset(sock)
        seen.left(2, 5)
        told(service, 2)
