"""The library: `Tunnel` and `TunnelServer` from plain threads, and from a patched program."""

from __future__ import annotations

import http.client
import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent.monkey
import pytest

from tinytun_gevent import NameTakenError, Tunnel, TunnelError, TunnelServer, UnreachableError, UsageError
from tinytun_gevent.background import run_in_hub
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.events import Listener, State

DEADLINE = 60.0


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
        print(urllib.request.urlopen(request, timeout=60).read())
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


# -- a name stays its owner's ---------------------------------------------------


def die(tunnel: Tunnel) -> None:
    """Ends it as the kernel ends a process: no goodbye, and the lock is dropped."""

    def cut() -> None:
        agent = tunnel._agent
        assert agent is not None
        assert agent._main is not None
        agent._main.kill()
        agent._claim.release(freed=False)
        for session in agent._sessions:
            session.end.sock.shutdown(socket.SHUT_RDWR)

    run_in_hub(cut)


@pytest.mark.parametrize("options", [{"subdomain": "mine"}, {"kind": "tcp", "port": 20123}])
def test_a_name_is_its_owners_while_he_lives_and_after_he_died(
    server: TunnelServer, page: int, options: dict[str, Any]
) -> None:
    first = Tunnel(page, server=server.url, **options)
    second = Tunnel(page, server=server.url, **options)
    first.open()
    with pytest.raises(NameTakenError):
        second.open()
    url = first.url
    die(first)
    with second:
        assert second.url == url
    with Tunnel(page, server=server.url, **options) as third:
        assert third.url == url
    first.close(grace=0)


def test_a_name_that_was_said_goodbye_to_is_anybodys(
    server: TunnelServer, page: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Tunnel(page, server=server.url, subdomain="free"):
        pass
    monkeypatch.setenv("TINYTUN_STATE_DIR", str(tmp_path))  # another user's
    with Tunnel(page, server=server.url, subdomain="free"):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_state_takes_the_name_once_and_not_again_and_again(
    server: TunnelServer, page: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    states: list[str] = []
    reasons: list[str] = []

    class Watching(Listener):
        def state(self, state: State, reason: str) -> None:
            states.append(state)
            reasons.append(reason)

    mine, copy = tmp_path / "mine", tmp_path / "copy"
    monkeypatch.setenv("TINYTUN_STATE_DIR", str(mine))
    with Tunnel(page, server=server.url, subdomain="copied", events=Watching()) as first:
        shutil.copytree(mine, copy)
        monkeypatch.setenv("TINYTUN_STATE_DIR", str(copy))
        with Tunnel(page, server=server.url, subdomain="copied") as second:
            wait_until(lambda: any("not available" in reason for reason in reasons))
            assert second.state is State.CONNECTED
            assert fetch(server, second.url) == (200, b"hello")
        wait_until(lambda: first.state is State.CONNECTED)
        assert states.count("connected") == 2


def test_a_hundred_clients_are_back_seconds_after_the_server(page: int) -> None:
    def start(port: int) -> TunnelServer:
        ports = dict.fromkeys(("proxy_port", "tcp_proxy_port", "metadata_port"), 0)
        ports |= {"connection_port": port, "source_tunnels": 0}  # all have one address
        return TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports).start()

    server = start(0)
    tunnels = [Tunnel(page, server=server.url) for _ in range(100)]
    try:
        for tunnel in tunnels:
            tunnel.open()
        urls = [tunnel.url for tunnel in tunnels]
        port = server.connection_port
        server.stop()
        server = start(port)
        wait_until(lambda: len(server.registry.tunnels) == 100)
        wait_until(lambda: all(tunnel.state is State.CONNECTED for tunnel in tunnels))
        assert [name_of(tunnel.url) for tunnel in tunnels] == [name_of(url) for url in urls]
    finally:
        for tunnel in tunnels:
            tunnel.close(grace=0)
        server.stop()


def name_of(url: str) -> str:
    return url.removeprefix("http://").partition(".")[0]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
