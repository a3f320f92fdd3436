"""What may be secret is in no log, in neither format, at debug level: the real server, all that it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartService
from server_process import ServerProcess, environment
from support import Peer, Service, connect, eventually, get, read_head, read_response, request, respond

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.server.logs import formatter
from tinytun_gevent.wire import http1

SECRET = "Zq7secretZq7"

FIELDS = (
    f"Cookie: session={SECRET}".encode(),
    f"Authorization: Bearer {SECRET}".encode(),
    f"Proxy-Authorization: Basic {SECRET}".encode(),
    f"X-Api-Key: {SECRET}".encode(),
    f"Referer: https://user:{SECRET}@example.com/page?token={SECRET}#{SECRET}".encode(),
)

TARGET = f"/page?token={SECRET}"


def script(peer: Peer) -> None:
    """A service that answers, breaks off, talks nonsense or upgrades, as the path says."""
    while (got := peer.read_request()) is not None:
        path = got.target.partition(b"?")[0]
        if path == b"/cut":
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nSet-Cookie: %b\r\n\r\n" % SECRET.encode())
            return
        if path == b"/bad":
            peer.sendall(b"HTTP/1.1 nonsense %b\r\n\r\n" % SECRET.encode())
            return
        if path == b"/upgrade":
            head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"
            peer.sendall(head + SECRET.encode())
            peer.wait_end()
            return
        peer.sendall(respond(SECRET.encode(), b"Set-Cookie: " + SECRET.encode()))


def exchanges(port: int) -> None:
    """Requests of every kind, with secrets wherever one may be."""
    body = b"password=" + SECRET.encode()
    for path, name in (
        (TARGET, "demo"),
        (TARGET, "nobody"),
        (f"/bad?{SECRET}", "demo"),
        (f"/cut?{SECRET}", "demo"),
    ):
        with connect(port) as sock:
            sock.sendall(request(name, path, *FIELDS, method=b"POST", body=body))
            read_head(sock)
    with connect(port) as sock:
        sock.sendall(request("demo", f"/upgrade?{SECRET}", b"Connection: Upgrade", b"Upgrade: x", *FIELDS))
        assert read_head(sock).status == 101
        sock.sendall(SECRET.encode())
    for malformed in MALFORMED:
        with connect(port) as sock:
            sock.sendall(malformed.replace(b"SECRET", SECRET.encode()))
            assert read_response(sock).status >= 400
    with connect(port) as sock:  # a body that is not framed as it says
        head = request("demo", TARGET, b"Transfer-Encoding: chunked", *FIELDS, method=b"POST")
        sock.sendall(head + f"{SECRET}\r\n{SECRET}".encode())
        assert read_response(sock).status == 400


MALFORMED = (
    b"GET /?SECRET HTTP/9.9\r\nHost: demo.localhost\r\n\r\n",
    b"GET /?SECRET\r\n\r\n",
    b"SECRET SECRET SECRET SECRET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nAuthorization SECRET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nCookie: SECRET\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: user:SECRET@demo.localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nContent-Length: SECRET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nTransfer-Encoding: SECRET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: demo.localhost\r\nExpect: SECRET\r\n\r\n",
    b"GET http://user:SECRET@demo.localhost/?SECRET HTTP/1.1\r\nHost: demo.localhost\r\n\r\n",
)


def openings(port: int, metadata_port: int) -> None:
    """Attempts to open a tunnel, and to ask the metadata API, with secrets in them."""
    for fields in (
        b"x-tinytun-type: http\r\nx-tinytun-subdomain: demo\r\nAuthorization: Bearer SECRET",
        b"x-tinytun-type: http\r\nx-tinytun-subdomain: demo\r\nx-tinytun-resume: SECRETSECRET",
        b"x-tinytun-type: http\r\nAuthorization: Basic SECRET\r\nx-tinytun-resume: \x01SECRET",
        b"x-tinytun-join: SECRET SECRETSECRETSECRET",
        b"Authorization SECRET",
    ):
        with connect(port) as sock:
            head = b"CONNECT x:1 HTTP/1.1\r\n" + fields.replace(b"SECRET", SECRET.encode()) + b"\r\n\r\n"
            sock.sendall(head)
            assert int(read_head(sock).start.split()[1]) >= 400
    for head in (
        f"GET /tunnels?{SECRET} HTTP/1.1\r\nHost: {SECRET}\r\n\r\n",
        f"GET /?{SECRET} HTTP/9\r\n\r\n",
    ):
        with connect(metadata_port) as sock:
            sock.sendall(head.encode())
            assert int(read_head(sock).start.split()[1]) >= 400


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_nothing_secret_is_printed_or_logged(log_format: str, tmp_path: Path) -> None:
    access = tmp_path / "access.log"
    environ = environment(LOG_LEVEL="debug", LOG_FORMAT=log_format, ACCESS_LOG=str(access))
    with ServerProcess(environ=environ).wait_serving() as server, Service(script) as service:
        with Tunnel(service.port, server=server.url, subdomain="demo"):
            exchanges(server.proxy_port)
            openings(server.connection_port, server.metadata_port)
        server.process.terminate()
        assert server.wait() == 0
        log, accessed = server.log(), access.read_text()
    assert log.count("exchange over") == len(MALFORMED) + 6
    assert accessed.count("\n") == len(MALFORMED) + 6
    assert "/page" in accessed
    assert SECRET not in log
    assert SECRET not in accessed
    if log_format == "json":
        for line in log.splitlines():
            assert {"time", "level", "logger", "message"} <= json.loads(line).keys()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_an_internal_error_does_not_tell_what_it_met(
    log_format: str,
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def mistake(head: bytes, *args: object) -> None:
        raise ValueError(f"this code cannot cope with {head!r}")

    open_tunnel(start_service(script))
    caplog.set_level("DEBUG")
    with monkeypatch.context() as patch:
        patch.setattr(http1, "parse_response_head", mistake)
        response = get(server.proxy_port, "demo", TARGET, *FIELDS)
    assert response.status == 500
    with monkeypatch.context() as patch, connect(server.proxy_port) as sock:
        patch.setattr(http1, "parse_request_head", mistake)
        sock.sendall(request("demo", TARGET, *FIELDS))
        assert sock.recv(100) == b""
    eventually(lambda: any("connection from" in made.getMessage() for made in caplog.records))
    printed = "\n".join(map(formatter(log_format).format, caplog.records))
    request_id = (response.get(b"x-request-id") or b"").decode()
    assert f"request {request_id} failed by an internal error" in printed
    assert f"request {request_id}, status 500" in printed
    assert printed.count("ValueError") >= 2
    assert SECRET not in printed
