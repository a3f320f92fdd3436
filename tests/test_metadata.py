"""The metadata API, asked over real sockets: shape, names, methods, Host, slow and broken callers."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
import support
from raw_client import RawClient

from tinytun_gevent import TunnelServer, __version__
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.server import addresses, metadata_host
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.wire.handshake import Kind

DEADLINE = 60.0


@pytest.fixture
def server() -> Iterator[TunnelServer]:
    with TunnelServer(
        bind="127.0.0.1",
        connection_port=0,
        proxy_port=0,
        tcp_proxy_port=0,
        metadata_port=0,
        base_domains="localhost",
        metadata_hosts="meta.example.com",
        peers="peer.invalid",
    ) as server:
        yield server


def ask(
    server: TunnelServer, path: str, *, method: str = "GET", host: str | None = None
) -> tuple[int, http.client.HTTPMessage, Any]:
    """One request on a connection of its own: status, fields, and the body, read as JSON if there is one."""
    connection = http.client.HTTPConnection("127.0.0.1", server.metadata_port, timeout=DEADLINE)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(body) if body else None


def test_without_tunnels_the_list_is_empty(server: TunnelServer) -> None:
    status, fields, value = ask(server, "/tunnels")
    assert (status, value) == (200, [])
    assert fields["Content-Type"] == "application/json"


def test_the_shape_is_the_originals(server: TunnelServer) -> None:
    http_tunnel = server.registry.claim(Kind.HTTP, subdomain="app")
    tcp_tunnel = server.registry.claim(Kind.TCP, port=30000)
    pending = server.registry.claim(Kind.HTTP, subdomain="pending")
    for tunnel in (http_tunnel, tcp_tunnel):
        server.registry.establish(tunnel)
    status, _, value = ask(server, "/tunnels")
    assert status == 200
    assert [{key: one[key] for key in ("id", "name", "read_bytes", "written_bytes")} for one in value] == [
        {"id": http_tunnel.id, "name": {"Subdomain": "app"}, "read_bytes": 0, "written_bytes": 0},
        {"id": tcp_tunnel.id, "name": {"PortNumber": 30000}, "read_bytes": 0, "written_bytes": 0},
    ]
    assert re.fullmatch("[0-9a-f]{32}", value[0]["id"])
    assert ask(server, "/tunnels/app")[2] == value[0]
    assert ask(server, "/tunnels/APP")[2] == value[0]
    for path in ("/tunnels/30000", "/tunnels/:30000", "/tunnels/%3A30000"):
        assert ask(server, path)[2] == value[1]
    assert ask(server, f"/tunnels/{pending.name}")[0] == 404


@pytest.mark.parametrize(
    "path", ["/", "/tunnel", "/tunnels/", "/tunnels/nobody", "/tunnels/app/x", "/tunnels/%ff"]
)
def test_anything_else_is_not_found(server: TunnelServer, path: str) -> None:
    server.registry.establish(server.registry.claim(Kind.HTTP, subdomain="app"))
    assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_reading_is_allowed(server: TunnelServer, method: str) -> None:
    status, fields, _ = ask(server, "/tunnels", method=method)
    assert (status, fields["Allow"]) == (405, "GET, HEAD")


def test_head_is_get_without_the_body(server: TunnelServer) -> None:
    status, fields, value = ask(server, "/tunnels", method="HEAD")
    assert (status, value) == (200, None)
    assert fields["Content-Length"] == "3"


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.1.2.3:5553",
        "[::1]:5553",
        "[::1]",
        "localhost",
        "LocalHost.:1",
        "meta.example.com:80",
        "peer.invalid",
    ],
)
def test_addresses_and_configured_names_are_answered(server: TunnelServer, host: str) -> None:
    assert ask(server, "/tunnels", host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "app.localhost",
        "127.0.0.1.evil.example",
        "",
        "[::1].evil",
        "[::1%25evil.example]",
        "[fe80::1%eth0]:5553",
        "::1",
    ],
)
def test_other_hosts_are_misdirected(server: TunnelServer, host: str) -> None:
    assert ask(server, "/tunnels", host=host)[0] == 421
    assert ask(server, "/tunnels", host=host, method="POST")[0] == 421


def test_a_connection_carries_several_requests(server: TunnelServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.metadata_port, timeout=DEADLINE)
    for _ in range(3):
        connection.request("GET", "/tunnels")
        answer = connection.getresponse()
        assert json.loads(answer.read()) == []
        assert connection.sock is not None, "the connection was closed between requests"
    connection.close()


def test_what_is_not_http_is_refused_and_the_next_caller_answered(server: TunnelServer) -> None:
    with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
        sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")
    assert ask(server, "/tunnels")[0] == 200


def test_a_silent_caller_is_dropped(server: TunnelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_host, "HEAD_TIMEOUT", 0.2)
    with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
        sock.sendall(b"GET /tun")
        assert sock.recv(100) == b""


def test_a_caller_who_does_not_read_is_dropped(server: TunnelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_host, "CONNECTION_LIFE", 0.5)
    for _ in range(9000):  # about 1 MB of JSON, several times
        server.registry.establish(server.registry.claim(Kind.HTTP))
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", server.metadata_port))
        sock.sendall(b"GET /tunnels HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
        assert sock.recv(1) == b"H"  # it is being served, and will now wait for us
        run_in_hub(wait_for_no_connections, server)
    assert ask(server, "/tunnels")[0] == 200


def wait_for_no_connections(server: TunnelServer) -> None:
    """Blocks until no connection is being served on the metadata port."""
    assert server._serving is not None
    until = time.monotonic() + DEADLINE
    while server._serving._servers[0].connections:
        assert time.monotonic() < until, "the connection is still served"
        gevent.sleep(0.01)


@pytest.mark.skipif(not addresses.has_ipv6(), reason="this machine has no IPv6")
def test_the_api_is_served_on_ipv6(server: TunnelServer) -> None:
    with TunnelServer(
        bind="::1",
        metadata_bind="::1",
        connection_port=0,
        proxy_port=0,
        tcp_proxy_port=0,
        metadata_port=0,
    ) as six:
        assert six.metadata_url == f"http://[::1]:{six.metadata_port}"
        connection = http.client.HTTPConnection("::1", six.metadata_port, timeout=DEADLINE)
        connection.request("GET", "/tunnels")
        assert connection.getresponse().status == 200
        connection.close()


def test_without_gunicorn_the_answers_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gunicorn cannot be imported, as on Windows."""
    from tinytun_gevent.server import app
    from tinytun_gevent.server.metadata_plain import PlainHost

    monkeypatch.setattr(app, "_metadata_host", PlainHost)
    with TunnelServer(
        bind="127.0.0.1", connection_port=0, proxy_port=0, tcp_proxy_port=0, metadata_port=0
    ) as server:
        tunnel = server.registry.claim(Kind.HTTP, subdomain="app")
        server.registry.establish(tunnel)
        assert ask(server, "/tunnels/app")[2]["id"] == tunnel.id
        assert ask(server, "/tunnels", host="evil.example")[0] == 421
        assert ask(server, "/nothing")[0] == 404
        with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
            sock.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
            assert b"400" in sock.recv(1000)


# -- how the server is -----------------------------------------------------------------------------


def test_a_tunnel_says_who_opened_it_and_since_when(server: TunnelServer) -> None:
    tunnel = server.registry.claim(Kind.HTTP, subdomain="app", remote="192.0.2.7:40000")
    server.registry.establish(tunnel)
    tunnel.account = Account(label="alice")
    tunnel.since = 1_700_000_000.5
    port = server.registry.claim(Kind.TCP_PORT, port=30000)
    server.registry.establish(port)
    about = ask(server, "/tunnels/app")[2]
    assert about == {
        "id": tunnel.id,
        "name": {"Subdomain": "app"},
        "read_bytes": 0,
        "written_bytes": 0,
        "kind": "http",
        "url": server.url_of("app"),
        "since": "2023-11-14T22:13:20Z",
        "remote": "192.0.2.7:40000",
        "label": "alice",
        "visitors": 0,
        "sessions": 0,
    }
    assert ask(server, "/tunnels")[2][0] == about
    other = ask(server, "/tunnels/30000")[2]
    assert (other["kind"], other["url"], other["label"]) == ("tcp", None, "")


def test_visitors_count_while_they_are_there(server: TunnelServer) -> None:
    with RawClient(server) as client, support.connect(server.proxy_port) as sock:
        sock.sendall(support.request())
        stream, _ = client.next_request()
        about = ask(server, "/tunnels/demo")[2]
        assert (about["visitors"], about["sessions"]) == (1, 1)
        assert about["remote"] == f"127.0.0.1:{client.sock.getsockname()[1]}"
        assert ask(server, "/status")[2]["visitors"] == {"http": 1, "tcp": 0}
        client.send(stream, support.respond())
        assert support.read_response(sock).status == 200
        support.eventually(lambda: ask(server, "/tunnels/demo")[2]["visitors"] == 0)


def test_the_status_is_the_whole(server: TunnelServer) -> None:
    status = ask(server, "/status")[2]
    assert (status["version"], status["draining"], status["tunnels"]) == (__version__, False, [])
    assert status["uptime_seconds"] >= 0
    assert set(status["refusals"]) == {reason.value for reason in Refusal}
    assert status["connections"]["metadata"] == 1


def test_a_server_that_serves_is_well_and_ready(server: TunnelServer) -> None:
    assert ask(server, "/healthz")[0] == 200
    assert ask(server, "/ready")[0] == 200


def test_one_that_is_paused_or_draining_or_full_is_not_ready(server: TunnelServer) -> None:
    serving = server._serving
    assert serving is not None
    run_in_hub(serving.pause)
    status, _, value = ask_paused(server, "/ready")
    assert (status, value["reason"]) == (503, "not accepting")
    assert ask_paused(server, "/healthz")[0] == 200
    run_in_hub(serving.resume)
    assert ask(server, "/ready")[0] == 200
    serving._servers[2]._limit = 1
    with socket.create_connection(("127.0.0.1", server.proxy_port), timeout=DEADLINE):
        support.eventually(lambda: ask(server, "/ready")[0] == 503)
    support.eventually(lambda: ask(server, "/ready")[0] == 200)
    server.core.draining = True
    status, _, value = ask(server, "/ready")
    assert (status, value["reason"]) == (503, "draining")
    assert ask(server, "/healthz")[0] == 200
    server.core.draining = False


def ask_paused(server: TunnelServer, path: str) -> tuple[int, Any, Any]:
    """Asks while all ports are paused, which the metadata API's own is with them."""
    assert server._serving is not None
    run_in_hub(server._serving._servers[0].resume)
    return ask(server, path)


def test_a_load_balancer_needs_no_host(server: TunnelServer) -> None:
    for path, status in (("/healthz", 200), ("/ready", 200), ("/tunnels", 421), ("/metrics", 421)):
        with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
            sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert sock.makefile("rb").readline().split()[1] == str(status).encode()


@pytest.mark.parametrize("path", ["/healthz", "/ready", "/metrics", "/status"])
def test_no_web_page_can_ask_how_the_server_is(server: TunnelServer, path: str) -> None:
    assert ask(server, path, host="evil.example")[0] == 421
    assert ask(server, path, method="POST")[0] == 405


def test_a_request_that_is_not_understood_is_not_quoted_in_the_log(
    server: TunnelServer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        for head in (b"GET /?secret HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nAuthorization secret\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
                sock.sendall(head)
                assert sock.recv(1000).startswith(b"HTTP/1.1 400 ")
        with socket.create_connection(("127.0.0.1", server.metadata_port), timeout=DEADLINE) as sock:
            sock.sendall(b"GET /?secret")
    assert "not understood" in caplog.text
    assert "secret" not in caplog.text
