"""Both commands as a user meets them: real processes against a real server."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import re
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from free_ports import free_ports
from support import DEADLINE, eventually

from tinytun_gevent import TunnelServer, __version__, cli
from tinytun_gevent.cli import CLIENT, SERVER, parse, server_overrides
from tinytun_gevent.server.config import ServerConfig, variables

ROOT = Path(__file__).resolve().parent.parent
TINYTUN = str(ROOT / "bin" / "tinytun")
TINYTUN_SERVER = str(ROOT / "bin" / "tinytun-server")
LOCAL = {
    "bind": "127.0.0.1",
    "connection_port": 0,
    "proxy_port": 0,
    "tcp_proxy_port": 0,
    "metadata_port": 0,
    "base_domains": "localhost",
}
CLEAN_ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if not name.lower().endswith("_proxy") and name not in ("TINYTUN_SERVER_URL", "TERM", "COLUMNS")
}


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=CLEAN_ENVIRONMENT | environment,
        check=False,
    )


class Client:
    """A running ``tinytun``; stopped and reaped when its ``with`` block ends."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, TINYTUN, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=CLEAN_ENVIRONMENT | environment,
        )
        self.errors: list[str] = []
        self._told = threading.Condition()
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._told:
                self.errors.append(line)
                self._told.notify_all()

    def wait_for(self, pattern: str, count: int = 1) -> str:
        """Block until ``count`` lines of standard error match; returns all of it."""
        with self._told:
            found = self._told.wait_for(
                lambda: sum(bool(re.search(pattern, line)) for line in self.errors) >= count, DEADLINE
            )
        assert found, f"no {pattern!r} in: {''.join(self.errors)}"
        return "".join(self.errors)

    @property
    def url(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.endswith("\n"), "".join(self.errors)
        return line[:-1]

    def stop(self, *signals: int) -> int:
        """Send the signals and reap; returns the exit code."""
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()


class Page(http.server.BaseHTTPRequestHandler):
    """Answers with what it was asked; ``/slow`` waits for the test."""

    protocol_version = "HTTP/1.1"
    started = threading.Event()
    go_on = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/slow":
            Page.started.set()
            Page.go_on.wait(DEADLINE)
        body = f"{self.path} for {self.headers['Host']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


@contextlib.contextmanager
def threaded(service: socketserver.BaseServer) -> Iterator[int]:
    """Runs a stdlib server in threads; yields its port."""
    thread = threading.Thread(target=service.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield service.server_address[1]
    finally:
        service.shutdown()
        service.server_close()
        thread.join(DEADLINE)


@pytest.fixture(scope="module")
def server() -> Iterator[TunnelServer]:
    with TunnelServer(**LOCAL) as running:
        yield running


@pytest.fixture(scope="module")
def page() -> Iterator[int]:
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    service.daemon_threads = True
    service.handle_error = lambda *_: None  # type: ignore[method-assign]  # visitors may leave
    with threaded(service) as port:
        yield port


def fetch(server: TunnelServer, name: str, path: str = "/") -> tuple[int, str]:
    """What a visitor of the tunnel gets: the status and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
    try:
        connection.request("GET", path, headers={"Host": f"{name}.localhost:{server.proxy_port}"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


# -- version and help -----------------------------------------------------------


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str) -> None:
    for program in (TINYTUN, TINYTUN_SERVER):
        done = run(program, flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{Path(program).name} {__version__}\n"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_the_specification(flag: str) -> None:
    assert run(TINYTUN, flag).stdout == CLIENT
    assert run(TINYTUN_SERVER, flag).stdout == SERVER


def test_each_command_has_a_help_of_its_own() -> None:
    asked = [run(TINYTUN, *words.split()).stdout for words in ("tcp -h", "tcp 22 --help", "help tcp")]
    assert asked[0] == asked[1] == asked[2]
    assert "tinytun tcp <target>" in asked[0]
    assert "--port" in asked[0]
    assert "--subdomain" not in asked[0]
    assert run(TINYTUN, "help").stdout == CLIENT
    wrong = run(TINYTUN_SERVER, "help", "frobnicate")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("tinytun-server: 'frobnicate' is no command")


def test_version_loads_nothing() -> None:
    code = """
import sys
from tinytun_gevent import cli
sys.argv = ["tinytun", "-V"]
try:
    cli.client()
finally:
    print([name for name in ("gevent", "docopt", "logging", "ssl") if name in sys.modules])
"""
    assert run("-c", code).stdout.splitlines()[1:] == ["[]"]


def test_the_servers_master_loads_no_gevent() -> None:
    code = """
import sys
from tinytun_gevent import cli
sys.argv = ["tinytun-server", "--check", "--bind", "127.0.0.1"]
sys.argv += "--connection-port 0 --proxy-port 0 --tcp-proxy-port 0 --metadata-port 0".split()
try:
    cli.server()
finally:
    print("gevent:", "gevent" in sys.modules)
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "gevent: False"


def test_help_and_version_survive_a_closed_pipe() -> None:
    command = f"{sys.executable} {TINYTUN} --help | :; {sys.executable} {TINYTUN_SERVER} --help | :"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""


# -- usage ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says", "line"),
    [
        ("", "say what to do, for example: tinytun http 3000", "tinytun --help"),
        ("htp 3000", "'htp' is no command; did you mean http?", "tinytun --help"),
        ("http", "the target is missing, for example: tinytun http 3000", "tinytun http --help"),
        ("http 3000 -p 30000", "--port does not go with http; it is for tcp, doctor", "tinytun http --help"),
    ],
)
def test_wrong_usage_is_one_clear_line_and_the_usage_that_fits(
    arguments: str, says: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("tinytun", CLIENT, arguments.split())
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[0] == f"tinytun: {says}"
    assert output.err.splitlines()[-1] == f"'{line}' tells more"
    assert len(output.err.splitlines()) <= 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("extra", "'extra' is no command: commands are status, doctor, token, reload, help"),
        ("status extra", "status takes options only"),
        ("--json", "--json does not go with tinytun-server; it is for status, doctor"),
        ("--frob 1", "'--frob' is not an option"),
        ("--proxy-port", "--proxy-port needs a value"),
    ],
)
def test_wrong_usage_of_the_server(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("tinytun-server", SERVER, arguments.split())
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"tinytun-server: {says}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("http 3000", {"http": True, "<target>": "3000", "--concurrency": "100", "--subdomain": None}),
        ("http 3000", {"--sessions": "4"}),
        ("tcp 3000 --sessions 1", {"--sessions": "1"}),
        ("http 3000 -s app -c 5", {"--subdomain": "app", "--concurrency": "5"}),
        ("-s app http 3000", {"--subdomain": "app"}),
        (
            "http --subdomain=app 3000 --host-header rewrite",
            {"--subdomain": "app", "--host-header": "rewrite"},
        ),
        ("tcp 8080 --port 30000", {"tcp": True, "--port": "30000"}),
        ("tcp 8080 -p30000", {"--port": "30000"}),
        (
            "http 3000 --server x --ca f --insecure --proxy p --connect-timeout 5",
            {"--server": "x", "--insecure": True},
        ),
        ("http 3000 --wait", {"--wait": True}),
        ("http 3000", {"--wait": False}),
        (
            "http 3000 -q --log-level debug --debug",
            {"--quiet": True, "--log-level": "debug", "--debug": True},
        ),
        ("http 3000", {"--verify-target": "auto", "--log-level": "info", "--server": None}),
        ("demo", {"demo": True, "--target": None}),
        ("demo --target 3000", {"--target": "3000"}),
    ],
)
def test_what_is_read(arguments: str, expected: dict[str, object]) -> None:
    read = parse("tinytun", CLIENT, arguments.split())
    assert {name: read[name] for name in expected} == expected


def test_the_servers_options_are_its_variables() -> None:
    text = " ".join(SERVER.split())
    read = parse("tinytun-server", SERVER, [])
    own = {"status", "--url", "--json", "--check", "--strict", "--debug", "--help", "--version"}
    own |= {"--config", "reload"}
    own |= {"token", "new", "list", "revoke", "<token>", "--label", "--names", "--ports", "--expires"}
    own |= {"--reserve", "--reserve-ports", "help", "<command>", "doctor"}
    assert set(read) - own == {variable.flag for variable in variables()}
    for variable in variables():
        default = f"(default: {variable.default})" if variable.default else "(none by default)"
        assert f"{variable.help} {default}" in text
    assert ServerConfig.from_environ({}, server_overrides(read)) == ServerConfig()


def test_only_given_options_of_the_server_win() -> None:
    read = parse("tinytun-server", SERVER, ["--proxy-port", "1234", "--base-domain", "a.example", "--debug"])
    overrides = server_overrides(read)
    assert overrides == {"--proxy-port": "1234", "--base-domain": "a.example"}
    config = ServerConfig.from_environ({"PROXY_PORT": "1", "BIND": "127.0.0.1"}, overrides)
    assert (config.proxy_port, config.bind, config.base_domains) == (1234, "127.0.0.1", ("a.example",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("http nonsense", "target 'nonsense'"),
        ("http 3000 -s -x-", "--subdomain"),
        ("tcp 3000 -p 65536", "--port '65536': allowed: 1-65535"),
        ("http 3000 --server ftp://x", "--server 'ftp://x'"),
        ("http 3000 --log-level loud", "--log-level 'loud'"),
        ("demo --target nonsense", "target 'nonsense'"),
    ],
)
def test_values_that_make_no_sense_are_exit_code_2(arguments: str, says: str) -> None:
    done = run(TINYTUN, *arguments.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("tinytun: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_variable_of_the_server_that_makes_no_sense() -> None:
    done = run(TINYTUN_SERVER, PROXY_PORT="many")
    assert done.returncode == 2
    assert done.stderr.startswith("tinytun-server: PROXY_PORT=many")
    assert len(done.stderr.splitlines()) == 1


# -- a tunnel -------------------------------------------------------------------


def test_an_http_tunnel(server: TunnelServer, page: int) -> None:
    with Client("http", str(page), "-s", "app", "--server", server.url) as client:
        assert client.url == f"http://app.localhost:{server.proxy_port}"
        assert fetch(server, "app", "/x") == (200, f"/x for app.localhost:{server.proxy_port}")
        client.wait_for("connected")
        assert client.stop() == 0
        assert client.process.stdout is not None
        assert client.process.stdout.read() == ""
    assert fetch(server, "app")[0] == 404


def test_a_tcp_tunnel(server: TunnelServer) -> None:
    service = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo)
    service.daemon_threads = True
    with threaded(service) as port, Client("tcp", str(port), "--server", server.url) as client:
        url = client.url
        assert url.startswith("tcp://127.0.0.1:")
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), DEADLINE) as visitor:
            visitor.sendall(b"hello")
            assert visitor.recv(5) == b"hello"
        assert client.stop(signal.SIGINT) == 0


def test_the_variable_names_the_server_and_the_flag_wins(server: TunnelServer, page: int) -> None:
    with Client("http", str(page), TINYTUN_SERVER_URL=server.url) as client:
        assert client.url.endswith(f".localhost:{server.proxy_port}")
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with Client("http", str(page), "--server", server.url, TINYTUN_SERVER_URL=nowhere) as client:
        assert client.url.endswith(f".localhost:{server.proxy_port}")


def test_the_local_service_sees_the_host_it_wants(server: TunnelServer, page: int) -> None:
    options = ("--server", server.url, "-s", "hosted", "--host-header")
    with Client("http", str(page), *options, "rewrite") as client:
        assert client.url
        assert fetch(server, "hosted") == (200, f"/ for localhost:{page}")
        client.stop()
    with Client("http", str(page), *options, "app.test") as client:
        assert client.url
        assert fetch(server, "hosted") == (200, "/ for app.test")


def test_a_service_that_is_away_is_said_once(server: TunnelServer) -> None:
    port = free_ports(1)[0]
    with Client("http", str(port), "-s", "away", "--server", server.url) as client:
        assert client.url
        for _ in range(3):
            status, body = fetch(server, "away")
            assert status == 502
            assert f"localhost:{port}: connection refused" in body
        client.wait_for("the local service does not answer")
        client.stop()
    assert "".join(client.errors).count("does not answer") == 1


def test_quiet_says_nothing(server: TunnelServer, page: int) -> None:
    with Client("http", str(page), "-q", "--server", server.url) as client:
        assert client.url
        assert client.stop() == 0
    assert client.errors == []


def test_every_request_is_logged_if_asked_for(server: TunnelServer, page: int) -> None:
    options = ("-s", "logged", "--log-level", "debug", "--server", server.url)
    with Client("http", str(page), *options) as client:
        assert client.url
        fetch(server, "logged", "/%1b%5b31m?secret=1")
        lines = client.wait_for(r"DEBUG GET /%1b%5b31m 200 ")
        assert "secret" not in lines


@pytest.mark.skipif(os.name != "posix", reason="needs sh")
def test_the_first_line_can_be_taken_and_the_pipe_closed(server: TunnelServer, page: int) -> None:
    command = f"exec {sys.executable} {TINYTUN} http {page} -s piped --server {server.url}"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"http://piped.localhost:{server.proxy_port}\n".encode()
        process.stdout.close()
        process.stderr.close()
        assert fetch(server, "piped")[0] == 200
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_reconnecting_keeps_the_name_and_says_the_url_once(page: int) -> None:
    ports = LOCAL | {"connection_port": free_ports(1)[0], "proxy_port": free_ports(1)[0]}
    first = TunnelServer(**ports).start()
    with Client("http", str(page), "--server", first.url) as client:
        url = client.url
        name = re.fullmatch(r"http://([a-z0-9-]+)\.localhost:\d+", url)
        assert name is not None
        first.stop()
        client.wait_for("reconnecting")
        with TunnelServer(**ports) as second:
            client.wait_for("INFO connected", count=2)
            assert fetch(second, name[1])[0] == 200
            assert client.stop() == 0
        assert client.process.stdout is not None
        assert client.process.stdout.read() == ""


TINYPROXY = shutil.which("tinyproxy")


@pytest.mark.skipif(TINYPROXY is None, reason="tinyproxy is not installed")
def test_through_tinyproxy(server: TunnelServer, page: int, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    settings = tmp_path / "tinyproxy.conf"
    settings.write_text(
        f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.1\nBasicAuth me secret\nMaxClients 10\n"
    )
    log = tmp_path / "log"
    with log.open("wb") as output:
        proxy = subprocess.Popen([str(TINYPROXY), "-d", "-c", str(settings)], stdout=output, stderr=output)
    try:
        proxy_url = f"http://me:secret@127.0.0.1:{port}"
        options = ("http", str(page), "-s", "proxied", "--server", server.url)
        with Client(*options, HTTPS_PROXY=proxy_url) as client:
            assert client.url
            assert fetch(server, "proxied")[0] == 200
            assert f"CONNECT 127.0.0.1:{server.connection_port}" in log.read_text()
            assert client.stop() == 0
    finally:
        proxy.terminate()
        proxy.wait()


# -- exit codes -----------------------------------------------------------------


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that gives the same answer to every CONNECT; yields its URL."""

    class Answer(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    with threaded(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answer)) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.parametrize("status", [400, 401, 403])
def test_refused_is_3(status: int) -> None:
    with answering(f"HTTP/1.1 {status} No\r\nContent-Length: 7\r\n\r\nBanned\n".encode()) as url:
        done = run(TINYTUN, "http", "3000", "-s", "app", "--server", url)
    assert done.returncode == 3
    assert done.stdout == ""
    hint = {401: "; no token was given: 'tinytun login", 403: "; ask the operator"}.get(status, "")
    assert f"refuses subdomain 'app': Banned ({status}){hint}" in done.stderr.splitlines()[-1]


def test_a_taken_name_is_4(server: TunnelServer, page: int) -> None:
    with Client("http", str(page), "-s", "taken", "--server", server.url) as client:
        assert client.url
        done = run(TINYTUN, "http", str(page), "-s", "taken", "--server", server.url)
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert re.search(r"^tinytun: .*subdomain 'taken': .+ \(409\); ask for another one", last)


def test_a_taken_port_is_4(server: TunnelServer, page: int) -> None:
    with Client("tcp", str(page), "--server", server.url) as client:
        port = client.url.rpartition(":")[2]
        done = run(TINYTUN, "tcp", str(page), "-p", port, "--server", server.url)
    assert done.returncode == 4
    assert f"port {port}: " in done.stderr.splitlines()[-1]


def test_unreachable_is_5() -> None:
    done = run(
        TINYTUN, "http", "1", "--server", f"http://127.0.0.1:{free_ports(1)[0]}", "--connect-timeout", "0.5"
    )
    assert done.returncode == 5
    assert "connection refused" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("answer", "code"),
    [(b"HTTP/1.1 200 OK\r\n\r\n", 3), (b"HTTP/1.1 501 No\r\n\r\n", 3), (b"220 smtp\r\n\r\n", 5)],
)
def test_something_else_at_the_servers_port(answer: bytes, code: int) -> None:
    with answering(answer) as url:
        done = run(TINYTUN, "http", "3000", "--server", url)
    assert done.returncode == code
    assert "is no tunnel server" in done.stderr.splitlines()[-1]


def test_an_internal_error_is_1_and_debug_shows_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> int:
        raise RuntimeError("oops\nsecond line")

    assert cli._guarded("tinytun", broken, debug=False) == 1
    assert capsys.readouterr().err == "tinytun: internal error: RuntimeError: oops (--debug shows where)\n"
    assert cli._guarded("tinytun", broken, debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_running_exchange_finishes_after_the_first_signal(server: TunnelServer, page: int) -> None:
    Page.started.clear()
    Page.go_on.clear()
    with Client("http", str(page), "-s", "slow", "--server", server.url) as client:
        assert client.url
        answers: list[tuple[int, str]] = []
        visitor = threading.Thread(target=lambda: answers.append(fetch(server, "slow", "/slow")))
        visitor.start()
        assert Page.started.wait(DEADLINE)
        client.process.send_signal(signal.SIGTERM)
        client.wait_for("stopping")
        eventually(lambda: "slow" not in server.registry.tunnels)
        assert not answers, "the name is given up at once, not with the last exchange"
        assert fetch(server, "slow")[0] == 404
        Page.go_on.set()
        visitor.join(DEADLINE)
        assert [status for status, _ in answers] == [200]
        assert client.process.wait(DEADLINE) == 0


def test_a_terminal_that_goes_away_ends_it_unless_nohup_was_said(server: TunnelServer, page: int) -> None:
    arguments = ("http", str(page), "-s", "kept", "--server", server.url)

    def inheriting(what: signal.Handlers) -> Client:
        before = signal.signal(signal.SIGHUP, what)  # a child has what its parent has, as from nohup
        try:
            return Client(*arguments)
        finally:
            signal.signal(signal.SIGHUP, before)

    with inheriting(signal.SIG_DFL) as client:
        assert client.url
        assert client.stop(signal.SIGHUP) == 0
    with inheriting(signal.SIG_IGN) as client:
        assert client.url
        client.process.send_signal(signal.SIGHUP)
        assert fetch(server, "kept")[0] == 200
        assert "stopping" not in "".join(client.errors)
        assert client.stop() == 0


def test_a_second_signal_is_130_at_once(server: TunnelServer, page: int) -> None:
    Page.started.clear()
    Page.go_on.clear()
    with Client("http", str(page), "-s", "hasty", "--server", server.url) as client:
        assert client.url
        visitor = threading.Thread(target=fetch, args=(server, "hasty", "/slow"), daemon=True)
        visitor.start()
        assert Page.started.wait(DEADLINE)
        client.process.send_signal(signal.SIGINT)
        client.wait_for("stopping")
        client.process.send_signal(signal.SIGINT)
        assert client.process.wait(DEADLINE) == 130  # an end that waits for the visitor is 0
        Page.go_on.set()
        visitor.join(DEADLINE)


# -- on a terminal --------------------------------------------------------------


def test_on_a_terminal_there_is_a_status_block(server: TunnelServer, page: int) -> None:
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(
            sys.executable,
            [sys.executable, TINYTUN, "http", str(page), "-s", "shown", "--server", server.url],
            CLEAN_ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        )
    screen = b""

    def read_until(wanted: bytes) -> None:
        nonlocal screen
        deadline = time.monotonic() + DEADLINE
        while wanted not in screen:
            assert select.select([terminal], [], [], deadline - time.monotonic())[0], screen
            screen += os.read(terminal, 65536)

    try:
        read_until(b"connected for")
        screen = screen.replace(b"\r", b"")
        assert screen.startswith(f"http://shown.localhost:{server.proxy_port}\n".encode())
        assert fetch(server, "shown", "/seen")[0] == 200
        read_until(b"/seen")
        os.write(terminal, b"\x03")
        read_until(b"\x1b[?25h")  # the cursor is back
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


# -- tokens ------------------------------------------------------------------


def test_tokens_are_made_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    made = run(TINYTUN_SERVER, "token", "new", "--label", "alice", "--names", "a,b-*", AUTH_FILE=str(file))
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert re.fullmatch(r"tt_[A-Za-z0-9_-]{32}", token)
    assert "not shown again" in made.stderr
    assert token not in file.read_text() + made.stderr
    again = run(TINYTUN_SERVER, "token", "new", "--label=alice", "--auth-file", str(file))
    assert (again.returncode, again.stdout) == (2, "")
    assert "alice has a token already" in again.stderr
    listed = run(TINYTUN_SERVER, "token", "list", AUTH_FILE=str(file))
    assert re.search(r"(?m)^alice  [0-9a-f]{12}  a, b-\*  any    never$", listed.stdout)
    for code in (0, 2):
        revoked = run(TINYTUN_SERVER, "token", "revoke", "alice", AUTH_FILE=str(file))
        assert (revoked.returncode, revoked.stdout) == (code, "")
    assert "[[tokens]]" not in file.read_text()


def test_token_commands_need_no_gevent_and_no_gunicorn(tmp_path: Path) -> None:
    code = (
        "import sys; from tinytun_gevent import cli\n"
        f"sys.argv = ['tinytun-server', 'token', 'new', '--label', 'a', '--auth-file', '{tmp_path}/t.toml']\n"
        "try: cli.server()\n"
        "finally: print([m for m in ('gevent', 'gunicorn', 'h2') if m in sys.modules])"
    )
    assert run("-c", code).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("token", "say what to do: token new | token list | token revoke"),
        ("token new", "--label is missing"),
        ("--label x", "--label does not go with tinytun-server; it is for token new"),
    ],
)
def test_token_commands_that_fit_no_usage(
    arguments: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("tinytun-server", SERVER, arguments.split())
    assert capsys.readouterr().err.startswith(f"tinytun-server: {problem}\n")


def test_which_file_has_to_be_said() -> None:
    done = run(TINYTUN_SERVER, "token", "list")
    assert done.returncode == 2
    assert "say where the tokens are: AUTH_FILE=" in done.stderr


@pytest.mark.parametrize("content", [None, "[[tokens]]\nlabel = 'a'\nsha256 = 'x'\n"])
def test_no_server_starts_with_a_file_that_makes_no_sense(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "tokens.toml"
    if content is not None:
        file.write_text(content)
    ports = {name.upper(): "0" for name in LOCAL if name.endswith("_port")}
    for arguments in ([], ["--check"]):
        done = run(TINYTUN_SERVER, *arguments, AUTH_FILE=str(file), BIND="127.0.0.1", **ports)
        assert done.returncode == 2
        assert done.stderr.startswith(f"tinytun-server: AUTH_FILE={file}: ")
        assert ("no such file" if content is None else "tokens[0].sha256: not 64 hex") in done.stderr


def test_check_says_that_a_server_is_open(tmp_path: Path) -> None:
    ports = {name.upper(): "0" for name in LOCAL if name.endswith("_port")}
    done = run(TINYTUN_SERVER, "--check", **ports)
    assert "can open a tunnel. This changes it: AUTH_FILE=" in done.stdout
    assert "tokens" not in run(TINYTUN_SERVER, "--check", BIND="127.0.0.1", **ports).stdout
    (tmp_path / "tokens.toml").write_text("")
    done = run(TINYTUN_SERVER, "--check", AUTH_FILE=str(tmp_path / "tokens.toml"), **ports)
    assert "can open" not in done.stdout
    assert done.returncode == 0


def enter(home: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A login whose token comes from standard input."""
    return subprocess.run(
        [sys.executable, TINYTUN, "login", *arguments],
        input=text,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        env=CLEAN_ENVIRONMENT | {"XDG_CONFIG_HOME": str(home), "HOME": str(home)},
        check=False,
    )


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[TunnelServer]:
    """A server that takes the token tt_my-secret."""
    from tinytun_gevent.server.authfile import digest

    file = tmp_path / "accounts.toml"
    file.write_text(f'[[tokens]]\nlabel = "a"\nsha256 = "{digest("tt_my-secret")}"\n')
    with TunnelServer(**LOCAL, auth_file=str(file)) as server:  # type: ignore[arg-type]
        yield server


def test_login_and_logout(tmp_path: Path, guarded: TunnelServer, page: int) -> None:
    home = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    kept, address = tmp_path / "tinytun" / "tokens.json", guarded.url.removeprefix("http://")
    done = enter(tmp_path, "tt_wrong\n", "--server", guarded.url)
    assert done.returncode == 3
    assert "does not take this token" in done.stderr
    assert "tt_wrong" not in done.stderr
    for text in ("not a secret\n", "", "\udcff\n"):
        done = enter(tmp_path, text, "--server", guarded.url)
        assert done.returncode == 2
        assert "that is no token" in done.stderr
        assert "secret" not in done.stderr
    assert not kept.exists()
    done = enter(tmp_path, "tt_my-secret\nmore\n", "--server", guarded.url)
    assert (done.returncode, done.stdout) == (0, "")
    assert "secret" not in done.stderr
    assert f"'tinytun logout --server {address}' forgets it" in done.stderr
    assert "tt_my-secret" in kept.read_text()
    assert run(TINYTUN, "server", **home).stdout == guarded.url + "\n"
    with Client("http", str(page), **home) as client:
        assert client.url
    for text in ("There is no token for", "There was no token for"):
        done = run(TINYTUN, "logout", "--server", guarded.url, **home)
        assert (done.returncode, done.stdout) == (0, "")
        assert text in done.stderr
    assert run(TINYTUN, "server", **home).stdout == "https://tinytun.com:5554\n"
    assert run(TINYTUN, "logout", "--all", "--server", "x", **home).returncode == 2


@pytest.mark.parametrize(
    ("answer", "code", "said", "is_kept"),
    [
        (b"HTTP/1.1 405 No\r\n\r\n", 0, "does not say whether the token is valid", True),
        (b"HTTP/1.1 200 OK\r\n\r\n", 3, "takes no tokens", False),
        (b"HTTP/1.1 200 OK\r\n\r\n<html>", 3, "no tunnel server's connection port", False),
        (b"HTTP/1.1 503 No\r\n\r\nLater", 3, "Later (503); nothing was kept", False),
        (b"220 smtp\r\n\r\n", 5, "is no tunnel server", False),
        (b"", 5, "without an answer; nothing was kept", False),
    ],
)
def test_login_asks_the_server_first(
    tmp_path: Path, answer: bytes, code: int, said: str, is_kept: bool
) -> None:
    with answering(answer) as url:
        done = enter(tmp_path, "tt_my-secret\n", "--server", url)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert (tmp_path / "tinytun" / "tokens.json").exists() is is_kept
    assert (tmp_path / "tinytun" / "servers.json").exists() is is_kept


def test_login_to_a_server_that_is_away_keeps_nothing(tmp_path: Path) -> None:
    done = enter(tmp_path, "tt_my-secret\n", "--server", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert done.returncode == 5
    assert "connection refused; nothing was kept" in done.stderr
    assert not (tmp_path / "tinytun").exists()


def test_a_typed_token_is_warned_of_and_stays_where_it_is(tmp_path: Path) -> None:
    """Of all that both programs print, at every level, nothing has the token."""
    from tinytun_gevent.server.authfile import digest

    secret = "tt_typed-secret"
    file = tmp_path / "tokens.toml"
    file.write_text(f'[[tokens]]\nlabel = "a"\nsha256 = "{digest(secret)}"\nreserved = ["mine"]\n')
    with TunnelServer(**LOCAL, auth_file=str(file), reserved_names="www") as server:  # type: ignore[arg-type]
        url = ("--server", server.url, "--debug")
        with Client("http", "1", "-s", "mine", "--token", secret, *url) as client:
            client.wait_for("--token: others on this computer may see it")
            client.wait_for("connected")
        assert secret not in "".join(client.errors)
        for arguments in (
            ("http", "1", "-s", "www", "--token", secret, *url),
            ("http", "1", "--token", secret + "x", *url),
            ("http", "1", "--token", secret, "--server", "http://192.0.2.1:1", "--debug"),
            ("http", "1", secret),
            ("login", secret),
            ("login", secret.removeprefix("tt_")),
        ):
            done = run(TINYTUN, *arguments)
            assert done.returncode in (2, 3)
            assert secret.removeprefix("tt_") not in done.stdout + done.stderr, arguments
