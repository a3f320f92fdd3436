"""The library: `Tunnel` and `TunnelServer` from plain threads, and from a patched program."""

from __future__ import annotations

import http.client
import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import gevent.monkey
import pytest

from tinytun_gevent import Tunnel, TunnelError, TunnelServer
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.events import State
from tinytun_gevent.errors import NameTakenError, UnreachableError, UsageError

DEADLINE = 20.0


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield service.server_address[1]
    service.shutdown()
    service.server_close()


@pytest.fixture(scope="module")
def server() -> Iterator[TunnelServer]:
    ports = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
    with TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports) as running:
        yield running


def fetch(server: TunnelServer, url: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
    try:
        connection.request("GET", "/", headers={"Host": url.removeprefix("http://")})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_tunnel_from_plain_threads(server: TunnelServer, page: int) -> None:
    assert not gevent.monkey.is_module_patched("socket")
    with Tunnel(page, server=server.url, subdomain="plain") as tunnel:
        assert tunnel.url == f"http://plain.localhost:{server.proxy_port}"
        assert tunnel.state is State.CONNECTED
        answers: list[tuple[int, bytes]] = []
        visitors = [
            threading.Thread(target=lambda: answers.append(fetch(server, tunnel.url))) for _ in range(10)
        ]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join(DEADLINE)
        assert answers == [(200, b"hello")] * 10
        assert tunnel.counters.bytes_out > 500
    assert tunnel.state is State.CLOSED
    assert fetch(server, "http://plain.localhost")[0] == 404
    with pytest.raises(RuntimeError):
        _ = tunnel.url


def test_several_tunnels_share_one_thread(server: TunnelServer, page: int) -> None:
    with Tunnel(page, server=server.url) as one:
        before = threading.active_count()
        with Tunnel(f"127.0.0.1:{page}", server=server.url) as other:
            assert threading.active_count() == before
            assert one.url != other.url
            assert fetch(server, one.url) == fetch(server, other.url) == (200, b"hello")


def test_a_tcp_tunnel(server: TunnelServer, page: int) -> None:
    with Tunnel(page, kind="tcp", server=server.url) as tunnel:
        host, _, port = tunnel.url.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port)), DEADLINE) as visitor:
            visitor.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert visitor.recv(5) == b"HTTP/"


def test_a_checked_config(server: TunnelServer, page: int) -> None:
    config = make_config(str(page), server=server.url, subdomain="configured", environ={})
    with Tunnel.from_config(config) as tunnel:
        assert tunnel.url.startswith("http://configured.")


def test_errors_are_raised_where_the_tunnel_is_opened(server: TunnelServer, page: int) -> None:
    with pytest.raises(UsageError):
        Tunnel("nonsense")
    with Tunnel(page, server=server.url, subdomain="mine"), pytest.raises(NameTakenError):
        Tunnel(page, server=server.url, subdomain="mine").open()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UnreachableError) as caught:
            Tunnel(page, server=silent, timeout=0.3).open()
        assert isinstance(caught.value, TunnelError)


def test_a_failed_open_may_be_tried_again(server: TunnelServer, page: int) -> None:
    tunnel = Tunnel(page, server=server.url, subdomain="again")
    with Tunnel(page, server=server.url, subdomain="again"), pytest.raises(NameTakenError):
        tunnel.open()
    with tunnel:
        assert fetch(server, tunnel.url) == (200, b"hello")
        with pytest.raises(RuntimeError, match="already open"):
            tunnel.open()
    tunnel.close()


def test_closing_from_another_thread_ends_the_wait(server: TunnelServer, page: int) -> None:
    tunnel = Tunnel(page, server=server.url)
    tunnel.open()
    waiter = threading.Thread(target=tunnel.wait)
    waiter.start()
    tunnel.close()
    waiter.join(DEADLINE)
    assert not waiter.is_alive()


def test_a_patched_program(server: TunnelServer, page: int) -> None:
    code = f"""
from gevent import monkey; monkey.patch_all()
import threading, urllib.request
from tinytun_gevent import Tunnel, TunnelServer
ports = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
with TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports) as server:
    with Tunnel({page}, server=server.url, subdomain="x") as tunnel:
        request = urllib.request.Request(f"http://127.0.0.1:{{server.proxy_port}}/")
        request.add_header("Host", tunnel.url.removeprefix("http://"))
        print(urllib.request.urlopen(request, timeout=10).read())
from tinytun_gevent import background
print(background._thread)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["b'hello'", "None"], done.stderr


def test_nothing_is_left_behind(server: TunnelServer, page: int) -> None:
    psutil = pytest.importorskip("psutil")
    process = psutil.Process()
    for _ in range(3):
        with Tunnel(page, server=server.url) as tunnel:
            fetch(server, tunnel.url)
    before = process.num_fds()
    for _ in range(20):
        with Tunnel(page, server=server.url) as tunnel:
            fetch(server, tunnel.url)
    deadline = time.monotonic() + DEADLINE
    while process.num_fds() > before + 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.num_fds() <= before + 3
