"""PROXY headers of those who are not trusted: refused on every port, counted, logged with measure."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import install, issue
from conftest import OpenTunnel, StartServer, StartService
from support import Response, answering, connect, echo, eventually, read_response, read_rest, request
from test_entrance import visit as visit_by_tls

from tinytun_gevent import TunnelServer, rare
from tinytun_gevent.server import strangers
from tinytun_gevent.server.tally import Refusal, Tally

CONNECT = b"CONNECT 127.0.0.1:5554 HTTP/1.1\r\nx-tinytun-type: http\r\nx-tinytun-subdomain: demo\r\n\r\n"
V4 = socket.inet_aton("192.0.2.7") + socket.inet_aton("192.0.2.8") + struct.pack("!HH", 1111, 443)
V6 = b"".join(socket.inet_pton(socket.AF_INET6, ip) for ip in ("2001:db8::7", "2001:db8::8"))


def v2(family: int, block: bytes, command: int = 1) -> bytes:
    return b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x20 | command, family, len(block)) + block


HEADERS = {
    "v1 IPv4": b"PROXY TCP4 192.0.2.7 192.0.2.8 1111 443\r\n",
    "v1 IPv6": b"PROXY TCP6 2001:db8::7 2001:db8::8 1111 443\r\n",
    "v1 unknown": b"PROXY UNKNOWN\r\n",
    "v1 malformed": b"PROXY TCP4 nonsense\r\n",
    "v2 IPv4": v2(0x11, V4),
    "v2 IPv6": v2(0x21, V6 + struct.pack("!HH", 1111, 443)),
    "v2 local": v2(0x00, b"", command=0),
    "v2 malformed": b"\r\n\r\n\0\r\nQUIT\n\x91\x11\0\x0c" + V4,
}
each_header = pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS.keys())
GOOD = {name: header for name, header in HEADERS.items() if "malformed" not in name}


def refusals(server: TunnelServer) -> int:
    return server.core.tally.refusals[Refusal.PROXY_HEADER]


def refused(port: int, *pieces: bytes) -> Response:
    """The answer to a connection that begins with ``pieces``, and ends with the answer."""
    with connect(port) as sock:
        for piece in pieces:
            sock.sendall(piece)
        answer = read_response(sock)
        assert sock.recv(1) == b""
        return answer


def assert_says_why(answer: Response) -> None:
    assert answer.status == 400
    assert answer.get(b"connection") == b"close"
    assert strangers.REASON.encode() in answer.body


@pytest.fixture
def suspicious(start_server: StartServer) -> TunnelServer:
    """A server with trusted proxies, none of them on this machine."""
    return start_server(trusted_proxies="192.0.2.0/24")


# -- the proxy port -----------------------------------------------------------


@each_header
@pytest.mark.parametrize("what", ["alone", "with a request", "in drops"])
def test_a_stranger_s_header_is_refused_on_the_proxy_port(
    suspicious: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    header: bytes,
    what: str,
) -> None:
    service = start_service()
    open_tunnel(service, server=suspicious)
    pieces = {
        "alone": [header],
        "with a request": [header + request()],
        "in drops": [header[i : i + 1] for i in range(len(header))],
    }
    assert_says_why(refused(suspicious.proxy_port, *pieces[what]))
    assert refusals(suspicious) == 1
    assert not service.requests


def test_a_page_says_it_to_a_browser(suspicious: TunnelServer) -> None:
    answer = refused(suspicious.proxy_port, HEADERS["v1 IPv4"] + request("demo", "/", b"Accept: text/html"))
    assert answer.status == 400
    assert (answer.get(b"content-type") or b"").startswith(b"text/html")
    assert b"TRUSTED_PROXIES" in answer.body


@pytest.mark.parametrize("cut", [0, 8])
def test_a_method_of_that_name_is_a_request_like_others(
    suspicious: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, cut: int
) -> None:
    open_tunnel(start_service(answering(echo)), server=suspicious)
    wanted = request(method=b"PROXY")
    with connect(suspicious.proxy_port) as sock:
        sock.sendall(wanted[:cut])
        sock.sendall(wanted[cut:])
        answer = read_response(sock)
    assert answer.body.startswith(b"PROXY / HTTP/1.1\r\n")
    assert refusals(suspicious) == 0


def test_a_header_behind_a_request_is_a_malformed_request(
    suspicious: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service, server=suspicious)
    with connect(suspicious.proxy_port) as sock:
        sock.sendall(request())
        assert read_response(sock).status == 200
        sock.sendall(HEADERS["v1 IPv4"] + request())
        assert read_response(sock).status == 400
        assert sock.recv(1) == b""
    assert len(service.requests) == 1
    assert refusals(suspicious) == 0


def test_what_a_trusted_proxy_forwards_has_no_second_header(start_server: StartServer) -> None:
    """A visitor who sends one himself through a proxy that adds its own is not believed."""
    server = start_server(trusted_proxies="127.0.0.1")
    for header in GOOD.values():
        before = refusals(server)
        assert_says_why(refused(server.proxy_port, HEADERS["v2 IPv4"], header + request()))
        assert refusals(server) == before + 1


def test_a_trusted_proxy_s_broken_header_is_counted_too(start_server: StartServer) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    ports = (server.proxy_port, server.tcp_proxy_port, server.connection_port)
    for number, port in enumerate(ports, 1):
        with connect(port) as sock, contextlib.suppress(ConnectionResetError):
            sock.sendall(HEADERS["v2 malformed"])
            assert read_rest(sock) == b""
        eventually(lambda number=number: refusals(server) == number)


# -- https --------------------------------------------------------------------


@pytest.fixture
def secure(start_server: StartServer, tmp_path: Path) -> TunnelServer:
    """A server that speaks TLS and trusts nobody here."""
    install(tmp_path, issue("demo.localhost", "localhost"))
    return start_server(tls_dir=str(tmp_path), proxy_tls_port=0, trusted_proxies="192.0.2.0/24")


@each_header
def test_a_stranger_s_header_is_refused_on_the_https_port(secure: TunnelServer, header: bytes) -> None:
    assert_says_why(refused(secure.proxy_tls_port, header))
    assert (refusals(secure), secure.core.tally.refusals[Refusal.TLS]) == (1, 0)


@each_header
def test_and_inside_tls(secure: TunnelServer, header: bytes) -> None:
    with visit_by_tls(secure.proxy_tls_port) as sock:
        sock.sendall(header)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert strangers.REASON.encode() in answer
    assert refusals(secure) == 1


def was_reset(port: int, first: bytes = b"") -> bool:
    """Whether a connection ends with a reset, which may come before it is used."""
    try:
        with connect(port) as sock:
            sock.sendall(first)
            assert sock.recv(1) == b""
    except ConnectionError:
        return True
    return False


# -- TCP ----------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"", HEADERS["v1 IPv4"], HEADERS["v2 IPv6"], b"GET / HTTP/1.1\r\n\r\n"])
def test_a_stranger_is_reset_on_the_tcp_proxy_port(suspicious: TunnelServer, first: bytes) -> None:
    assert was_reset(suspicious.tcp_proxy_port, first)
    assert refusals(suspicious) == 1


def test_a_header_on_a_tunnel_s_own_port_is_the_service_s_business(
    suspicious: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Bytes of TCP tunnels are carried as they are: the visitor is who connected, whatever they say."""
    service = start_service(lambda peer: peer.sendall(peer.exactly(len(HEADERS["v1 IPv4"]))))
    tunnel = open_tunnel(service, server=suspicious, kind="tcp")
    with connect(int(tunnel.url.rpartition(":")[2])) as sock:
        sock.sendall(HEADERS["v1 IPv4"])
        assert read_rest(sock) == HEADERS["v1 IPv4"]


# -- the connection port ------------------------------------------------------


@each_header
@pytest.mark.parametrize("what", ["alone", "with a CONNECT", "in drops"])
def test_a_stranger_s_header_is_refused_on_the_connection_port(
    suspicious: TunnelServer, header: bytes, what: str
) -> None:
    pieces = {
        "alone": [header],
        "with a CONNECT": [header + CONNECT],
        "in drops": [header[i : i + 1] for i in range(len(header))],
    }
    assert_says_why(refused(suspicious.connection_port, *pieces[what]))
    assert refusals(suspicious) == 1
    assert not suspicious.registry.tunnels


@each_header
def test_and_where_the_connection_port_speaks_tls(secure: TunnelServer, header: bytes) -> None:
    assert_says_why(refused(secure.connection_port, header))
    assert refusals(secure) == 1


@pytest.mark.parametrize(
    ("header", "remote"),
    [
        (HEADERS["v1 IPv4"], "192.0.2.7:1111"),
        (HEADERS["v1 IPv6"], "[2001:db8::7]:1111"),
        (HEADERS["v2 IPv4"], "192.0.2.7:1111"),
        (HEADERS["v2 IPv6"], "[2001:db8::7]:1111"),
        (v2(0x21, V4[:0] + b"\0" * 10 + b"\xff\xff" + V4[:4] + V6[16:] + V4[8:]), "192.0.2.7:1111"),
        (HEADERS["v1 unknown"], "127.0.0.1:"),
        (HEADERS["v2 local"], "127.0.0.1:"),
        (b"", "127.0.0.1:"),
    ],
)
@pytest.mark.parametrize("drops", [False, True])
def test_a_trusted_balancer_says_whose_client_it_is(
    start_server: StartServer, header: bytes, remote: str, drops: bool
) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    seen: list[str] = []
    authorize = server.core.authorize
    server.core.authorize = lambda request, caller: (seen.append(caller[0]), authorize(request, caller))[1]  # type: ignore[method-assign]
    with connect(server.connection_port) as sock:
        data = header + CONNECT
        for piece in [data[i : i + 1] for i in range(len(data))] if drops else [data]:
            sock.sendall(piece)
        assert sock.recv(12) == b"HTTP/1.1 101"
        assert server.registry.tunnels["demo"].remote.startswith(remote)
        assert seen == [remote.rpartition(":")[0].strip("[]")]
    assert refusals(server) == 0


def test_a_refusal_in_the_log_has_the_client_s_address(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    with caplog.at_level(logging.INFO, "tinytun_gevent"), connect(server.connection_port) as sock:
        sock.sendall(HEADERS["v2 IPv4"] + CONNECT.replace(b"demo", b"-"))
        assert read_response(sock).status == 400
    assert "refused 192.0.2.7" in caplog.text


def test_tls_begins_behind_the_balancer_s_header(start_server: StartServer, tmp_path: Path) -> None:
    install(tmp_path, issue("demo.localhost", "localhost"))
    server = start_server(
        tls_dir=str(tmp_path), proxy_tls_port=0, trusted_proxies="127.0.0.1", connection_tls="required"
    )
    for first, remote in ((HEADERS["v2 IPv4"], "192.0.2.7:1111"), (b"", "127.0.0.1:")):
        with visit_by_tls(server.connection_port, first=first, name="localhost") as sock:
            sock.sendall(CONNECT)
            assert sock.recv(12) == b"HTTP/1.1 101"
            assert server.registry.tunnels["demo"].remote.startswith(remote)
        eventually(lambda: not server.registry.tunnels)
    with connect(server.connection_port) as sock:  # the header is no way around it
        sock.sendall(HEADERS["v2 IPv4"] + CONNECT)
        assert read_response(sock).status == 403


def test_a_balancer_s_health_checks(start_server: StartServer) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    for check in (b"GET / HTTP/1.0\r\n\r\n", HEADERS["v2 local"] + b"GET / HTTP/1.0\r\n\r\n"):
        with connect(server.connection_port) as sock:
            sock.sendall(check)
            assert read_response(sock).status == 200
    with connect(server.connection_port) as sock:
        sock.sendall(HEADERS["v2 local"])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert refusals(server) == 0


@pytest.mark.usefixtures("fast_clock")
def test_a_header_is_not_waited_for_for_ever(start_server: StartServer) -> None:
    server = start_server(trusted_proxies="127.0.0.1", handshake_timeout=0.2)
    for first in (b"PROXY TCP4 192.0.2.7", HEADERS["v2 IPv4"], HEADERS["v2 IPv4"][:-1]):
        with connect(server.connection_port) as sock, contextlib.suppress(ConnectionResetError):
            sock.sendall(first)
            assert read_rest(sock) == b""


# -- the log ------------------------------------------------------------------


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "as a proxy" in record.getMessage()]


@pytest.mark.usefixtures("one_moment")
def test_a_flood_is_some_lines_and_every_one_counts(
    suspicious: TunnelServer, caplog: pytest.LogCaptureFixture
) -> None:
    visits: list[Callable[[], object]] = [
        lambda: was_reset(suspicious.tcp_proxy_port),
        lambda: refused(suspicious.proxy_port, HEADERS["v1 IPv4"]),
        lambda: refused(suspicious.connection_port, HEADERS["v2 IPv4"]),
    ]
    with caplog.at_level(logging.INFO, "tinytun_gevent"):
        for visit in visits * 40:
            visit()
        rare.sum_up()
    assert refusals(suspicious) == 120
    said = [
        f"refused 127.0.0.1 as a proxy on the {port} port: not in TRUSTED_PROXIES"
        for port in ("TCP proxy", "proxy", "connection")
    ]
    assert lines_of(caplog)[: rare.FIRST * 3] == said * rare.FIRST
    counts = lines_of(caplog)[rare.FIRST * 3 :]
    assert sorted(line.partition(", and 19 more like this in ")[0] for line in counts) == sorted(said)


# -- forwarding fields ---------------------------------------------------------


@pytest.mark.parametrize(
    ("ip", "kind"),
    [
        ("127.0.0.9", "loopback"),
        ("::1", "loopback"),
        ("10.1.2.3", "private"),
        ("172.17.0.1", "private"),
        ("fd00::1", "private"),
        ("fe80::1", "private"),
        ("8.8.8.8", "public"),
        ("2606:4700::1", "public"),
    ],
)
def test_kinds_of_addresses(ip: str, kind: str) -> None:
    assert strangers.kind_of(ip) == kind


def test_dropped_forwarding_fields_are_told_once_for_each_kind_of_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    them = strangers.Strangers(Tally())
    with caplog.at_level("INFO", strangers.log.name):
        them.drop("8.8.8.8", [(b"CF-Ray", b"1"), (b"X-Real-IP", b"1")])  # no proxy of ours says only these
        for ip in ("10.0.0.1", "10.0.0.2", "127.0.0.1", "8.8.4.4", "8.8.8.8", "10.0.0.1"):
            them.drop(ip, [(b"CF-Ray", b"1"), (b"x-forwarded-PROTO", b"secret")])
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("(said")[1] for line in lines] == [
        f" once for {kind} addresses)" for kind in ("private", "loopback", "public")
    ]
    assert lines[0].startswith(
        "dropped X-Forwarded-Proto from 10.0.0.1, which is not in TRUSTED_PROXIES; if it is a proxy of "
        "yours, set TRUSTED_PROXIES=10.0.0.1 "
    )
    assert not any("secret" in line for line in lines)


@pytest.mark.parametrize(("trusted", "count"), [("192.0.2.0/24", 1), ("127.0.0.1", 0)])
def test_a_forgotten_proxy_is_found_in_the_log(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, trusted: str, count: int
) -> None:
    server = start_server(trusted_proxies=trusted)
    with caplog.at_level("INFO", strangers.log.name), connect(server.proxy_port) as sock:
        for _ in range(3):
            sock.sendall(request("nobody", "/", b"X-Forwarded-For: 192.0.2.99"))
            assert read_response(sock).status == 404
    lines = [line for line in caplog.messages if line.startswith("dropped")]
    assert len(lines) == count
    assert all("X-Forwarded-For from 127.0.0.1" in line and "192.0.2.99" not in line for line in lines)
