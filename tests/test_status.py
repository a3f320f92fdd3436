"""``tinytun-server status``: a table on a terminal, lines in a pipe, JSON; one clear line when it fails."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from certificates import self_signed
from conftest import OpenTunnel, StartService
from server_process import COMMAND, DEADLINE, environment
from support import eventually, get

from tinytun_gevent import TunnelServer, __version__
from tinytun_gevent.errors import UnreachableError
from tinytun_gevent.server import status
from tinytun_gevent.server.account import Account


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "status", *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.fixture
def busy(server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel) -> TunnelServer:
    """A server with a tunnel that has been visited."""
    open_tunnel(start_service())
    (tunnel,) = server.registry.listed()
    tunnel.account = Account(label="alice")
    for name in ("demo", "nobody"):
        get(server.proxy_port, name)
    eventually(lambda: sum(server.core.tally.statuses) == 2)
    return server


def test_in_a_pipe_it_is_plain_lines(busy: TunnelServer) -> None:
    done = run("--metadata-port", str(busy.metadata_port))
    assert (done.returncode, done.stderr) == (0, "")
    about, table = done.stdout.rstrip().split("\n\n")
    said = dict(line.split(":", 1) for line in about.splitlines())
    assert said["server"].strip().startswith(f"tinytun-server {__version__}, up ")
    assert said["state"].strip() == "serving"
    assert said["exchanges"].strip() == "1 2xx, 1 4xx"
    assert said["refusals"].strip() == "none"
    assert said["loop lag"].strip().endswith("at worst")
    head, row = (line.split() for line in table.splitlines())
    assert head == list(status.COLUMNS)
    assert row[:3] == [busy.url_of("demo"), "http", "0"]
    assert row[-1] == "alice"
    assert row[-2].startswith("127.0.0.1:")
    assert done.stdout.isascii()


def test_on_a_terminal_it_is_a_table(busy: TunnelServer) -> None:
    master, slave = pty.openpty()
    command = [*COMMAND, "status", "--url", busy.metadata_url]
    environ = environment(COLUMNS="160", TERM="xterm")
    with subprocess.Popen(command, env=environ, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        shown = b""
        try:
            while piece := os.read(master, 65536):
                shown += piece
        except OSError:
            pass  # how a pseudo-terminal ends
        os.close(master)
        assert process.wait(DEADLINE) == 0
    assert b"\x1b[1m" in shown
    assert busy.url_of("demo").encode() in shown
    assert b"alice" in shown


def test_as_json_it_is_what_the_server_says(busy: TunnelServer) -> None:
    done = run("--json", METADATA_PORT=str(busy.metadata_port))
    said = json.loads(done.stdout)
    assert said["version"] == __version__
    assert [tunnel["label"] for tunnel in said["tunnels"]] == ["alice"]
    assert said["bytes"]["in"] > 0


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("http://127.0.0.1:1", 5, "no server answers at http://127.0.0.1:1: Connection refused"),
        ("127.0.0.1:5553", 2, "allowed: http://HOST[:PORT]"),
        ("http://127.0.0.1:port", 2, "is no port"),
        ("http://nobody.invalid", 5, "no server answers at http://nobody.invalid"),
    ],
)
def test_a_server_that_cannot_be_asked_is_one_line(url: str, code: int, says: str) -> None:
    done = run("--url", url)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert done.stderr.startswith("tinytun-server: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def impostor() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    """A web server that answers what the test puts into the list."""
    answers: list[tuple[int, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, body = answers[0]
            self.send_response(code, "\x1b[31mno")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def test_a_common_name_is_no_name_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tmp_path / "pair.pem"
    pair.write_bytes(self_signed("localhost", alternative=False))
    monkeypatch.setenv("SSL_CERT_FILE", str(pair))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://localhost:{listener.getsockname()[1]}"
        thread = Thread(target=_shake_one, args=(listener, context))
        thread.start()
        with pytest.raises(UnreachableError, match=r"[Hh]ostname mismatch"):
            status.fetch(url)
        thread.join(DEADLINE)


def _shake_one(listener: socket.socket, context: ssl.SSLContext) -> None:
    sock, _ = listener.accept()
    with sock, contextlib.suppress(OSError):
        context.wrap_socket(sock, server_side=True).close()


@pytest.mark.parametrize(
    ("code", "body", "says"),
    [
        (404, b"", "answers 404 \\x1b[31mno"),
        (200, b"hello", "is no tinytun-server"),
        (200, b"[]", "is no tinytun-server"),
        (200, b'{"tunnels": 1}', "is another version"),
    ],
)
def test_what_answers_something_else_is_one_line(
    impostor: tuple[str, list[tuple[int, bytes]]], code: int, body: bytes, says: str
) -> None:
    url, answers = impostor
    answers.append((code, body))
    done = run("--url", url)
    assert done.returncode == 5
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_a_server_says_cannot_move_the_cursor() -> None:
    foreign = "\x1b[2J\n"
    tunnel: dict[str, Any] = {
        "name": {"Subdomain": foreign},
        "kind": foreign,
        "url": None,
        "visitors": foreign,
        "read_bytes": 1,
        "written_bytes": 2,
        "since": "2026-01-01T00:00:00Z",
        "remote": foreign,
        "label": foreign,
    }
    cells = status.row(tunnel, status.datetime.now(status.UTC))
    assert all(cell.isprintable() for cell in cells)


def test_whoever_stops_reading_is_no_error(busy: TunnelServer) -> None:
    command = " ".join([*COMMAND, "status", "--url", busy.metadata_url, "| :"])
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_it_needs_neither_gevent_nor_gunicorn() -> None:
    program = "import sys, tinytun_gevent.server.status as s\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"gevent", "gunicorn", "rich", "prometheus_client"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (12_000_000, "12 MB"), (3e15, "3000 TB")],
)
def test_bytes_are_for_people(count: float, text: str) -> None:
    assert status.amount(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 d")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert status.span(seconds) == text
