"""DNS rebinding: the metadata API answers only who asks it by a name that can mean nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import connect, read_rest

from tinytun_gevent import TunnelServer
from tinytun_gevent.server import app
from tinytun_gevent.server.metadata_plain import PlainHost
from tinytun_gevent.wire.handshake import Kind

PATHS = (b"/tunnels", b"/tunnels/app", b"/metrics", b"/status")


@pytest.fixture(scope="module", params=["gunicorn", "standard library"])
def server(request: pytest.FixtureRequest) -> Iterator[TunnelServer]:
    """A server with a tunnel, whose metadata API is served by either of its hosts."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "gunicorn":
            patch.setattr(app, "_metadata_host", PlainHost)
        with TunnelServer(
            bind="127.0.0.1",
            base_domains="localhost",
            metadata_hosts="meta.example.com",
            connection_port=0,
            proxy_port=0,
            tcp_proxy_port=0,
            metadata_port=0,
        ) as server:
            server.registry.establish(server.registry.claim(Kind.HTTP, subdomain="app"))
            yield server


def ask(server: TunnelServer, line: bytes, *fields: bytes) -> bytes:
    """All that is answered to one request."""
    with connect(server.metadata_port) as sock:
        sock.sendall(b"\r\n".join([line, *fields, b"Connection: close", b"", b""]))
        return read_rest(sock)


def secret(server: TunnelServer) -> bytes:
    return server.registry.tunnels["app"].id.encode()


@pytest.mark.parametrize(
    "host",
    [
        *(
            b"LOCALHOST",
            b"LocalHost.:5553",
            b"localhost:",
            b"META.Example.COM.",
            b"127.0.0.1",
            b"127.0.0.1.:80",
        ),
        *(b"10.1.2.3:5553", b"[::1]", b"[0:0::1]:5553", b"[::FFFF:127.0.0.1]"),
    ],
)
def test_what_is_answered(server: TunnelServer, host: bytes) -> None:
    assert secret(server) in ask(server, b"GET /tunnels HTTP/1.1", b"Host: " + host)


OTHER_HOSTS = [
    *(b"evil.example", b"EVIL.EXAMPLE", b"evil.example.", b"evil.example:5553", b"evil.example.:5553"),
    *(
        b"localhost.evil.example",
        b"LOCALHOST.EVIL.EXAMPLE.",
        b"app.localhost",
        b"evil-localhost",
        b"localhost..",
    ),
    *(b".localhost", b"xlocalhost", b"meta.example.com.evil.example", b"example.com", b"meta_example.com"),
    # What looks like an address.
    *(b"127.0.0.1.evil.example", b"127.0.0.1.nip.io", b"127.0.0.1..", b"127-0-0-1.evil.example"),
    *(b"2130706433", b"0x7f000001", b"0x7f.0.0.1", b"0177.0.0.1", b"127.1", b"127.0.0.1.1", b"127.0.0.256"),
    *(b"[::1].evil.example", b"[::1]evil.example", b"[evil.example]", b"[::1", b"::1", b"[127.0.0.1]", b"[]"),
    *(b"[::1]:x", b"[::1]:1@evil.example", b"--1.ipv6-literal.net"),
    # With a user, or something else that a program might cut off.
    *(
        b"localhost@evil.example",
        b"evil.example@localhost",
        b"127.0.0.1:80@evil.example",
        b"user:pw@127.0.0.1",
    ),
    *(b"127.0.0.1:x@evil.example", b"localhost:evil.example", b"localhost:1:2", b"127.0.0.1:123456"),
    *(b"localhost,evil.example", b"127.0.0.1:1,evil.example", b"localhost evil.example", b"localhost/evil"),
    *(
        b"localhost#evil.example",
        b"localhost?evil",
        b"localhost\\.evil.example",
        b"localhost%00.evil",
        b"",
        b":80",
    ),
    *(b"localhost\xe3\x80\x82evil.example", b"\xef\xbd\x8cocalhost"),
]


@pytest.mark.parametrize("host", OTHER_HOSTS, ids=ascii)
def test_what_is_not(server: TunnelServer, host: bytes) -> None:
    for path in PATHS:
        answer = ask(server, b"GET %b HTTP/1.1" % path, b"Host: " + host)
        assert answer[:13] in (b"HTTP/1.1 421 ", b"HTTP/1.1 400 ", b"HTTP/1.0 421 ", b"HTTP/1.0 400 ")
        assert secret(server) not in answer
        assert b"tinytun_" not in answer


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        # No Host at all, or two, or one that is not quite.
        (b"/tunnels", ()),
        (b"/tunnels", (b"X-Forwarded-Host: localhost",)),
        (b"/tunnels", (b"Host: evil.example", b"X-Forwarded-Host: localhost")),
        (b"/tunnels", (b"Host: localhost", b"Host: evil.example")),
        (b"/tunnels", (b"Host: evil.example", b"Host: localhost")),
        (b"/tunnels", (b"Host: 127.0.0.1:1", b"Host: evil.example")),
        (b"/tunnels", (b"Host: 127.0.0.1:1", b"Host: 2")),
        (b"/tunnels", (b"Host : localhost",)),
        (b"/tunnels", (b"Host: evil.example,", b" localhost")),
        (b"/tunnels", (b"HTTP_HOST: localhost",)),
        # A target with a host of its own.
        (b"http://evil.example/tunnels", (b"Host: localhost",)),
        (b"HTTP://evil.example:80/tunnels", (b"Host: 127.0.0.1",)),
        (b"http://localhost@evil.example/tunnels", (b"Host: localhost",)),
        (b"http://localhost:x@evil.example/tunnels", (b"Host: localhost",)),
        (b"http://127.0.0.1/tunnels", (b"Host: evil.example",)),
        (b"http:///tunnels", (b"Host: localhost",)),
        (b"ftp://localhost/tunnels", (b"Host: localhost",)),
        (b"evil.example/tunnels", (b"Host: localhost",)),
        (b"tunnels", (b"Host: localhost",)),
        (b"//evil.example/tunnels", (b"Host: localhost",)),
    ],
)
@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
def test_tricks(server: TunnelServer, target: bytes, fields: tuple[bytes, ...], version: bytes) -> None:
    answer = ask(server, b"GET %b %b" % (target, version), *fields)
    assert answer.split(b" ")[1] in (b"400", b"404", b"421")
    assert secret(server) not in answer


def test_a_target_with_the_right_host(server: TunnelServer) -> None:
    """Which gunicorn understands, and the standard library does not."""
    answer = ask(server, b"GET http://127.0.0.1:5553/tunnels HTTP/1.1", b"Host: localhost")
    if answer.startswith(b"HTTP/1.1"):
        assert secret(server) in answer
    else:
        assert answer.startswith(b"HTTP/1.0 404 ")
