"""Floods of every kind that strangers can cause, over real sockets: little of them reaches the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import StartServer, StartService
from raw_client import RawClient
from support import connect, eventually, read_rest

from tinytun_gevent import TunnelServer, rare
from tinytun_gevent.client.ui import LogUi
from tinytun_gevent.server.logs import TextFormatter
from tinytun_gevent.server.tally import Refusal

FLOOD = 60
"""Times that a stranger tries; each would be a line."""

LINE = 300
"""Bytes of a line at most."""

pytestmark = pytest.mark.usefixtures("one_moment")


def ask(port: int, head: bytes) -> None:
    """A connection that says something and waits for the end of it."""
    with contextlib.suppress(OSError), connect(port) as sock:
        sock.sendall(head)
        read_rest(sock)


def wishing(*fields: bytes) -> bytes:
    return b"\r\n".join([b"CONNECT x:1 HTTP/1.1", b"x-tinytun-type: http", *fields, b"", b""])


def refused(server: TunnelServer) -> None:
    ask(server.connection_port, wishing(b"x-tinytun-subdomain: -"))


def taken(server: TunnelServer) -> None:
    with RawClient(server, "demo"):
        ask(server.connection_port, wishing(b"x-tinytun-subdomain: demo"))
    eventually(lambda: "demo" not in server.registry.tunnels)


def malformed(server: TunnelServer) -> None:
    ask(server.connection_port, b"CONNECT\r\n\r\n")


def too_long(server: TunnelServer) -> None:
    ask(server.connection_port, b"CONNECT x:1 HTTP/1.1\r\nx: " + b"x" * 40_000)


def opened_and_left(server: TunnelServer) -> None:
    with RawClient(server, "demo"):
        pass
    eventually(lambda: "demo" not in server.registry.tunnels)


def no_session(server: TunnelServer) -> None:
    with connect(server.connection_port) as sock:
        sock.sendall(wishing(b"x-tinytun-subdomain: demo"))
        sock.recv(12)
    eventually(lambda: "demo" not in server.registry.tunnels)


def no_http2(server: TunnelServer) -> None:
    ask(server.connection_port, wishing(b"x-tinytun-subdomain: demo") + b"\0\0\0\xff\0\0\0\0\0" * 9)
    eventually(lambda: "demo" not in server.registry.tunnels)


def as_a_proxy(server: TunnelServer) -> None:
    for port in (server.connection_port, server.proxy_port, server.tcp_proxy_port):
        ask(port, b"PROXY TCP4 192.0.2.7 192.0.2.8 1111 443\r\n\r\n")


def not_understood(server: TunnelServer) -> None:
    ask(server.metadata_port, b"nonsense\r\n\r\n")


KINDS: list[Callable[[TunnelServer], None]] = [
    refused,
    taken,
    malformed,
    too_long,
    opened_and_left,
    no_session,
    no_http2,
    as_a_proxy,
    not_understood,
]


@contextmanager
def bounded(caplog: pytest.LogCaptureFixture, kinds: int) -> Iterator[None]:
    """What is logged meanwhile is at most the first lines of so many kinds, and a count of each."""
    caplog.clear()
    yield
    rare.sum_up()
    formatter = TextFormatter()
    size = sum(len(formatter.format(record)) + 1 for record in caplog.records)
    assert size <= kinds * (rare.FIRST + 2) * LINE
    assert len(caplog.records) <= kinds * (rare.FIRST + 2)
    assert any(f"more like this in {0} s" in line for line in caplog.messages)


@pytest.mark.parametrize("attack", KINDS)
def test_a_flood_is_bounded_in_the_log(
    server: TunnelServer, caplog: pytest.LogCaptureFixture, attack: Callable[[TunnelServer], None]
) -> None:
    caplog.set_level(logging.INFO, "tinytun_gevent")
    with bounded(caplog, kinds=5):
        for _ in range(FLOOD):
            attack(server)


def test_owners_who_replace_themselves_are_bounded_in_the_log(
    server: TunnelServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tinytun_gevent")
    token = b""
    with bounded(caplog, kinds=3), contextlib.ExitStack() as stack:
        for _ in range(FLOOD):
            token = stack.enter_context(RawClient(server, "demo", resume=token)).token


def test_wrong_tokens_are_bounded_in_the_log(
    start_server: StartServer, caplog: pytest.LogCaptureFixture, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tokens") / "tokens.toml"
    path.touch()
    server = start_server(auth_file=str(path), trusted_proxies="127.0.0.1")
    caplog.set_level(logging.INFO, "tinytun_gevent")
    with bounded(caplog, kinds=3):
        for number in range(FLOOD):  # each from an address of its own, or it would have to wait
            header = b"PROXY TCP4 192.0.2.%d 192.0.2.8 1111 443\r\n" % number
            ask(server.connection_port, header + wishing(b"Authorization: Bearer wrong"))


def test_headers_that_a_trusted_proxy_breaks_are_bounded_in_the_log(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(trusted_proxies="127.0.0.1")
    caplog.set_level(logging.INFO, "tinytun_gevent")
    with bounded(caplog, kinds=1):
        for _ in range(FLOOD):
            ask(server.tcp_proxy_port, b"PROXY TCP4 nonsense\r\n")


def test_limits_are_bounded_in_the_log(
    start_server: StartServer, start_service: StartService, caplog: pytest.LogCaptureFixture
) -> None:
    """Each tunnel says once a minute that it has reached a limit, and all of them together are rare too."""
    server = start_server(tunnel_requests=1, connect_rate=0, source_tunnels=0)
    caplog.set_level(logging.INFO, "tinytun_gevent")
    with contextlib.ExitStack() as stack:
        names = [f"demo{number}" for number in range(rare.FIRST + 10)]
        for name in names:
            stack.enter_context(RawClient(server, name))
        caplog.clear()
        for name in names:
            server.registry.tunnels[name].budget._note(Refusal.REQUESTS)
            server.registry.tunnels[name].budget._note(Refusal.REQUESTS)
        lines = [line for line in caplog.messages if "has reached a limit" in line]
        assert len(lines) == rare.FIRST


def test_an_ordinary_pace_is_logged_line_by_line(
    server: TunnelServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tinytun_gevent")
    for number in range(rare.FIRST // 2):
        with RawClient(server, f"demo{number}"):
            pass
    eventually(lambda: not server.registry.tunnels)
    opened = [line for line in caplog.messages if " opened for " in line]
    assert len(opened) == rare.FIRST // 2


def test_a_service_that_comes_and_goes_is_bounded_in_the_client_s_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "tinytun_gevent")
    ui = LogUi("http://127.0.0.1:3000")
    with bounded(caplog, kinds=2):
        for _ in range(FLOOD):
            ui.local_down("connection refused")
            ui.local_up()
