"""``tinytun demo``: works at once, on any ports, and ends cleanly."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gevent
import pytest
from gevent.server import StreamServer

from tinytun_gevent.client import demo as demo_module
from tinytun_gevent.client.demo import next_steps, open_demo
from tinytun_gevent.client.demo_page import _answer, page
from tinytun_gevent.client.ui import LogUi

TINYTUN = str(Path(__file__).resolve().parent.parent / "bin" / "tinytun")
DEADLINE = 60.0


@contextlib.contextmanager
def demo(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running demo; yields the process and its URL."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TERM", "TINYTUN_SERVER_URL")}
    # A proxy that does not exist: the demo must not be led astray by it.
    environment |= {"HTTPS_PROXY": "http://127.0.0.1:1", "TINYTUN_SERVER_URL": "http://127.0.0.1:1"}
    process = subprocess.Popen(
        [sys.executable, TINYTUN, "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        yield process, process.stdout.readline().rstrip("\n")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def fetch(url: str, path: str = "/") -> tuple[int, str]:
    host = url.removeprefix("http://")
    connection = http.client.HTTPConnection("127.0.0.1", int(host.rpartition(":")[2]), timeout=DEADLINE)
    try:
        connection.request("GET", path, headers={"Host": host, "User-Agent": "<b>test</b>"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Ends the demo as Ctrl-C does; returns the exit code and standard error."""
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    return process.wait(DEADLINE), process.stderr.read()


def test_it_serves_its_page_and_says_what_to_do_next() -> None:
    with demo() as (process, url):
        assert re.fullmatch(r"http://demo\.localhost:\d+", url)
        status, body = fetch(url)
        assert status == 200
        assert "This page came through a tunnel" in body
        assert f"<dd>{url.removeprefix('http://')}" in body
        assert "<dd>127.0.0.1" in body
        assert "&lt;b&gt;test&lt;/b&gt;" in body
        assert fetch(url, "/none")[0] == 404
        code, errors = stop(process)
        assert code == 0
        assert "It works: a page came through the tunnel (200 in " in errors
        assert url in errors
        assert "tinytun demo --target" in errors
        assert "Traceback" not in errors
        assert process.stdout is not None
        assert process.stdout.read() == ""


def test_two_demos_at_once() -> None:
    with demo() as (first, url), demo() as (second, other):
        assert url != other
        assert fetch(url)[0] == fetch(other)[0] == 200
        assert stop(first)[0] == stop(second)[0] == 0


def test_a_target_of_the_users() -> None:
    def answer(sock: socket.socket, _: object) -> None:
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 203 Mine\r\nContent-Length: 4\r\n\r\nmine")

    service = StreamServer(("127.0.0.1", 0), answer)
    service.start()
    with gevent.Timeout(DEADLINE), open_demo(f"127.0.0.1:{service.server_port}", LogUi("x")) as opened:
        assert (opened.check.status, opened.check.body) == (203, b"mine")
        assert "came through the tunnel (203 in" in next_steps(opened, "3000")
    service.stop()


def test_a_target_that_is_away_is_said_and_served_anyway() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with demo("--target", str(port)) as (process, url):
        status, body = fetch(url)
        assert status == 502
        assert "connection refused" in body
        code, errors = stop(process)
        assert code == 0
        assert f"nothing answers behind it: localhost:{port}: connection refused" in errors


def test_the_default_ports_are_used_where_they_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = other.getsockname()[1]
        other.close()
        ports = {"proxy_port": free, "connection_port": taken.getsockname()[1]}
        monkeypatch.setattr(demo_module, "PORTS", ports | {"tcp_proxy_port": 0, "metadata_port": 0})
        with gevent.Timeout(DEADLINE), open_demo(None, LogUi("x")) as opened:
            assert opened.url == f"http://demo.localhost:{free}"
            assert opened.server.connection_port not in (0, ports["connection_port"])


def test_everything_is_closed_when_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = []
    start_server = demo_module.start_server

    def remember() -> object:
        servers.append(start_server())
        return servers[-1]

    monkeypatch.setattr(demo_module, "start_server", remember)
    monkeypatch.setattr(demo_module, "serve_page", lambda sock: sock.close())
    with (
        gevent.Timeout(DEADLINE),
        pytest.raises(demo_module.TunnelError, match="as 502"),
        open_demo(None, LogUi("x")),
    ):
        raise AssertionError("opened")
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", servers[0].proxy_port)) != 0


def test_the_page_answers_as_http_wants_it() -> None:
    def ask(head: bytes, rest: bytes = b"") -> tuple[bytes, bytes]:
        answer, _, body = _answer((head, rest)).partition(b"\r\n\r\n")
        return answer, body

    answer, body = ask(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in answer
    assert b"Connection" not in answer
    head_answer, head_body = ask(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert head_answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert head_body == b""
    assert b"Connection: close" in ask(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n")[0]
    assert b"Connection: close" in ask(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")[0]
    assert b"Connection: close" in ask(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")[0]
    assert ask(b"GET /x?y HTTP/1.1\r\n\r\n")[0].startswith(b"HTTP/1.1 404 ")
    assert ask(b"GET /?y HTTP/1.1\r\n\r\n")[0].startswith(b"HTTP/1.1 200 ")
    assert "<script" not in page("GET", "/<script>", {"user-agent": "<script>"})
