"""The HTTP edge end to end: routing by request, forwarding fields, hop-by-hop, connections' ends."""

from __future__ import annotations

import errno
import itertools
import socket
import struct
import threading
from typing import Any

import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from support import (
    Fields,
    Peer,
    Request,
    Script,
    answering,
    connect,
    echo,
    eventually,
    get,
    parse_fields,
    read_head,
    read_response,
    read_rest,
    request,
    reset,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import SessionClosedError
from tinytun_gevent.server import edge, watch
from tinytun_gevent.server.pool import StreamPool

MIB = 1 << 20


def edge_of(server: TunnelServer) -> edge.Edge:
    return next(front for front in server.core.fronts if isinstance(front, edge.Edge))


def signed(name: str) -> Script:
    """A service that says who it is and what it was asked for."""
    return answering(lambda got: respond(b"%b %b %b" % (name.encode(), got.target, got.body)))


def seen(port: int, *fields: bytes, prefix: bytes = b"", name: str = "demo") -> Fields:
    """The fields of a request as an echoing service got it."""
    with connect(port) as sock:
        sock.sendall(prefix + request(name, "/", *fields))
        response = read_response(sock)
    assert response.status == 200, response
    return parse_fields(response.body.split(b"\r\n")[1:-2])


def forwarded(fields: Fields) -> dict[bytes, bytes]:
    """What the service is told of the visitor; each field once at most."""
    told = [(name[12:], value) for name, value in fields if name.startswith(b"X-Forwarded-")]
    assert len(told) == len(dict(told))
    return dict(told)


@pytest.fixture
def echoing(start_service: StartService, open_tunnel: OpenTunnel) -> None:
    """A tunnel ``demo`` to a service that answers with what it got."""
    open_tunnel(start_service(answering(echo)))


# -- routing ---------------------------------------------------------------------------------------


@pytest.fixture
def two_tunnels(start_service: StartService, open_tunnel: OpenTunnel) -> None:
    """Tunnels ``one`` and ``two`` to services that sign their answers."""
    for name in ("one", "two"):
        open_tunnel(start_service(signed(name)), name)


@pytest.mark.usefixtures("two_tunnels")
def test_one_connection_alternating_between_two_tunnels(server: TunnelServer) -> None:
    """1,000 requests, of which none may reach the wrong tunnel; the answers come in order."""
    names = itertools.cycle(("one", "two"))
    answered = 0
    with connect(server.proxy_port) as sock:
        for number in range(400):  # keep-alive
            name = next(names)
            sock.sendall(request(name, f"/{number}"))
            assert read_response(sock).body == f"{name} /{number} ".encode()
            answered += 1
        for batch in range(30):  # pipelined, every third with a body
            asked = [(next(names), f"/{batch}/{number}", b"x" * (number % 3)) for number in range(20)]
            sock.sendall(b"".join(request(name, path, body=body) for name, path, body in asked))
            for name, path, body in asked:
                assert read_response(sock).body == f"{name} {path} ".encode() + body
                answered += 1
    assert answered == 1000


@pytest.mark.usefixtures("two_tunnels")
def test_alternating_under_concurrency_with_chunked_and_head(server: TunnelServer) -> None:
    """Streams of both pools change hands between eight visitors meanwhile."""
    wrong: list[object] = []

    def visit(visitor: int) -> None:
        with connect(server.proxy_port) as sock:
            for number in range(60):
                name = ("one", "two")[(number + visitor) % 2]
                path = f"/{visitor}/{number}"
                chunked = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
                fields, body = ([chunked], b"abc") if number % 4 == 0 else ([], b"")
                method = b"HEAD" if number % 5 == 0 else b"POST"
                sock.sendall(request(name, path, *fields, method=method))
                response = read_response(sock, method)
                expected = f"{name} {path} ".encode() + body
                length = int(response.get(b"content-length") or b"-1")
                if length != len(expected) or response.body != (b"" if method == b"HEAD" else expected):
                    wrong.append((expected, response))

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


@pytest.mark.usefixtures("two_tunnels")
@pytest.mark.parametrize(
    ("target", "host"),
    [
        (b"/", b"ONE.LocalHost"),
        (b"/", b"one.localhost.:5555"),
        (b"/", b"one.localhost:"),
        (b"http://one.localhost/", b"two.localhost"),
        (b"HTTP://ONE.localhost.:80", b"two.localhost"),
    ],
)
def test_the_whole_host_is_compared(server: TunnelServer, target: bytes, host: bytes) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET %b HTTP/1.1\r\nHost: %b\r\n\r\n" % (target, host))
        assert read_response(sock).body == b"one / "


@pytest.mark.usefixtures("two_tunnels")
@pytest.mark.parametrize("host", [b"one", b"one.two.localhost", b"one.localhost.evil", b"xone.localhost"])
def test_a_similar_host_is_not_the_tunnel(server: TunnelServer, host: bytes) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert read_response(sock).status in (404, 421)


def test_several_base_domains(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(base_domains="localhost,tunnels.example")
    open_tunnel(start_service(), server=server)
    with connect(server.proxy_port) as sock:
        for host, status in ((b"localhost", 200), (b"tunnels.example", 200), (b"example", 404)):
            sock.sendall(b"GET / HTTP/1.1\r\nHost: demo.%b\r\n\r\n" % host)
            assert read_response(sock).status == status


def test_a_tunnel_that_was_closed_is_not_found_on_an_open_connection(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(signed("first")))
    with connect(server.proxy_port) as sock:
        sock.sendall(request())
        assert read_response(sock).body == b"first / "
        tunnel.close()
        sock.sendall(request())
        assert read_response(sock).status == 404
        open_tunnel(start_service(signed("second")))
        sock.sendall(request())
        assert read_response(sock).body == b"second / "


# -- who the visitor is ----------------------------------------------------------------------------


@pytest.mark.usefixtures("echoing")
def test_forwarding_fields_come_from_the_socket(server: TunnelServer) -> None:
    told = forwarded(seen(server.proxy_port))
    port = str(server.proxy_port).encode()
    expected = {b"For": b"127.0.0.1", b"Proto": b"http", b"Host": b"demo.localhost", b"Port": port}
    assert told == expected
    assert forwarded(seen(server.proxy_port, *LIES)) == expected


LIES = [
    b"X-Forwarded-For: 1.2.3.4",
    b"x-forwarded-for: 5.6.7.8",
    b"X-Forwarded-Proto: https",
    b"X-Forwarded-Host: evil.example",
    b"X-Forwarded-Port: 1",
    b"X-Forwarded-Server: evil",
    b"X_Forwarded_For: 1.2.3.4",
    b"X-Real-IP: 1.2.3.4",
    b"Forwarded: for=1.2.3.4;host=evil.example",
    b"FORWARDED: for=5.6.7.8",
    b"X-Forwarded-User: evil",
    b"x-forwarded_user: evil",
    b"X-FORWARDED-FOR: 5.6.7.8, 127.0.0.1",
    b"Client-IP: 1.2.3.4",
    b"CF-Connecting-IP: 1.2.3.4",
    b"x-real_ip: 1.2.3.4",
]


@pytest.mark.usefixtures("echoing")
@pytest.mark.parametrize(
    "named",
    [
        b"close",
        b"X-Forwarded-For, X-Forwarded-Proto",
        b"x-forwarded-for, keep-alive, X-Forwarded-Host, X-Forwarded-Port",
        b"X-Real-IP, Forwarded, X_Forwarded_For, Connection",
    ],
)
def test_nothing_of_a_visitor_s_own_forwarding_fields_arrives(server: TunnelServer, named: bytes) -> None:
    fields = seen(server.proxy_port, *LIES, b"Connection: " + named)
    port = str(server.proxy_port).encode()
    told = {b"For": b"127.0.0.1", b"Proto": b"http", b"Host": b"demo.localhost", b"Port": port}
    assert forwarded(fields) == told
    for name, value in fields:
        assert b"1.2.3.4" not in value, name
        assert b"5.6.7.8" not in value, name
        assert b"evil" not in value, name
        assert name.lower() not in (b"forwarded", b"x-real-ip")


@pytest.fixture
def trusting(start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel) -> TunnelServer:
    """A server that believes 127.0.0.1, with a tunnel ``demo`` to an echoing service."""
    server = start_server(trusted_proxies="127.0.0.1,10.0.0.0/8")
    open_tunnel(start_service(answering(echo)), server=server)
    return server


@pytest.mark.parametrize(
    ("fields", "client"),
    [
        ([], b"127.0.0.1"),
        ([b"X-Forwarded-For: 192.0.2.7"], b"192.0.2.7"),
        ([b"X-Forwarded-For: 6.6.6.6, 192.0.2.7"], b"192.0.2.7"),
        ([b"X-Forwarded-For: 6.6.6.6, 192.0.2.7, 10.1.2.3"], b"192.0.2.7"),
        ([b"X-Forwarded-For: 6.6.6.6", b"X-Forwarded-For: 192.0.2.7"], b"192.0.2.7"),
        ([b"X-Forwarded-For: 2001:db8::1"], b"2001:db8::1"),
        ([b'Forwarded: for="[2001:db8::1]:4711";proto=https'], b"2001:db8::1"),
        ([b"X-Forwarded-For: nonsense"], b"127.0.0.1"),
    ],
)
def test_a_trusted_proxy_is_believed(trusting: TunnelServer, fields: list[bytes], client: bytes) -> None:
    assert forwarded(seen(trusting.proxy_port, *fields))[b"For"] == client


def test_what_a_trusted_proxy_may_have_overlooked_does_not_arrive(trusting: TunnelServer) -> None:
    """It need not know every name under which a service believes something about its visitors."""
    told = seen(trusting.proxy_port, b"X-Forwarded-For: 192.0.2.7", *LIES[5:9], *LIES[10:12], *LIES[13:])
    assert forwarded(told)[b"For"] == b"192.0.2.7"
    for name, value in told:
        assert b"1.2.3.4" not in value, name
        assert b"evil" not in value, name


def test_a_trusted_proxy_says_scheme_host_and_port(trusting: TunnelServer) -> None:
    told = forwarded(
        seen(
            trusting.proxy_port,
            b"X-Forwarded-For: 192.0.2.7",
            b"X-Forwarded-Proto: https",
            b"X-Forwarded-Host: app.example:8443",
            b"X-Forwarded-Port: 8443",
        )
    )
    assert told == {b"For": b"192.0.2.7", b"Proto": b"https", b"Host": b"app.example:8443", b"Port": b"8443"}


def test_another_proxy_is_not_believed(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(trusted_proxies="192.0.2.1")
    open_tunnel(start_service(answering(echo)), server=server)
    assert forwarded(seen(server.proxy_port, b"X-Forwarded-For: 192.0.2.7"))[b"For"] == b"127.0.0.1"
    with connect(server.proxy_port) as sock:
        sock.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.8 1111 80\r\n" + request())
        assert read_response(sock).status == 400


def proxy_v2(family: int, addresses: bytes, command: int = 1, tlvs: bytes = b"") -> bytes:
    body = addresses + tlvs
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x20 | command, family, len(body)) + body


V4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("192.0.2.8") + struct.pack("!HH", 1111, 443)
V6 = b"".join(socket.inet_pton(socket.AF_INET6, ip) for ip in ("2001:db8::7", "2001:db8::8"))


@pytest.mark.parametrize(
    ("header", "client", "port"),
    [
        (b"PROXY TCP4 192.0.2.7 192.0.2.8 1111 443\r\n", b"192.0.2.7", b"443"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::8 1111 80\r\n", b"2001:db8::7", b"80"),
        (b"PROXY UNKNOWN\r\n", b"127.0.0.1", None),
        (proxy_v2(0x11, V4), b"192.0.2.7", b"443"),
        (proxy_v2(0x11, V4, tlvs=b"\x04\0\x02ab"), b"192.0.2.7", b"443"),
        (proxy_v2(0x21, V6 + struct.pack("!HH", 1111, 80)), b"2001:db8::7", b"80"),
        (proxy_v2(0x00, b"", command=0), b"127.0.0.1", None),
    ],
)
def test_a_trusted_proxy_s_proxy_header(
    trusting: TunnelServer, header: bytes, client: bytes, port: bytes | None
) -> None:
    told = forwarded(seen(trusting.proxy_port, prefix=header))
    assert told[b"For"] == client
    assert told[b"Port"] == (port or str(trusting.proxy_port).encode())


def test_a_proxy_header_in_drops_counts_for_the_whole_connection(trusting: TunnelServer) -> None:
    with connect(trusting.proxy_port) as sock:
        for byte in proxy_v2(0x11, V4):
            sock.sendall(bytes([byte]))
        for _ in range(2):
            sock.sendall(request())
            assert forwarded(parse_fields(read_response(sock).body.split(b"\r\n")))[b"For"] == b"192.0.2.7"


def test_the_client_of_a_proxy_header_is_not_believed_himself(trusting: TunnelServer) -> None:
    claim = b"X-Forwarded-For: 6.6.6.6"
    told = forwarded(seen(trusting.proxy_port, claim, prefix=proxy_v2(0x11, V4)))
    assert told[b"For"] == b"192.0.2.7"
    inner_proxy = proxy_v2(0x11, socket.inet_aton("10.1.1.1") + V4[4:])
    assert forwarded(seen(trusting.proxy_port, claim, prefix=inner_proxy))[b"For"] == b"6.6.6.6"


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY TCP4 192.0.2.7 nonsense 1111 443\r\n",
        b"PROXY " + b"x" * 600,
        b"\r\n\r\n\0\r\nQUIT\n\x91\x11\0\x0c" + V4,
        proxy_v2(0x11, V4)[:-1],
    ],
)
def test_a_broken_proxy_header_ends_that_connection_only(trusting: TunnelServer, header: bytes) -> None:
    with connect(trusting.proxy_port) as sock:
        sock.sendall(header)
        try:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        except TimeoutError:
            raise
        except OSError:
            pass  # a reset, before or after our end
    assert forwarded(seen(trusting.proxy_port))[b"For"] == b"127.0.0.1"


def test_an_unfinished_proxy_header_is_not_waited_for(
    start_server: StartServer, fast_clock: None
) -> None:
    server = start_server(trusted_proxies="127.0.0.1", proxy_header_timeout=0.2)
    with connect(server.proxy_port) as sock:
        sock.sendall(b"PROXY TCP4 192.0.2.7")
        assert b"200" not in read_rest(sock)


def test_a_connection_that_a_trusted_proxy_opens_in_advance_may_wait(
    start_server: StartServer, fast_clock: FastClock
) -> None:
    server = start_server(trusted_proxies="127.0.0.1", proxy_header_timeout=10)
    with connect(server.proxy_port) as sock:
        eventually(lambda: edge_of(server).visitors)
        fast_clock.forward(2 * server.config.proxy_header_timeout)
        sock.sendall(request("nobody"))
        assert read_response(sock).status == 404


# -- Host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["app.internal:8080", "rewrite"])
def test_host_header_is_what_the_service_sees(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, wanted: str
) -> None:
    service = start_service(answering(echo))
    open_tunnel(service, host_header=wanted)
    fields = seen(server.proxy_port)
    hosts = [value for name, value in fields if name.lower() == b"host"]
    assert hosts == [service.target.encode() if wanted == "rewrite" else wanted.encode()]
    assert forwarded(fields)[b"Host"] == b"demo.localhost"


@pytest.mark.usefixtures("echoing")
def test_without_it_the_visitor_s_own_host_is_kept(server: TunnelServer) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nhost: DEMO.localhost:8080\r\n\r\n")
        fields = parse_fields(read_response(sock).body.split(b"\r\n")[1:-2])
    assert [value for name, value in fields if name.lower() == b"host"] == [b"DEMO.localhost:8080"]


# -- what belongs to one connection ----------------------------------------------------------------


@pytest.mark.usefixtures("echoing")
def test_hop_by_hop_fields_of_a_request_stay_here(server: TunnelServer) -> None:
    fields = seen(
        server.proxy_port,
        b"Connection: keep-alive, X-Gone, TE",
        b"Keep-Alive: timeout=5",
        b"Proxy-Connection: keep-alive",
        b"TE: trailers",
        b"Upgrade: nothing",
        b"X-Gone: a",
        b"X-Kept: b",
    )
    names = {name.lower() for name, _ in fields}
    gone = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"x-gone"}
    assert not names & gone
    assert (b"X-Kept", b"b") in fields


def test_hop_by_hop_fields_of_a_response_stay_here(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    fields = (b"Connection: keep-alive, x-gone", b"Keep-Alive: a", b"Proxy-Connection: a", b"Upgrade: x")
    open_tunnel(start_service(answering(lambda _: respond(b"ok", *fields, b"X-Gone: a", b"X-Kept: b"))))
    response = get(server.proxy_port)
    names = {name.lower() for name, _ in response.fields}
    assert not names & {b"connection", b"keep-alive", b"proxy-connection", b"x-gone", b"upgrade"}
    assert response.get(b"x-kept") == b"b"


def test_a_visitor_s_close_does_not_close_the_service_s_connection(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service)
    for _ in range(5):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/", b"Connection: close"))
            response = read_response(sock)
            assert response.get(b"connection") == b"close"
            assert read_rest(sock) == b""
    assert len(service.peers) == 1
    assert len(service.requests) == 5
    assert all(got.get(b"connection") is None for got in service.requests)


def test_a_service_s_close_does_not_close_the_visitor_s_connection(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(respond(b"bye", b"Connection: close"))

    service = start_service(script)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        for _ in range(5):
            sock.sendall(request())
            response = read_response(sock)
            assert (response.status, response.body) == (200, b"bye")
            assert response.get(b"connection") is None
    assert len(service.peers) == 5


# -- the ends of connections -----------------------------------------------------------------------


def test_a_visitor_who_leaves_ends_his_exchange(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Before the answer and in the middle of it; the service must notice."""

    def script(peer: Peer) -> None:
        got = peer.read_request()
        if got is not None and got.target == b"/begun":
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
        peer.wait_end()

    service = start_service(script)
    open_tunnel(service)
    for number, target in enumerate(("/silent", "/begun")):
        sock = connect(server.proxy_port)
        sock.sendall(request("demo", target))
        peer = service.wait_peer(number)
        eventually(lambda peer=peer: peer.requests)
        if target == "/begun":
            assert read_head(sock).status == 200
        reset(sock)
        assert peer.ended.wait(60), f"the service was not told: {target}"
    eventually(lambda: edge_of(server).visitors == 0)


def test_a_visitor_who_leaves_in_the_middle_of_his_body(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    clean: list[bool] = []

    def script(peer: Peer) -> None:
        peer.read_head()
        clean.append(peer.wait_end())

    service = start_service(script)
    open_tunnel(service)
    for number, leave in enumerate((reset, socket.socket.close)):
        sock = connect(server.proxy_port)
        sock.sendall(request("demo", method=b"POST", body=b"x" * 1000)[:-500])
        peer = service.wait_peer(number)
        eventually(lambda peer=peer: peer.received.endswith(b"x" * 500))
        leave(sock)
        assert peer.ended.wait(60)
    assert clean == [False, False], "a truncated request must not look like a whole one"
    eventually(lambda: edge_of(server).visitors == 0)


def test_a_truncated_answer_is_cut_off_not_ended(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    begun = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ]
    gates = [threading.Event() for _ in range(4)]

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(begun[peer.number % 2])
        assert gates[peer.number].wait(60)
        if peer.number < 2:
            peer.reset()

    open_tunnel(start_service(script))
    for gate in gates:
        with connect(server.proxy_port) as sock:
            sock.sendall(request())
            assert read_head(sock).status == 200
            gate.set()
            with pytest.raises(ConnectionResetError):
                read_rest(sock)
    eventually(lambda: edge_of(server).visitors == 0)


def test_an_answer_until_the_close(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """It ends cleanly if the service ended cleanly, and is cut off if the service reset."""

    def script(peer: Peer) -> None:
        got = peer.read_request()
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\nhello")
        if got is not None and got.target == b"/reset":
            cut.wait(60)
            peer.reset()

    cut = threading.Event()
    open_tunnel(start_service(script))
    response = get(server.proxy_port)
    assert (response.body, response.get(b"connection")) == (b"hello", b"close")
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/reset"))
        assert read_head(sock).status == 200
        cut.set()
        with pytest.raises(ConnectionResetError):
            read_rest(sock)


def test_an_answer_before_the_body_s_end_is_delivered_and_both_sides_close(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    fast_clock: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "LINGER", 0.3)
    server = start_server()

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(respond(b"too much", status=b"413 Content Too Large"))
        peer.wait_end()

    service = start_service(script)
    open_tunnel(service, server=server)
    for stops in (True, False):
        with connect(server.proxy_port) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: demo.localhost\r\nContent-Length: 99999999\r\n\r\nhello")
            if not stops:  # goes on sending, as most clients do
                sender = threading.Thread(target=_send_until_refused, args=(sock,), daemon=True)
                sender.start()
            response = read_response(sock)
            assert (response.status, response.body) == (413, b"too much")
            assert response.get(b"connection") == b"close"
            assert sock.recv(1) == b""
            if not stops:
                sender.join(60)
                assert not sender.is_alive(), "the rest of the body was waited for"
    for peer in service.peers:
        assert peer.ended.wait(60)
    eventually(lambda: edge_of(server).visitors == 0)


def _send_until_refused(sock: socket.socket) -> None:
    try:
        while True:
            sock.sendall(b"x" * 65536)
    except OSError:
        pass


def test_what_the_service_sends_behind_an_answer_is_no_second_one(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    evil = respond(b"evil", b"Set-Cookie: evil")
    answers = [
        respond(b"fine") + evil,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nfine\r\n0\r\n\r\n" + evil,
        b"HTTP/1.1 204 No Content\r\n\r\n" + evil,
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 4\r\n\r\nevil" + evil,
    ]

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            peer.sendall(answers[int(got.target[1:])])

    service = start_service(script)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        for number in range(len(answers)):
            sock.sendall(request("demo", f"/{number}"))
            response = read_response(sock)
            assert response.status == (200, 200, 204, 304)[number]
            assert response.body in (b"fine", b"")
            assert b"evil" not in response.head
        sock.shutdown(socket.SHUT_WR)
        assert read_rest(sock) == b""
    assert len(service.peers) == len(answers), "a stream with excess bytes was used again"


def test_one_packet_with_answers_to_requests_that_were_not_sent(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Excess in a packet of its own, while the stream rests: no next visitor may get it."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(respond(b"fine"))
        assert answered.wait(60)
        peer.sendall(respond(b"evil"))
        peer.wait_end()

    answered = threading.Event()
    service = start_service(script)
    open_tunnel(service)
    assert get(server.proxy_port).body == b"fine"
    answered.set()
    assert service.peers[0].ended.wait(60), "the stream stayed in the pool"
    assert get(server.proxy_port).body == b"fine"
    assert len(service.peers) == 2


# -- visitors do not disturb each other ------------------------------------------------------------


def test_a_stalled_visitor_blocks_nobody(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """He does not read his 32 MiB; others go on through the same tunnel; then he gets all of it."""
    big = bytes(range(256)) * (32 * MIB // 256)
    service = start_service(answering(lambda got: respond(big if got.target == b"/big" else b"small")))
    open_tunnel(service)
    with connect(server.proxy_port) as stalled:
        stalled.sendall(request("demo", "/big"))
        assert read_head(stalled).get(b"content-length") == str(len(big)).encode()
        for _ in range(50):
            assert get(server.proxy_port).body == b"small"
        with connect(server.proxy_port) as busy:
            busy.sendall(request("demo", "/big"))
            assert read_response(busy).body == big
        rest = bytearray()
        while len(rest) < len(big):
            piece = stalled.recv(MIB)
            assert piece
            rest += piece
        assert rest == big
        stalled.sendall(request())
        assert read_response(stalled).body == b"small", "his connection is as good as ever"


def test_an_answer_whose_end_waits_in_the_server_is_whole_before_the_next(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel takes little for this visitor, so the end of the answer piles up in the server."""
    end_of = edge.end_of

    def end_of_small(sock: Any) -> Any:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return end_of(sock)

    monkeypatch.setattr(edge, "end_of", end_of_small)
    body = bytes(range(256)) * 800
    service = start_service(answering(lambda got: respond(body if got.target == b"/big" else b"small")))
    open_tunnel(service)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(60)
        sock.connect(("127.0.0.1", server.proxy_port))
        for _ in range(3):
            before = server.registry.tunnels["demo"].read_bytes
            sock.sendall(request("demo", "/big") + request())
            eventually(lambda before=before: server.registry.tunnels["demo"].read_bytes - before > len(body))
            assert read_response(sock).body == body
            assert read_response(sock).body == b"small"


def test_a_service_that_does_not_read_blocks_nobody(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        while (got := peer.read_head()) is not None:
            if got.target == b"/stall":
                assert go_on.wait(60)
            peer.body_of(got)
            peer.sendall(respond(b"%d" % len(got.body)))

    go_on = threading.Event()
    service = start_service(script)
    open_tunnel(service)
    with connect(server.proxy_port) as stalled:
        body = b"x" * (24 * MIB)
        sender = threading.Thread(
            target=stalled.sendall, args=(request("demo", "/stall", method=b"POST", body=body),), daemon=True
        )
        sender.start()
        peer = service.wait_peer()
        eventually(lambda: peer.requests)
        for _ in range(50):
            assert get(server.proxy_port, method=b"POST", body=b"12345").body == b"5"
        assert sender.is_alive(), "24 MiB were taken though nobody reads them"
        go_on.set()
        assert read_response(stalled).body == str(len(body)).encode()
        sender.join(60)


def test_connections_leave_nothing_behind(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service())
    socks = [connect(server.proxy_port) for _ in range(30)]
    for number, sock in enumerate(socks):
        if number % 3:
            sock.sendall(request() if number % 2 else request()[:-4])
    for number, sock in enumerate(socks):
        if number % 3 and number % 2:
            assert read_response(sock).status == 200
        (reset if number % 2 else socket.socket.close)(sock)
    eventually(lambda: edge_of(server).visitors == 0)
    assert server.core.busy == 0


def test_stopping_lets_exchanges_finish_and_closes_idle_visitors(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def answer(got: Request) -> bytes:
        if got.target == b"/slow":
            assert go_on.wait(60)
        return respond()

    go_on = threading.Event()
    service = start_service(answering(answer))
    open_tunnel(service)
    with connect(server.proxy_port) as idle, connect(server.proxy_port) as busy:
        idle.sendall(request())
        assert read_response(idle).status == 200
        busy.sendall(request("demo", "/slow"))
        eventually(lambda: len(service.requests) == 2)
        stopping = threading.Thread(target=server.stop, args=(10.0,))
        stopping.start()
        assert read_rest(idle) == b""
        go_on.set()
        response = read_response(busy)
        assert response.body == b"ok"
        assert response.get(b"connection") == b"close"
        assert read_rest(busy) == b""
        stopping.join(60)
        assert not stopping.is_alive()


def test_a_request_that_cannot_move_after_all_is_counted_no_longer(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a reload, when its client is not here any more and no descriptor is left to move it with."""
    server = start_server()
    open_tunnel(start_service(), "demo", server=server)

    def acquire(self: StreamPool, **options: object) -> None:
        monkeypatch.setattr(server.core, "successor", object())
        raise SessionClosedError("it is gone")

    def move(end: object, moved: object) -> bool:
        raise OSError(errno.EMFILE, "nothing left")

    monkeypatch.setattr(StreamPool, "acquire", acquire)
    monkeypatch.setattr(server.core, "move", move)
    with connect(server.proxy_port) as sock:
        sock.sendall(request())
        assert sock.recv(1) == b""
    eventually(lambda: server.core.busy == 0)
    monkeypatch.setattr(server.core, "successor", None)
