"""The integration cases of the original, on our server and our client."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from conftest import OpenTunnel, StartServer, StartService
from free_ports import free_ports
from support import answering, connect, echo, eventually, get, read_response, request, respond

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import NameTakenError


def metadata(server: TunnelServer, path: str = "/tunnels") -> tuple[int, Any]:
    with connect(server.metadata_port) as sock:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = read_response(sock)
        return answer.status, json.loads(answer.body) if answer.status == 200 else None


def test_a_tunnel_is_established(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(), None)
    assert re.fullmatch(rf"http://[a-z0-9-]+\.localhost:{server.proxy_port}", tunnel.url)


def test_with_the_subdomain_that_was_asked_for(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(), "my-app")
    assert tunnel.url == f"http://my-app.localhost:{server.proxy_port}"


def test_not_with_one_that_is_taken(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    first = open_tunnel(start_service(), "my-app")
    with pytest.raises(NameTakenError, match="my-app"):
        open_tunnel(start_service(), "my-app")
    first.close()
    open_tunnel(start_service(), "my-app")


def test_a_request_makes_the_round_trip(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(echo)))
    answer = get(server.proxy_port, "demo", "/path?query=1", b"X-Custom: yes", method=b"POST", body=b"body")
    assert answer.status == 200
    assert answer.body.startswith(b"POST /path?query=1 HTTP/1.1\r\n")
    assert b"\r\nX-Custom: yes\r\n" in answer.body
    assert answer.body.endswith(b"\r\n\r\nbody")


def test_the_metadata_api_lists_it(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    assert metadata(server) == (200, [])
    open_tunnel(start_service(), "my-app")
    tcp = open_tunnel(start_service(), kind="tcp")
    port = int(tcp.url.rpartition(":")[2])
    status, listed = metadata(server)
    assert status == 200
    assert [tunnel["name"] for tunnel in listed] == [{"Subdomain": "my-app"}, {"PortNumber": port}]
    for tunnel, paths in zip(listed, (["my-app"], [str(port), f":{port}"]), strict=True):
        assert re.fullmatch("[0-9a-f]{32}", tunnel["id"])
        assert (tunnel["read_bytes"], tunnel["written_bytes"]) == (0, 0)
        for path in paths:
            assert metadata(server, f"/tunnels/{path}") == (200, tunnel)
    assert metadata(server, "/tunnels/other") == (404, None)


def test_its_counters_are_exact(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """``read_bytes`` went from tunnel to visitor, ``written_bytes`` from visitor to tunnel."""
    service = start_service(lambda peer: peer.sendall(b"answer" if peer.exactly(1000) else b""))
    tunnel = open_tunnel(service, kind="tcp")
    with connect(int(tunnel.url.rpartition(":")[2])) as visitor:
        visitor.sendall(b"x" * 1000)
        assert visitor.recv(100) == b"answer"
        (listed,) = metadata(server)[1]
        assert (listed["read_bytes"], listed["written_bytes"]) == (6, 1000)


def test_it_is_gone_after_the_client_has_left(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(), "my-app")
    assert metadata(server, "/tunnels/my-app")[0] == 200
    tunnel.close()
    eventually(lambda: metadata(server) == (200, []))
    assert metadata(server, "/tunnels/my-app") == (404, None)
    assert get(server.proxy_port, "my-app").status == 404


def test_a_visitor_is_forwarded_to_the_peer_that_has_it(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    ports = free_ports(4)
    first, second = (
        start_server(
            metadata_port=ports[number],
            proxy_port=ports[number + 1],
            peers=f"127.0.0.1:{ports[2 - number]}:{ports[3 - number]}",
        )
        for number in (0, 2)
    )
    open_tunnel(start_service(answering(lambda _: respond(b"from afar"))), "far", server=second)
    with connect(first.proxy_port) as visitor:
        for _ in range(2):
            visitor.sendall(request("far"))
            assert read_response(visitor).body == b"from afar"
