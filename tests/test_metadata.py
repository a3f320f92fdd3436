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

from tinytun_gevent import TunnelServer
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.server import addresses, metadata_host
from tinytun_gevent.wire.handshake import Kind

DEADLINE = 10.0


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
