"""Rewriting through real servers and clients: a service that checks Host and Origin as frameworks do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartServer, StartService
from support import Request, Response, Service, answering, connect, read_head, read_response, request, respond

from tinytun_gevent import TunnelServer
from tinytun_gevent.wire.origin import parse_origin

Post = Callable[..., Response]


def strict(got: Request) -> bytes:
    """Answers as Django, Rails and Jupyter do together: only who comes from its own pages may post."""
    host = (got.get(b"host") or b"").decode()
    scheme = (got.get(b"x-forwarded-proto") or b"http").decode()
    if not host.startswith(("localhost:", "127.0.0.1:")):
        return respond(b"Host", status=b"421 Misdirected Request")
    origin = (got.get(b"origin") or b"").decode()
    if origin not in ("", f"http://{host}"):
        return respond(b"Origin", status=b"403 Forbidden")
    referer = (got.get(b"referer") or b"").decode()
    if referer and not referer.startswith(f"http://{host}/"):
        return respond(b"Referer", status=b"403 Forbidden")
    if got.get(b"upgrade") is not None:
        return b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    return respond(
        b"moved",
        f"Location: {scheme}://{host}/done".encode(),
        f"Content-Location: http://{host}/save".encode(),
        f"Set-Cookie: id=1; Domain={host.partition(':')[0]}; Path=/".encode(),
        b"X-Host: " + (got.get(b"x-forwarded-host") or b"-"),
        b"X-Proto: " + (got.get(b"x-forwarded-proto") or b"-"),
        status=b"303 See Other",
    )


@pytest.fixture
def secure(start_server: StartServer) -> TunnelServer:
    """A server behind a proxy that ends TLS, which is where the tests' visitors are."""
    return start_server(trusted_proxies="127.0.0.1")


def post(server: TunnelServer, scheme: str, *fields: bytes) -> Response:
    """The answer to a form sent from the tunnel's own page, unless ``fields`` say otherwise."""
    host = public_host(server)
    own = (b"Origin: %b://%b" % (scheme.encode(), host), b"Referer: %b://%b/form" % (scheme.encode(), host))
    lines = (b"Host: " + host, b"Content-Length: 0", b"X-Forwarded-For: 192.0.2.1", *(fields or own))
    with connect(server.proxy_port) as sock:
        sock.sendall(
            b"POST /save HTTP/1.1\r\nX-Forwarded-Proto: %b\r\n%b\r\n\r\n"
            % (scheme.encode(), b"\r\n".join(lines))
        )
        return read_response(sock)


def public_host(server: TunnelServer) -> bytes:
    return b"demo.localhost:%d" % server.proxy_port


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_form_of_the_own_page_is_taken_and_its_answer_is_public(
    secure: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, scheme: str
) -> None:
    open_tunnel(start_service(answering(strict)), server=secure, host_header="rewrite")
    answer = post(secure, scheme)
    public = scheme.encode() + b"://" + public_host(secure)
    assert (answer.status, answer.body) == (303, b"moved")
    assert answer.get(b"location") == public + b"/done"
    assert answer.get(b"content-location") == public + b"/save"
    assert answer.get(b"set-cookie") == b"id=1; Path=/"
    assert answer.get(b"x-host") == public_host(secure)


def test_a_form_of_another_site_is_still_refused(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(strict)), host_header="rewrite")
    for origin in (b"https://evil.test", b"null", b"http://other.localhost:%d" % server.proxy_port):
        answer = post(server, "http", b"Origin: " + origin)
        assert (answer.status, answer.body) == (403, b"Origin")
    answer = post(server, "http", b"Referer: https://evil.test/")
    assert (answer.status, answer.body) == (403, b"Referer")


def test_a_websocket_s_origin_is_rewritten_too(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(strict)), host_header="rewrite")
    own = b"Origin: http://" + public_host(server)
    for origin, status in ((own, 101), (b"Origin: http://evil.test", 403)):
        with connect(server.proxy_port) as sock:
            sock.sendall(
                b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: Upgrade\r\nUpgrade: echo\r\n%b\r\n\r\n"
                % (public_host(server), origin)
            )
            assert read_head(sock).status == status


def test_a_name_as_host_header_is_the_origin_as_well(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(strict)), host_header="localhost:1234")
    answer = post(server, "http")
    assert answer.status == 303
    assert answer.get(b"location") == b"http://" + public_host(server) + b"/done"


def test_the_public_address_can_be_left_out(
    secure: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(strict)), server=secure, host_header="rewrite", forwarded_host=False)
    answer = post(secure, "https")
    assert (answer.status, answer.get(b"x-host"), answer.get(b"x-proto")) == (303, b"-", b"-")
    assert answer.get(b"location") == b"https://" + public_host(secure) + b"/done"


def test_links_can_be_left_as_they_are(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(answering(strict))
    open_tunnel(service, host_header="rewrite", rewrite_links=False)
    answer = post(server, "http")
    host = service.target.encode()
    assert answer.get(b"location") == b"http://" + host + b"/done"
    assert answer.get(b"set-cookie") == b"id=1; Domain=%b; Path=/" % host.partition(b":")[0]


def test_links_alone_can_be_made_public(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """For a service that has its own address in its configuration."""

    def fixed(got: Request) -> bytes:
        return respond(b"", b"Location: http://localhost:%d/" % service.port, b"X-Got: " + got.get(b"origin"))

    service: Service = start_service(answering(fixed))
    open_tunnel(service, rewrite_links=True)
    answer = post(server, "http")
    public = b"http://" + public_host(server)
    assert (answer.get(b"location"), answer.get(b"x-got")) == (public + b"/", public)


def test_without_the_options_nothing_is_rewritten(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def fixed(got: Request) -> bytes:
        return respond(b"", b"Location: http://localhost:%d/" % service.port, b"X-Got: " + got.get(b"origin"))

    service: Service = start_service(answering(fixed))
    open_tunnel(service)
    answer = post(server, "http")
    assert answer.get(b"location") == b"http://localhost:%d/" % service.port
    assert answer.get(b"x-got") == b"http://" + public_host(server)
    assert server.registry.tunnels["demo"].rewriting is None


def test_further_sessions_and_a_resumed_tunnel_keep_the_options(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(answering(strict)), host_header="rewrite")
    before = server.registry.tunnels["demo"].options
    for session in list(server.registry.tunnels["demo"].sessions):
        session.close()
    assert before is not None
    assert post(server, "http").status == 303
    assert server.registry.tunnels["demo"].options == before
    assert tunnel.config.options == before


def test_the_access_log_has_what_the_visitor_sent(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, tmp_path: Path
) -> None:
    server = start_server(access_log=str(tmp_path / "access.log"))
    open_tunnel(start_service(answering(strict)), server=server, host_header="rewrite")
    assert post(server, "http").status == 303
    server.stop()
    text = (tmp_path / "access.log").read_bytes()
    assert b'"http://%b/form"' % public_host(server) in text


def test_a_request_without_any_of_it_is_as_before(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(answering(lambda got: respond(got.get(b"host") or b"")))
    open_tunnel(service, host_header="rewrite")
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo"))
        assert read_response(sock).body == service.target.encode()
    assert parse_origin(b"http://" + service.target.encode()) is not None
