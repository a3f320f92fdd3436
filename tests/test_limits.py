"""Limits end to end, over real sockets: who is told what, who waits, how fast bytes pass."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import OpenTunnel, Standstill, StartServer, StartService
from helpers import MIB, Process
from raw_client import RawClient
from support import (
    DEADLINE,
    Peer,
    Request,
    Response,
    Source,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    request,
    reset,
    respond,
)

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.server.account import Account, Limits
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.wire.proxyproto import build_v2

PORTS = "20000-32000"


def port_of(tunnel: Tunnel) -> int:
    return int(tunnel.url.rpartition(":")[2])


def give(server: TunnelServer, account: Account) -> Account:
    """Everybody who opens a tunnel from now on is that one."""
    server.core.authorize = lambda request, address: account  # type: ignore[method-assign]
    return account


def refusals(server: TunnelServer, reason: Refusal) -> int:
    return server.core.tally.refusals[reason]


def check_limit(answer: Response, status: int, limit: str) -> None:
    """An answer in which everybody can read which limit it was, and when to come again."""
    assert answer.status == status
    assert int(answer.get(b"retry-after") or b"0") >= 1
    assert answer.get(b"x-tinytun-limit") == limit.encode()
    assert json.loads(answer.body)["limit"] == limit


def holding(peer: Peer) -> None:
    """A service that answers ``/hold`` when it is told to, and everything else at once."""
    while (got := peer.read_request()) is not None:
        if got.target == b"/hold":
            HOLD.wait(DEADLINE)
        peer.sendall(respond(b"ok"))


HOLD = threading.Event()


def has_come(sock: socket.socket) -> bool:
    """Whether something can be read, be it the end."""
    return bool(select.select([sock], [], [], 0)[0])


pytestmark = pytest.mark.usefixtures("standstill")


@pytest.fixture(autouse=True)
def hold(start_service: StartService) -> Iterator[None]:
    """Whoever is held at the end of a test is let go before its service is closed."""
    HOLD.clear()
    yield
    HOLD.set()


# -- opening tunnels ------------------------------------------------------------


def test_one_tunnel_too_many_is_answered_429_and_opens_when_there_is_room(
    server: TunnelServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    give(server, Account("a", "alice", Limits(tunnels=1)))
    first = open_tunnel(start_service(), "one")
    with connect(server.connection_port) as client:
        client.sendall(b"CONNECT x:1 HTTP/1.1\r\nx-tinytun-type: http\r\n\r\n")
        answer = read_response(client)
    assert answer.status == 429
    assert answer.get(b"retry-after") == b"10"
    assert b"limit of tunnels" in answer.body
    trying = Process("tinytun", "http", "1", "--server", server.url)
    try:
        trying.wait_line(r"The limit of tunnels at once is reached: your token has 1 \(429\)")
    finally:
        trying.kill()
    assert refusals(server, Refusal.TUNNELS) >= 2
    assert len(server.registry.tunnels) == 1
    first.close()
    open_tunnel(start_service(), "two")


def test_a_tunnel_that_is_refused_has_no_port(server: TunnelServer) -> None:
    give(server, Account("a", "alice", Limits(tunnels=1)))
    with RawClient(server):
        with connect(server.connection_port) as client:
            client.sendall(b"CONNECT x:1 HTTP/1.1\r\nx-tinytun-type: tcp\r\n\r\n")
            assert read_response(client).status == 429
        assert list(server.registry.tunnels) == ["demo"]


# -- HTTP visitors ----------------------------------------------------------------


def test_a_visitor_too_many_is_answered_503_while_the_others_are_there(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_visitors=1)
    service = start_service(holding)
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as first:
        first.sendall(request(target="/hold"))
        eventually(lambda: service.requests)
        with connect(server.proxy_port) as second:
            second.sendall(request())
            check_limit(read_response(second), 503, "visitors")
            HOLD.set()
            assert read_response(first).status == 200
            second.sendall(request())  # on the same connection
            assert read_response(second).status == 200
    assert refusals(server, Refusal.VISITORS) == 1


def test_an_upgraded_connection_is_a_visitor_until_it_ends(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    def upgrading(peer: Peer) -> None:
        got = peer.read_request()
        assert got is not None
        if got.get(b"upgrade") is None:
            peer.sendall(respond())
            return
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        while data := peer.sock.recv(1000):
            peer.sendall(data)

    server = start_server(tunnel_visitors=1)
    open_tunnel(start_service(upgrading), server=server)
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request("demo", "/", b"Connection: Upgrade", b"Upgrade: x"))
        assert read_head(visitor).status == 101
        visitor.sendall(b"hello")
        assert Source(visitor).exactly(5) == b"hello"
        check_limit(get(server.proxy_port), 503, "visitors")
    eventually(lambda: get(server.proxy_port).status == 200)


@pytest.mark.parametrize("how", ["reset", "close"])
def test_whoever_leaves_early_makes_room(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService, how: str
) -> None:
    server = start_server(tunnel_visitors=1)
    service = start_service(holding)
    open_tunnel(service, server=server)
    visitor = connect(server.proxy_port)
    visitor.sendall(request(target="/hold", method=b"POST", body=b"x"))
    eventually(lambda: service.requests)
    (reset if how == "reset" else socket.socket.close)(visitor)
    if how == "close":
        HOLD.set()
    eventually(lambda: get(server.proxy_port).status == 200)


def test_requests_beyond_the_rate_are_answered_429_until_there_are_some_again(
    standstill: Standstill, start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_requests=5)
    service = start_service()
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as visitor:
        for _ in range(5):
            visitor.sendall(request())
            assert read_response(visitor).status == 200
        visitor.sendall(request())
        check_limit(read_response(visitor), 429, "requests")
        assert len(service.requests) == 5

        def again() -> bool:
            visitor.sendall(request())
            return read_response(visitor).status == 200

        standstill.now += 0.1
        assert not again()
        standstill.now += 0.1
        assert again()
    assert refusals(server, Refusal.REQUESTS) == 2


def test_a_refused_upload_ends_its_connection(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_requests=1)
    open_tunnel(start_service(), server=server)
    assert get(server.proxy_port).status == 200
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request("demo", "/", b"Content-Length: 1000000", method=b"POST"))
        answer = read_response(visitor)
        check_limit(answer, 429, "requests")
        assert answer.get(b"connection") == b"close"


def test_a_browser_gets_a_page(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_requests=1)
    open_tunnel(start_service(), server=server)
    assert get(server.proxy_port).status == 200
    answer = get(server.proxy_port, "demo", "/", b"Accept: text/html")
    assert answer.status == 429
    assert b"as many requests a second as it may have" in answer.body
    assert answer.get(b"x-tinytun-limit") == b"requests"


def test_limits_of_an_account_hold_over_its_tunnels_and_of_nobody_else(
    server: TunnelServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    service = start_service(holding)
    give(server, Account("a", "alice", Limits(visitors=1)))
    open_tunnel(service, "one")
    open_tunnel(service, "two")
    give(server, Account("b", "bob", Limits(visitors=1)))
    open_tunnel(service, "three")
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request("one", "/hold"))
        eventually(lambda: service.requests)
        check_limit(get(server.proxy_port, "two"), 503, "visitors")
        assert get(server.proxy_port, "three").status == 200


# -- connects ---------------------------------------------------------------------


def test_connects_beyond_the_rate_are_answered_429(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(connect_rate=1, connect_burst=3)
    open_tunnel(start_service(), server=server)
    assert [get(server.proxy_port).status for _ in range(3)] == [200] * 3
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request())
        answer = read_response(visitor)
        check_limit(answer, 429, "connects")
        assert answer.get(b"connection") == b"close"
        assert visitor.recv(1) == b""
    assert refusals(server, Refusal.CONNECTS) == 1
    assert get(server.proxy_port, "demo", "/", method=b"HEAD").status == 429


def test_a_silent_connection_too_many_is_told_and_closed(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinytun_gevent.server.connects.HEARD", 0.05)
    server = start_server(connect_rate=1, connect_burst=1)
    connect(server.proxy_port).close()
    with connect(server.proxy_port) as visitor:
        check_limit(read_response(visitor), 429, "connects")
        assert visitor.recv(1) == b""


def test_a_flood_is_answered_without_waiting(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinytun_gevent.server.connects.MOST_TOLD", 0)
    monkeypatch.setattr("tinytun_gevent.server.connects.HEARD", 2 * DEADLINE)
    server = start_server(connect_rate=1, connect_burst=1)
    connect(server.proxy_port).close()
    with connect(server.proxy_port) as visitor:
        check_limit(read_response(visitor), 429, "connects")  # although he asks nothing


def test_a_trusted_proxy_may_connect_as_often_as_it_likes(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(connect_rate=1, connect_burst=1, trusted_proxies="127.0.0.1")
    open_tunnel(start_service(), server=server)
    for _ in range(5):
        assert get(server.proxy_port, "demo", "/", b"X-Forwarded-For: 192.0.2.1").status == 200


def echo(peer: Peer) -> None:
    while data := peer.sock.recv(65536):
        peer.sock.sendall(data)


def answers(port: int, timeout: float = DEADLINE) -> bool:
    """Whether a TCP visitor gets an echo; False if he is cut off, TimeoutError if he waits."""
    try:
        with connect(port, timeout=timeout) as visitor:
            visitor.sendall(b"hello")
            return visitor.recv(5) == b"hello"
    except (BrokenPipeError, ConnectionResetError):
        return False


def test_tcp_connects_beyond_the_rate_wait_for_their_turn(
    standstill: Standstill, start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(connect_rate=5, connect_burst=1, tcp_ports=PORTS, queue_timeout=0.3)
    port = port_of(open_tunnel(start_service(echo), server=server, kind="tcp"))
    began = time.monotonic()
    assert answers(port)
    assert answers(port)
    assert time.monotonic() - began > 0.15
    assert not answers(port)  # by a clock that stands still that would be 0.4 s
    assert refusals(server, Refusal.CONNECTS) == 1


# -- TCP visitors -------------------------------------------------------------------


def test_tcp_visitors_wait_in_the_backlog_until_there_is_room(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_visitors=2, tcp_ports=PORTS)
    service = start_service(echo)
    port = port_of(open_tunnel(service, server=server, kind="tcp"))
    visitors = [connect(port) for _ in range(5)]
    try:
        for visitor in visitors:
            visitor.sendall(b"hello")
        for visitor in visitors[:2]:
            assert Source(visitor).exactly(5) == b"hello"
        for visitor in visitors[:2]:
            visitor.sendall(b"again")
            assert Source(visitor).exactly(5) == b"again"
        assert not has_come(visitors[2])
        assert len(service.peers) == 2
        for gone, waiting in ((0, 2), (1, 3), (2, 4)):
            visitors[gone].close()
            assert Source(visitors[waiting]).exactly(5) == b"hello"
    finally:
        for visitor in visitors:
            visitor.close()


def test_tcp_visitors_of_one_tunnel_make_room_for_those_of_another(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tcp_ports=PORTS)
    give(server, Account("a", "alice", Limits(visitors=1)))
    ports = [port_of(open_tunnel(start_service(echo), server=server, kind="tcp")) for _ in range(2)]
    with connect(ports[0]) as first:
        first.sendall(b"hello")
        assert Source(first).exactly(5) == b"hello"
        with connect(ports[1]) as second:
            second.sendall(b"hello")
            first.sendall(b"again")
            assert Source(first).exactly(5) == b"again"
            assert not has_come(second)
            first.close()
            assert Source(second).exactly(5) == b"hello"


def test_behind_a_balancer_a_visitor_is_held_until_there_is_room(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    def come(server: TunnelServer, port: int) -> socket.socket:
        sock = connect(server.tcp_proxy_port)
        sock.sendall(build_v2(("192.0.2.1", 1), ("127.0.0.1", port)) + b"hello")
        return sock

    for patience in (DEADLINE, 0.2):
        server = start_server(
            tunnel_visitors=1, tcp_ports=PORTS, trusted_proxies="127.0.0.1", queue_timeout=patience
        )
        port = port_of(open_tunnel(start_service(echo), server=server, kind="tcp"))
        with come(server, port) as first:
            assert Source(first).exactly(5) == b"hello"
            with come(server, port) as second:
                if patience == DEADLINE:
                    first.sendall(b"again")
                    assert Source(first).exactly(5) == b"again"
                    assert not has_come(second)
                    first.close()
                    assert Source(second).exactly(5) == b"hello"
                else:
                    with pytest.raises(ConnectionResetError):
                        second.recv(1)
        assert refusals(server, Refusal.VISITORS) == (patience != DEADLINE)


# -- bytes a second: ``benchmarks.limits`` holds how many are exactly as many as may be -------------


def endless(peer: Peer) -> None:
    """Downloads without an end, uploads that are thrown away, and small answers."""
    got = peer.read_head()
    if got is None:
        return
    if got.method == b"POST":
        while peer.sock.recv(65536):
            pass
    elif got.target == b"/small":
        peer.sendall(respond(b"small"))
    else:
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 40))
        while True:
            peer.sendall(b"x" * 65536)


MEGABYTE = 1_000_000


def test_carried_connections_are_limited_both_ways(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    """All bytes arrive, in order, not faster than they may."""
    server = start_server(tcp_ports=PORTS, tunnel_rate=MEGABYTE)
    port = port_of(open_tunnel(start_service(echo), server=server, kind="tcp"))
    payload = bytes(range(256)) * 1000
    with connect(port) as visitor:
        began = time.monotonic()
        sender = threading.Thread(target=visitor.sendall, args=(payload,))
        sender.start()
        assert Source(visitor).exactly(len(payload)) == payload
        took = time.monotonic() - began
        sender.join()
        visitor.shutdown(socket.SHUT_WR)
        assert visitor.recv(1) == b""
    assert took > 0.43  # twice 256,000 bytes, of which 50,000 may come at once


def test_upgraded_connections_are_limited(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    def upgrading(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
        echo(peer)

    server = start_server(tunnel_rate=MEGABYTE)
    open_tunnel(start_service(upgrading), server=server)
    payload = bytes(range(256)) * 600
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request("demo", "/", b"Connection: Upgrade", b"Upgrade: x"))
        assert read_head(visitor).status == 101
        began = time.monotonic()
        visitor.sendall(payload)
        assert Source(visitor).exactly(len(payload)) == payload
        assert time.monotonic() - began > 0.22


def test_what_waits_for_its_turn_is_bounded(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_rate=10_000)
    service = start_service(endless)
    tunnel = open_tunnel(service, server=server)
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request())
        read_head(visitor)
        known = server.registry.tunnels["demo"]
        eventually(lambda: known.sessions[0].backlog > 100_000)
        for _ in range(5):
            visitor.recv(65536)
            assert known.sessions[0].backlog < MIB
    assert tunnel.url


def test_chunked_uploads_and_pipelined_requests_pass_whole(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    def bodies(got: Request) -> bytes:
        return respond(b"%d" % len(got.body))

    server = start_server(tunnel_rate=MEGABYTE)
    service = start_service(lambda peer: _answer_all(peer, bodies))
    open_tunnel(service, server=server)
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    with connect(server.proxy_port) as visitor:
        whole = (
            request("demo", "/", b"Transfer-Encoding: chunked", method=b"POST") + 15 * chunk + b"0\r\n\r\n"
        )
        visitor.sendall(whole + request("demo", "/", method=b"POST", body=bytes(70_000)) + request())
        assert [read_response(visitor).body for _ in range(3)] == [b"150000", b"70000", b"0"]


def _answer_all(peer: Peer, answer: Callable[[Request], bytes]) -> None:
    while (got := peer.read_request()) is not None:
        peer.sendall(answer(got))


# -- what the server is told ------------------------------------------------------------


def test_defaults_become_limits(start_server: StartServer) -> None:
    server = start_server(token_tunnels=1, token_visitors=2, token_requests=3, token_rate=4)
    assert server.config.token_limits == Limits(1, 2, 3, 4)
    options: dict[str, Any] = {"tunnel_visitors": 5, "tunnel_requests": 6, "tunnel_rate": 7}
    assert start_server(**options).config.tunnel_limits == Limits(0, 5, 6, 7)


def test_without_limits_visitors_are_not_counted(
    start_server: StartServer, open_tunnel: OpenTunnel, start_service: StartService
) -> None:
    server = start_server(tunnel_visitors=0)
    open_tunnel(start_service(), server=server)
    assert server.registry.tunnels["demo"].budget is None
    assert get(server.proxy_port).status == 200
    assert server.core.connects is None
