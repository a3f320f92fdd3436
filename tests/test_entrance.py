"""TLS on the server's ports, end to end: real sockets, real certificates, the real client."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import select
import shutil
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import AUTHORITY, install, issue, put, self_signed, trust_file
from conftest import OpenTunnel, StartServer, StartService
from local_service import LocalService
from server_process import ServerProcess, environment
from support import (
    DEADLINE,
    Response,
    answering,
    connect,
    eventually,
    read_response,
    request,
    respond,
)
from test_upgrade import websocket_service
from websockets.sync.client import connect as connect_websocket

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.client.dial import HopelessError
from tinytun_gevent.errors import RefusedError
from tinytun_gevent.server import certificates, connects, entrance
from tinytun_gevent.server.tally import Refusal

TlsServer = Callable[..., TunnelServer]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a certificate for the tunnels of ``localhost``, and for the server."""
    install(tmp_path / "tls", issue("*.localhost", "demo.localhost", "localhost", "127.0.0.1"))
    return tmp_path / "tls"


@pytest.fixture
def tls_server(start_server: StartServer, directory: Path) -> TlsServer:
    """Starts servers with that directory."""

    def start(**overrides: Any) -> TunnelServer:
        return start_server(**{"tls_dir": str(directory), "proxy_tls_port": 0} | overrides)

    return start


def context(*protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    if protocols:
        context.set_alpn_protocols(list(protocols))
    return context


def visit(port: int, *protocols: str, first: bytes = b"", name: str = "demo.localhost") -> ssl.SSLSocket:
    """A visitor's connection, TLS behind the bytes of ``first``; the caller closes it."""
    sock = connect(port)
    sock.sendall(first)
    return context(*protocols).wrap_socket(sock, server_hostname=name)


def get(sock: ssl.SSLSocket, *fields: bytes) -> Response:
    """One request on a connection; the bytes of a record cannot be peeked at."""
    sock.sendall(request("demo", "/", *fields))
    answer = b""
    while b"\r\n\r\n" not in answer:
        piece = sock.recv(65536)
        assert piece, f"it ended after {answer!r}"
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    response = Response(head + b"\r\n\r\n")
    length = int(response.get(b"content-length") or 0)
    while len(body) < length:
        body += sock.recv(65536)
    response.body = body
    return response


def refusals(server: TunnelServer) -> int:
    return server.core.tally.refusals[Refusal.TLS]


@pytest.fixture
def echo(start_service: StartService) -> Any:
    """A service that answers with the head that came."""
    return start_service(answering(lambda got: respond(got.head)))


# -- visitors -----------------------------------------------------------------


def test_a_visitor_by_https_and_what_the_service_is_told(
    tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any
) -> None:
    server = tls_server()
    tunnel = open_tunnel(echo, server=server)
    assert tunnel.url == f"https://demo.localhost:{server.proxy_tls_port}"
    with visit(server.proxy_tls_port) as visitor:
        for _ in range(3):
            told = get(visitor, b"X-Forwarded-Proto: gopher").body.lower()
            assert b"\r\nx-forwarded-proto: https\r\n" in told
            assert b"\r\nx-forwarded-port: %d\r\n" % server.proxy_tls_port in told
            assert b"\r\nx-forwarded-for: 127.0.0.1\r\n" in told
    assert not refusals(server)
    with connect(server.proxy_port) as plain:
        plain.sendall(request())
        assert b"x-forwarded-proto: http\r\n" in read_response(plain).body.lower()


@pytest.mark.parametrize("version", [1, 2])
def test_a_trusted_proxy_says_who_comes_before_tls_begins(
    tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any, version: int
) -> None:
    server = tls_server(trusted_proxies="127.0.0.1")
    open_tunnel(echo, server=server)
    if version == 1:
        header = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n"
    else:
        addresses = bytes([192, 0, 2, 7, 192, 0, 2, 1]) + struct.pack(">HH", 4711, 443)
        header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + struct.pack(">H", len(addresses)) + addresses
    for first in (header, b""):
        with visit(server.proxy_tls_port, first=first) as visitor:
            told = get(visitor).body.lower()
        assert (b"x-forwarded-for: 192.0.2.7\r\n" in told) is bool(first)
        assert (b"x-forwarded-port: 443\r\n" in told) is bool(first)
        assert b"x-forwarded-proto: https\r\n" in told


def test_nobody_else_may(tls_server: TlsServer) -> None:
    server = tls_server()
    with connect(server.proxy_tls_port) as sock:
        sock.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n")
        assert read_response(sock).status == 400
    assert server.core.tally.refusals[Refusal.PROXY_HEADER] == 1


def test_plain_http_on_the_https_port_is_told_so(tls_server: TlsServer) -> None:
    server = tls_server()
    with connect(server.proxy_tls_port) as sock:
        sock.sendall(request())
        answer = read_response(sock)
    assert answer.status == 400
    assert answer.get(b"content-type") == b"text/plain; charset=utf-8"
    assert b"https://" in answer.body


def test_what_is_agreed_on_by_alpn(tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any) -> None:
    server = tls_server()
    open_tunnel(echo, server=server)
    for offered, agreed in ((("h2", "http/1.1"), "http/1.1"), (("http/1.1",), "http/1.1"), ((), None)):
        with visit(server.proxy_tls_port, *offered) as visitor:
            assert visitor.selected_alpn_protocol() == agreed
            assert get(visitor).status == 200
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        visit(server.proxy_tls_port, "h2", "gopher")
    eventually(lambda: refusals(server) == 1)
    with visit(server.connection_port, "gopher") as client:  # where nobody has asked for any
        assert client.selected_alpn_protocol() is None


@pytest.mark.parametrize(
    "garbage", [b"\x16", b"\x16\x03\x01\x00\x05hello", b"\x16\x03\x01\xff\xffx", b"\x80\x2e\x01"]
)
@pytest.mark.usefixtures("fast_clock")
def test_garbage_ends_soon_is_counted_and_disturbs_nobody(
    tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any, garbage: bytes
) -> None:
    server = tls_server(handshake_timeout=0.2)
    open_tunnel(echo, server=server)
    ports = (
        (server.proxy_tls_port, server.connection_port) if garbage[0] == 0x16 else (server.proxy_tls_port,)
    )
    for number, port in enumerate(ports, 1):
        with connect(port) as sock, contextlib.suppress(ConnectionResetError):
            sock.sendall(garbage)
            while sock.recv(1000):
                pass
        eventually(lambda number=number: refusals(server) == number)
    with visit(server.proxy_tls_port) as visitor:
        assert get(visitor).status == 200


def test_many_slow_handshakes_stop_nobody(
    tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of too many the oldest is given up."""
    monkeypatch.setattr(entrance, "MOST", 20)
    server = tls_server()
    open_tunnel(echo, server=server)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server.proxy_tls_port)) for _ in range(50)]
        for sock in slow:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        eventually(lambda: refusals(server) == 30)
        eventually(lambda: len(select.select(slow, [], [], 0)[0]) == 30)
        for _ in range(10):
            with visit(server.proxy_tls_port) as visitor:
                assert get(visitor).status == 200
        assert len(select.select(slow, [], [], 0)[0]) < 50


@pytest.mark.usefixtures("fast_clock")
def test_a_handshake_has_its_time_and_no_more(tls_server: TlsServer) -> None:
    server = tls_server(handshake_timeout=0.2)
    for port in (server.proxy_tls_port, server.connection_port):
        for first in (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00"):
            began = time.monotonic()
            with connect(port) as sock, contextlib.suppress(ConnectionResetError):
                sock.sendall(first)
                assert sock.recv(1) == b""
            assert time.monotonic() - began > 0.15


def test_a_long_rsa_key_is_used_in_a_thread(
    tls_server: TlsServer, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub does not wait for its signatures."""
    threads: list[int] = []
    original = entrance.in_a_thread

    def noted(step: Callable[[], Any]) -> Any:
        return original(lambda: [threads.append(threading.get_ident()), step()])

    monkeypatch.setattr(entrance, "in_a_thread", noted)
    monkeypatch.setattr(certificates, "LOOK", 0.05)
    server = tls_server()
    with visit(server.proxy_tls_port):
        assert not threads
    put(directory / "long.pem", self_signed("long.localhost", 3072))
    trust = context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE

    def is_shown() -> bool:
        threads.clear()
        sock = trust.wrap_socket(connect(server.proxy_tls_port), server_hostname="long.localhost")
        with sock:
            assert get(sock).status == 404
        return bool(threads)

    eventually(is_shown)


def test_bodies_of_megabytes_both_ways(
    tls_server: TlsServer, start_service: StartService, tmp_path: Path
) -> None:
    """Visitor and client by TLS: four legs of it in one download and one upload."""
    body = random.Random(1).randbytes(5_000_000)
    server = tls_server()
    service = start_service(answering(lambda got: respond(got.body or body)))
    ca = str(trust_file(tmp_path / "ca.pem"))
    url = f"https://localhost:{server.connection_port}"
    with Tunnel(service.target, server=url, ca=ca, subdomain="demo", proxy=""):
        trust = context()
        for sent in (b"", body[::-1]):
            trip = http.client.HTTPSConnection("demo.localhost", server.proxy_tls_port, context=trust)
            trip.sock = visit(server.proxy_tls_port)
            trip.request("POST" if sent else "GET", "/", sent or None, {"Host": "demo.localhost"})
            assert trip.getresponse().read() == (sent or body)
            trip.close()


def test_limits_of_bytes_hold_and_lose_nothing(tls_server: TlsServer, start_service: StartService) -> None:
    """What a visitor has sent may be here already, decrypted, while the kernel has nothing."""
    body = random.Random(2).randbytes(300_000)
    server = tls_server(tunnel_rate=1_000_000)
    service = start_service(answering(lambda got: respond(got.body)))
    with Tunnel(service.target, server=server.url, subdomain="demo", proxy=""):
        trip = http.client.HTTPConnection("demo.localhost", server.proxy_tls_port)
        trip.sock = visit(server.proxy_tls_port)
        began = time.monotonic()
        trip.request("POST", "/", body)
        assert trip.getresponse().read() == body
        trip.close()
    assert time.monotonic() - began > 0.15


@pytest.mark.usefixtures("standstill")
def test_visitors_who_connect_too_often_are_let_in_no_more(tls_server: TlsServer) -> None:
    server = tls_server(connect_rate=1, connect_burst=2)
    answers = []
    for _ in range(4):
        with visit(server.proxy_tls_port) as visitor:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: none.localhost\r\nConnection: close\r\n\r\n")
            answers.append(b"".join(iter(lambda: visitor.recv(65536), b"")))  # read at once
    assert [answer[9:12] for answer in answers] == [b"404", b"404", b"429", b"429"]
    assert b"\r\nX-Tinytun-Limit: connects\r\n" in answers[-1]


@pytest.mark.usefixtures("standstill")
def test_in_a_flood_they_are_not_told(tls_server: TlsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connects, "MOST_TOLD", 0)
    server = tls_server(connect_rate=1, connect_burst=1)
    visit(server.proxy_tls_port).close()
    with pytest.raises(OSError):  # a reset, or an end within the handshake
        visit(server.proxy_tls_port)


def test_websockets_over_tls(tls_server: TlsServer, open_tunnel: OpenTunnel) -> None:
    server = tls_server()
    with websocket_service() as port:
        open_tunnel(port, server=server)
        url = f"wss://demo.localhost:{server.proxy_tls_port}/"
        sock = connect(server.proxy_tls_port)
        with connect_websocket(url, sock=sock, ssl=context(), compression=None, max_size=None) as websocket:
            for size in (1, 1000, 1_000_000):
                websocket.send(bytes(size))
                assert websocket.recv(timeout=DEADLINE) == bytes(size)


def serial_of(port: int) -> object:
    """The serial number of the certificate that a visitor is shown now."""
    with visit(port) as visitor:
        return (visitor.getpeercert() or {})["serialNumber"]


def test_a_certificate_renewed_under_load_costs_no_request(
    tls_server: TlsServer,
    open_tunnel: OpenTunnel,
    echo: Any,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(certificates, "LOOK", 0.05)
    server = tls_server()
    open_tunnel(echo, server=server)
    over, failures, done = threading.Event(), [], []

    def load(kept: bool) -> None:
        visitor = visit(server.proxy_tls_port) if kept else None
        while not over.is_set():
            try:
                one = visitor or visit(server.proxy_tls_port)
                assert get(one).status == 200
                done.append(kept)
                if not kept:
                    one.close()
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=load, args=(kept,)) for kept in (True, False, False)]
    for thread in threads:
        thread.start()
    serials = {serial_of(server.proxy_tls_port)}
    for days in (61, 62, 63):
        install(directory, issue("*.localhost", "demo.localhost", days=days))

        def renewed() -> bool:
            serial = serial_of(server.proxy_tls_port)
            known = serial in serials
            serials.add(serial)
            return not known

        eventually(renewed)
    over.set()
    for thread in threads:
        thread.join(DEADLINE)
    assert not failures
    assert {True, False} == set(done)


# -- tunnel clients -----------------------------------------------------------


def test_one_port_is_for_both_kinds_of_clients(tls_server: TlsServer, echo: Any, tmp_path: Path) -> None:
    server = tls_server()
    ca = str(trust_file(tmp_path / "ca.pem"))
    port = server.connection_port
    for url in (f"https://localhost:{port}", f"https://127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
        with Tunnel(echo.target, server=url, ca=ca, subdomain="demo", proxy="") as tunnel:
            assert tunnel.url == f"https://demo.localhost:{server.proxy_tls_port}"
            with visit(server.proxy_tls_port) as visitor:
                assert get(visitor).status == 200
        eventually(lambda: not server.registry.tunnels)


def test_the_client_checks_who_the_server_is(
    tls_server: TlsServer, echo: Any, directory: Path, tmp_path: Path
) -> None:
    shutil.rmtree(directory)
    install(directory, issue("other.test"))
    server = tls_server()
    ca = str(trust_file(tmp_path / "ca.pem"))
    url = f"https://localhost:{server.connection_port}"
    with pytest.raises(HopelessError, match=r"certificate .* is not valid"):
        Tunnel(echo.target, server=url, ca=ca, proxy="").open()
    with Tunnel(echo.target, server=url, insecure=True, proxy=""):
        pass


def test_plain_clients_are_refused_where_tls_is_required(
    tls_server: TlsServer, echo: Any, tmp_path: Path
) -> None:
    server = tls_server(connection_tls="required")
    port = server.connection_port
    with connect(port) as sock:
        sock.sendall(b"G")  # before anything else
        answer = read_response(sock)
    assert answer.status == 403
    assert b"use https://" in answer.body
    with pytest.raises(RefusedError, match="use https://"):
        Tunnel(echo.target, server=f"http://127.0.0.1:{port}", proxy="").open()
    with visit(port, name="localhost") as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
    ca = str(trust_file(tmp_path / "ca.pem"))
    with Tunnel(echo.target, server=f"https://localhost:{port}", ca=ca, proxy=""):
        pass


def test_a_server_without_certificates_says_at_once_that_it_speaks_no_tls(
    server: TunnelServer, echo: Any
) -> None:
    with pytest.raises(ssl.SSLError):
        visit(server.connection_port)
    with pytest.raises(HopelessError, match=r"does not speak TLS \(if its port is plain, say http://"):
        Tunnel(echo.target, server=f"https://127.0.0.1:{server.connection_port}", proxy="").open()
    assert refusals(server) == 2


def test_a_directory_without_certificates_is_no_end_of_the_server(
    tls_server: TlsServer, echo: Any, directory: Path
) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    server = tls_server()
    for port in (server.connection_port, server.proxy_tls_port):
        with pytest.raises(ssl.SSLError):
            visit(port)
    with Tunnel(echo.target, server=server.url, proxy=""):
        pass


# -- foreign programs ---------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(tls_server: TlsServer, open_tunnel: OpenTunnel, echo: Any, tmp_path: Path) -> None:
    server = tls_server()
    open_tunnel(echo, server=server)
    port = server.proxy_tls_port
    command = ["curl", "-sS", "--cacert", str(trust_file(tmp_path / "ca.pem"))]
    command += ["--resolve", f"demo.localhost:{port}:127.0.0.1", f"https://demo.localhost:{port}/"]
    done = subprocess.run(command, capture_output=True, timeout=DEADLINE, check=True)
    assert b"x-forwarded-proto: https" in done.stdout.lower()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
def test_openssl_s_client_resumes(tls_server: TlsServer, version: str, tmp_path: Path) -> None:
    server = tls_server()
    saved, ca = tmp_path / "session", trust_file(tmp_path / "ca.pem")
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.proxy_tls_port}", f"-{version}"]
    command += ["-servername", "demo.localhost", "-CAfile", str(ca), "-verify_return_error", "-ign_eof"]
    text = b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nConnection: close\r\n\r\n"
    for options, said in ((["-sess_out", str(saved)], b"New, "), (["-sess_in", str(saved)], b"Reused, ")):
        done = subprocess.run(
            [*command, *options], input=text, capture_output=True, timeout=DEADLINE, check=False
        )
        assert said in done.stdout, done.stderr
        assert b"HTTP/1.1 404 " in done.stdout


# -- a reload -----------------------------------------------------------------


@pytest.fixture
def process(directory: Path) -> Iterator[ServerProcess]:
    environ = environment(TLS_DIR=str(directory), PROXY_TLS_PORT="0")
    with ServerProcess(environ=environ) as server:
        yield server.wait_serving()


def tls_port(process: ServerProcess) -> int:
    return int(process.wait_line(r"visitors by https on (\d+)")[1])


def test_a_reload_loses_no_visitor_s_request(process: ServerProcess) -> None:
    """Each of those who are connected has his next request answered, and is told to come back."""
    port = tls_port(process)
    with LocalService() as service, contextlib.ExitStack() as stack:
        stack.enter_context(Tunnel(service.port, server=process.url, subdomain="demo", proxy=""))
        late = stack.enter_context(connect(port))  # who shakes hands when the new worker serves
        visitors = [stack.enter_context(visit(port)) for _ in range(5)]
        for visitor in visitors[:4]:
            assert get(visitor).status == 200
        slow = stack.enter_context(visit(port))
        slow.sendall(request("demo", "/slow"))
        assert service.begun.wait(DEADLINE)
        process.process.send_signal(1)
        process.wait_serving(2)
        visitors.append(context().wrap_socket(late, server_hostname="demo.localhost"))
        for visitor in visitors:  # the fifth has asked for nothing before
            answer = get(visitor)
            assert answer.status == 200
            assert json.loads(answer.body)["x-forwarded-proto"] == "https"
            assert json.loads(answer.body)["x-forwarded-port"] == str(port)
            assert answer.get(b"connection") == b"close"
            assert visitor.recv(10) == b""
        service.finish()
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 ")
        with visit(port) as new:
            answer = get(new)
            assert answer.status == 200
            assert answer.get(b"connection") is None
    eventually(lambda: len(process.workers()) == 1)


def test_the_worker_of_a_reload_has_the_certificates(process: ServerProcess, directory: Path) -> None:
    port = tls_port(process)
    install(directory, issue("*.localhost", "demo.localhost", days=80))
    process.process.send_signal(1)
    process.wait_serving(2)
    with visit(port) as visitor:
        assert get(visitor).status == 404
