"""Services that read and write their connections carelessly: what one visitor sets up never reaches another.

The real programs where there is one: Python's ``http.server``, Werkzeug, aiohttp, Node. Each test has an
attacker and a victim with connections of their own; the victim's answer must be to its own request.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenTunnel, StartServer, StartService
from raw_client import RawClient
from support import (
    DEADLINE,
    Peer,
    connect,
    eventually,
    get,
    read_response,
    request,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.server import starvation

EVIL = b"GET /evil HTTP/1.1\r\nHost: demo.localhost\r\nX-Hidden: "
"""What an attacker wants to be taken for the victim's request, whose own first line it hides in a field."""

EVIL_ANSWER = respond(b"evil")
"""What a service says that nobody has asked for, or for which the wrong visitor would take it."""

UPGRADE = (b"Connection: Upgrade", b"Upgrade: x")


# -- real programs ---------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*argv: str, **options: Any) -> Iterator[int]:
    """A service that prints its port within its first line; the port."""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            yield next(int(word) for word in line.split() if word.isdecimal())
        finally:
            process.kill()
            process.wait(DEADLINE)


HTTP_SERVER = """
import http.server, sys
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""

WERKZEUG = """
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response
WSGIRequestHandler.protocol_version = "HTTP/1.1"
@Request.application
def app(request):
    return Response(request.path)
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""

AIOHTTP = """
import asyncio
from aiohttp import web
async def handle(request):
    return web.Response(text=request.path)
async def main():
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

NODE = """
const http = require('http');
const server = http.createServer((request, response) => response.end(request.url));
server.on('upgrade', (request, socket) =>
    socket.write('HTTP/1.1 403 Forbidden\\r\\nContent-Length: 2\\r\\n\\r\\nno'));
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pages for a file server."""
    for name in ("victim", "evil"):
        (tmp_path / name).write_text(f"/{name}")
    return tmp_path


@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.parametrize(
    "program", [HTTP_SERVER, WERKZEUG, AIOHTTP], ids=["http.server", "werkzeug", "aiohttp"]
)
def test_a_body_that_is_not_read_is_nobody_s_request(
    server: TunnelServer, open_tunnel: OpenTunnel, folder: Path, program: str, method: bytes
) -> None:
    with running(sys.executable, "-c", program, cwd=folder) as port:
        open_tunnel(port)
        for _ in range(3):
            with connect(server.proxy_port) as attacker, connect(server.proxy_port) as victim:
                attacker.sendall(request("demo", "/victim", method=method, body=EVIL))
                read_response(attacker)
                for _ in range(3):
                    victim.sendall(request("demo", "/victim"))
                    assert read_response(victim).body == b"/victim"
            assert get(server.proxy_port, target="/victim").body == b"/victim"


def test_node_leaves_a_refused_upgrade_to_nobody(server: TunnelServer, open_tunnel: OpenTunnel) -> None:
    """Its parser is gone from that connection, so the next request there gets no answer."""
    with running("node", "-e", NODE) as port:
        open_tunnel(port)
        for _ in range(3):
            with connect(server.proxy_port) as attacker:
                attacker.sendall(request("demo", "/ws", *UPGRADE))
                assert read_response(attacker).status == 403
                assert get(server.proxy_port, target="/victim").body == b"/victim"


# -- scripted services -----------------------------------------------------------------------------


class Trap:
    """A service that answers the first request of a connection badly, and all later ones there with evil.

    A request for ``/victim`` at the head of a connection is answered well.
    """

    def __init__(self, bad: bytes) -> None:
        self.bad = bad

    def __call__(self, peer: Peer) -> None:
        trapped = False
        while (got := peer.read_request()) is not None:
            if trapped:
                peer.sendall(EVIL_ANSWER)
            elif got.target == b"/victim":
                peer.sendall(respond(b"victim"))
            else:
                trapped = True
                peer.sendall(self.bad)


@pytest.mark.parametrize(
    ("fields", "method", "body", "bad"),
    [
        ((), b"GET", b"body", respond()),
        ((), b"POST", b"body", respond()),
        ((b"Transfer-Encoding: chunked",), b"POST", b"", respond()),
        ((), b"HEAD", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"),
        ((), b"GET", b"", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ((), b"GET", b"", b"HTTP/1.1 304 Not Modified\r\n\r\n"),
        (UPGRADE, b"GET", b"", respond(b"no", status=b"403 Forbidden")),
        (UPGRADE, b"GET", b"", respond()),
        ((b"Authorization: Negotiate x",), b"GET", b"", respond()),
        ((), b"GET", b"", respond(b"x", b"WWW-Authenticate: NTLM", status=b"401 Unauthorized")),
    ],
    ids=["get", "post", "chunked", "head", "204", "304", "refused", "ignored", "negotiate", "ntlm"],
)
def test_a_stream_is_for_others_only_after_a_plain_exchange(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
    fields: tuple[bytes, ...],
    method: bytes,
    body: bytes,
    bad: bytes,
) -> None:
    monkeypatch.setattr(starvation, "PATIENCE", 3600.0)  # however long the victim's answer takes
    service = start_service(Trap(bad))
    open_tunnel(service)
    asked = request("demo", "/", *fields, method=method, body=body)
    if b"chunked" in b"".join(fields):
        asked += b"0\r\n\r\n"
    with connect(server.proxy_port) as attacker, connect(server.proxy_port) as victim:
        attacker.sendall(asked)
        read_response(attacker, method)
        victim.sendall(request("demo", "/victim"))
        assert read_response(victim).body == b"victim"
        # It has stayed with the one whose request it was …
        attacker.sendall(request("demo", "/again"))
        assert read_response(attacker).body == b"evil"
        # … for good, whatever came since.
        assert get(server.proxy_port, target="/victim").body != b"evil"
    assert len(service.peers) <= 3


@pytest.mark.parametrize(
    "answer",
    [respond(), respond(b""), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
    ids=["length", "empty", "chunks"],
)
def test_plain_exchanges_of_all_visitors_share_a_stream(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, answer: bytes
) -> None:
    def script(peer: Peer) -> None:
        while peer.read_request() is not None:
            peer.sendall(answer)

    service = start_service(script)
    open_tunnel(service)
    for method in (b"GET", b"OPTIONS", b"DELETE", b"POST", b"PUT"):
        assert get(server.proxy_port, "demo", "/", b"Content-Length: 0", method=method).status == 200
    assert len(service.peers) == 1


# -- proxies in front ------------------------------------------------------------------------------


def from_client(address: bytes, target: str = "/", *fields: bytes, **options: Any) -> bytes:
    return request("demo", target, b"X-Forwarded-For: " + address, *fields, **options)


def test_visitors_behind_one_proxy_are_strangers(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Even those with one address: they may share it."""
    server = start_server(trusted_proxies="127.0.0.1")
    service = start_service(Trap(respond()))
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as proxy:
        for client in (b"192.0.2.1", b"192.0.2.2"):
            proxy.sendall(from_client(b"192.0.2.1", method=b"POST", body=b"body"))
            assert read_response(proxy).body == b"ok"
            proxy.sendall(from_client(client, "/victim"))
            assert read_response(proxy).body == b"victim"


def test_a_login_behind_a_proxy_is_its_client_s(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        user = b"nobody"
        while (got := peer.read_request()) is not None:
            user = (got.get(b"authorization") or user).removeprefix(b"NTLM ")
            peer.sendall(respond(user))

    server = start_server(trusted_proxies="127.0.0.1")
    open_tunnel(start_service(script), server=server)
    with connect(server.proxy_port) as proxy:
        for client, login, user in (
            (b"192.0.2.1", b"Authorization: NTLM ann", b"ann"),
            (b"192.0.2.1", b"X-None: x", b"ann"),
            (b"192.0.2.2", b"X-None: x", b"nobody"),
            (b"192.0.2.1", b"X-None: x", b"nobody"),
        ):
            proxy.sendall(from_client(client, "/", login))
            assert read_response(proxy).body == user


# -- by hand ---------------------------------------------------------------------------------------


def test_a_second_answer_is_nobody_s(server: TunnelServer) -> None:
    """It comes in a frame of its own, while a victim waits for the tunnel's only stream."""
    with (
        RawClient(server, max_streams=1) as client,
        connect(server.proxy_port) as attacker,
        connect(server.proxy_port) as victim,
    ):
        attacker.sendall(request("demo", "/attacker"))
        stream_id, _ = client.next_request()
        victim.sendall(request("demo", "/victim"))
        pool = server.registry.tunnels["demo"].pool
        eventually(lambda: pool.waiting_count == 1)
        client.send(stream_id, respond(b"attacker"), EVIL_ANSWER)
        assert read_response(attacker).body == b"attacker"
        again, head = client.next_request()
        assert head.startswith(b"GET /victim ")
        client.send(again, respond(b"victim"))
        assert read_response(victim).body == b"victim"
