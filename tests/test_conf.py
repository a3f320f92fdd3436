"""The examples in conf/, each with the real program: supervisord, nginx, HAProxy, gunicorn, the shell."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import trustme
from free_ports import free_ports
from local_service import LocalService
from server_process import COMMAND, DEADLINE, ROOT, SERVES, ServerProcess, environment, is_gone, wait_for
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.server.addresses import is_local
from tinytun_gevent.server.config import ServerConfig, variables

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the examples are for POSIX")

CONF = ROOT / "conf"
HOST = "app.tunnel.example.com"
VISITOR = "127.0.0.2" if is_local("127.0.0.2") else "127.0.0.1"
"""The address that visitors come from: not the proxy's, where the machine has another one."""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def example(name: str) -> str:
    return (CONF / name).read_text()


def replaced(text: str, *changes: tuple[str, str]) -> str:
    """``text`` with every change made; one that changes nothing is a mistake in the test."""
    for old, new in changes:
        assert old in text, f"{old!r} is no longer in the example"
        text = text.replace(old, new)
    return text


def settings_in(text: str) -> dict[str, str]:
    """The lines ``NAME=value`` of an environment file."""
    return dict(re.findall(r"(?m)^([A-Z_]+)=(.*)$", text))


# -- the environment file -----------------------------------------------------


def test_the_environment_file_is_valid_and_knows_only_real_variables(tmp_path: Path) -> None:
    text = example("tinytun-server.env")
    mentioned = set(re.findall(r"(?m)^#?([A-Z_]+)=", text))
    assert mentioned <= {variable.name for variable in variables()}
    assert len(mentioned) >= 12
    script = f'set -a; . {CONF / "tinytun-server.env"}; exec "$@"'
    flags = [f"--{kind}-port=0" for kind in ("connection", "proxy", "tcp-proxy", "metadata")]
    done = subprocess.run(
        ["/bin/sh", "-c", script, "sh", *COMMAND, "--check", *flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("BASE_DOMAIN", "PUBLIC_URL", "TRUSTED_PROXIES", "TCP_PORTS", "TCP_LISTEN"):
        assert f"{name}={settings_in(text)[name]}\n" in done.stdout


def test_the_configuration_file_is_valid() -> None:
    config = ServerConfig.from_environ({}, {"--config": str(CONF / "tinytun-server.toml")})
    assert (config.proxy_port, config.base_domains) == (80, ("tunnel.example.com",))
    assert config.tls_required


def test_the_drain_fits_into_the_time_that_supervisord_gives() -> None:
    drain = float(settings_in(example("tinytun-server.env"))["DRAIN_TIMEOUT"])
    wait = re.search(r"(?m)^stopwaitsecs = (\d+)$", example("supervisord.conf"))
    assert wait is not None
    assert float(wait[1]) >= drain + 5


# -- gunicorn -----------------------------------------------------------------


def test_the_plain_gunicorn_command_runs_the_server() -> None:
    command = (sys.executable, "-m", "gunicorn", "--config", str(CONF / "gunicorn.conf.py"))
    environ = environment(PYTHONPATH=str(ROOT), METADATA_BIND="127.0.0.1")
    with ServerProcess(command=command, environ=environ) as server, LocalService() as service:
        server.wait_serving()
        with Tunnel(service.port, server=server.url, subdomain="app"):
            assert [tunnel["name"] for tunnel in server.tunnels()] == [{"Subdomain": "app"}]
            server.process.send_signal(signal.SIGHUP)
            server.wait_line("stopped")  # the old worker
            wait_for(lambda: len(server.tunnels()) == 1, "tunnel after the reload")
        server.process.terminate()
        assert server.wait() == 0


# -- supervisord --------------------------------------------------------------


class Supervised:
    """supervisord on the example, with paths and ports of this test and nothing else changed."""

    def __init__(self, folder: Path, files: int = 0) -> None:
        """``files``: the hard limit of open files, if not that of this process."""
        self.connection_port, self.proxy_port, tcp, self.metadata_port = free_ports(4)
        self._log = folder / "server.log"
        environ = folder / "tinytun-server.env"
        environ.write_text(
            replaced(
                example("tinytun-server.env"),
                ("CONNECTION_PORT=5564", f"CONNECTION_PORT={self.connection_port}"),
                ("\nPROXY_PORT=5555", f"\nPROXY_PORT={self.proxy_port}"),
                ("TCP_PROXY_PORT=5556", f"TCP_PROXY_PORT={tcp}"),
                ("METADATA_PORT=5553", f"METADATA_PORT={self.metadata_port}"),
                ("STATE_DIR=/var/lib/tinytun-server", f"STATE_DIR={folder / 'state'}"),
            )
        )
        config = configparser.RawConfigParser(inline_comment_prefixes=())
        config.read_string(example("supervisord.conf"))
        program = config["program:tinytun-server"]
        program["command"] = replaced(
            program["command"],
            ("/etc/tinytun/tinytun-server.env", str(environ)),
            ("/opt/tinytun/bin/tinytun-server", " ".join(COMMAND)),
        )
        program["stdout_logfile"] = str(self._log)
        for section in ("supervisord", "program:tinytun-server"):
            config.remove_option(section, "user")
        config["supervisord"].update(logfile=str(folder / "supervisord.log"), pidfile=str(folder / "pid"))
        config["unix_http_server"]["file"] = str(folder / "sock")
        config["supervisorctl"]["serverurl"] = f"unix://{folder / 'sock'}"
        self.file = folder / "supervisord.conf"
        with self.file.open("w") as file:
            config.write(file)

        def allow() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self.file)],
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            preexec_fn=allow if files else None,
        )

    def wait_serving(self, count: int) -> None:
        """Waits until a worker has come to serve for the ``count``-th time."""

        def serving() -> bool:
            return self._log.exists() and len(SERVES.findall(self._log.read_text())) >= count

        wait_for(serving, f"worker number {count}")

    def master(self) -> int:
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def worker(self) -> int:
        (child,) = psutil.Process(self.master()).children()
        return child.pid

    def answers(self) -> bool:
        """Whether the metadata API lists no tunnels, over a connection that was not refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.metadata_port, timeout=DEADLINE)
        connection.request("GET", "/tunnels")
        body = connection.getresponse().read()
        connection.close()
        return json.loads(body) == []


@pytest.fixture
def supervised(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Supervised]:
    supervised = Supervised(tmp_path, getattr(request, "param", 0))
    try:
        supervised.wait_serving(1)
        yield supervised
    finally:
        family = [supervised.process, *psutil.Process(supervised.process.pid).children(recursive=True)]
        supervised.process.terminate()
        try:
            supervised.process.wait(DEADLINE)
        finally:
            for process in family:
                if not is_gone(process.pid):
                    process.kill()


def test_supervisord_brings_back_a_killed_worker_and_a_killed_master(supervised: Supervised) -> None:
    assert supervised.answers()
    master, worker = supervised.master(), supervised.worker()

    os.kill(worker, signal.SIGKILL)
    supervised.wait_serving(2)
    assert supervised.answers()
    assert supervised.master() == master

    worker = supervised.worker()
    os.kill(master, signal.SIGKILL)
    supervised.wait_serving(3)
    assert supervised.answers()
    assert supervised.master() != master
    assert is_gone(worker)


@pytest.mark.parametrize("supervised", [512], indirect=True)
def test_supervisord_starts_where_few_files_may_be_open(supervised: Supervised) -> None:
    assert supervised.answers()
    assert psutil.Process(supervised.worker()).rlimit(psutil.RLIMIT_NOFILE) == (512, 512)


def test_supervisord_stops_all_of_it(supervised: Supervised) -> None:
    master, worker = supervised.master(), supervised.worker()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "supervisor.supervisorctl",
            "-c",
            str(supervised.file),
            "stop",
            "tinytun-server",
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert "tinytun-server: stopped" in done.stdout
    assert is_gone(master)
    assert is_gone(worker)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", supervised.proxy_port), timeout=DEADLINE)


# -- reverse proxies ----------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def trust(authority: trustme.CA) -> ssl.SSLContext:
    """What a visitor's browser trusts."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def server() -> Iterator[TunnelServer]:
    """A server as the environment file has it, on other ports."""
    values = settings_in(example("tinytun-server.env"))
    (tcp,) = free_ports(1)
    with TunnelServer(
        bind=values["BIND"],
        base_domains=values["BASE_DOMAIN"],
        public_url=values["PUBLIC_URL"],
        trusted_proxies=values["TRUSTED_PROXIES"],
        tcp_listen=values["TCP_LISTEN"],
        tcp_ports=f"{tcp}-{tcp}",
        connection_port=0,
        proxy_port=0,
        tcp_proxy_port=0,
        metadata_port=0,
    ) as server:
        yield server


@pytest.fixture
def service() -> Iterator[LocalService]:
    with LocalService() as service:
        yield service


@contextmanager
def running(*command: str, port: int) -> Iterator[None]:
    """A proxy that listens on ``port`` inside the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def listening() -> bool:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(listening, f"{command[0]} on port {port}")
        yield
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE)


def check(*command: str) -> None:
    """The program's own test of its configuration."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "warn" not in (done.stderr + done.stdout).lower().replace('"user" directive', "")


def visitor_socket(port: int, trust: ssl.SSLContext) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", port), DEADLINE, source_address=(VISITOR, 0))
    return trust.wrap_socket(plain, server_hostname=HOST)


def visit(port: int, trust: ssl.SSLContext) -> dict[str, str]:
    """What the local service was told about a visitor who lies about himself."""
    connection = http.client.HTTPConnection(HOST)
    connection.sock = visitor_socket(port, trust)
    lies = {
        "X-Forwarded-For": "203.0.113.66",
        "X-Forwarded-Host": "evil.example",
        "Forwarded": "for=203.0.113.66",
    }
    for _ in range(2):  # over one connection
        connection.request("GET", "/", headers=lies)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200
    connection.close()
    return dict(json.loads(body))


def told(fields: dict[str, str]) -> dict[str, str]:
    return {name.removeprefix("x-forwarded-"): value for name, value in fields.items() if "forwarded" in name}


def assert_websockets_pass(port: int, trust: ssl.SSLContext, server: TunnelServer) -> None:
    def echo(websocket: ServerConnection) -> None:
        for message in websocket:
            websocket.send(message)

    with serve(echo, "127.0.0.1", 0) as sockets:
        threading.Thread(target=sockets.serve_forever, daemon=True).start()
        target = sockets.socket.getsockname()[1]
        with (
            Tunnel(target, server=server.url, subdomain="app"),
            connect(f"ws://{HOST}", sock=visitor_socket(port, trust), open_timeout=DEADLINE) as websocket,
        ):
            websocket.send("hello")
            assert websocket.recv(timeout=DEADLINE) == "hello"
        sockets.shutdown()


@needs("nginx")
def test_nginx_in_front(
    tmp_path: Path,
    authority: trustme.CA,
    trust: ssl.SSLContext,
    server: TunnelServer,
    service: LocalService,
) -> None:
    https, plain = free_ports(2)
    certificate = authority.issue_cert("*.tunnel.example.com")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    site = replaced(
        example("nginx.conf"),
        ("listen 443 ssl", f"listen 127.0.0.1:{https} ssl"),
        ("listen 80", f"listen 127.0.0.1:{plain}"),
        ("    listen [::]:443 ssl;\n", ""),
        ("    listen [::]:80;\n", ""),
        ("/etc/tinytun/fullchain.pem", str(tmp_path / "both.pem")),
        ("/etc/tinytun/privkey.pem", str(tmp_path / "both.pem")),
        ("server 127.0.0.1:5555", f"server 127.0.0.1:{server.proxy_port}"),
    )
    (tmp_path / "tinytun.conf").write_text(site)
    folders = "".join(
        f"{kind}_temp_path {tmp_path / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {tmp_path / 'pid'}; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {folders} include {tmp_path / 'tinytun.conf'}; }}\n"
    )
    command = ("nginx", "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf"))
    check(*command, "-t")
    with running(*command, port=https):
        with Tunnel(service.port, server=server.url, subdomain="app") as tunnel:
            assert tunnel.url == f"https://{HOST}"
            assert told(visit(https, trust)) == {
                "for": VISITOR,
                "proto": "https",
                "host": HOST,
                "port": str(https),
            }
        assert_websockets_pass(https, trust, server)


@needs("haproxy")
def test_haproxy_in_front(
    tmp_path: Path,
    authority: trustme.CA,
    trust: ssl.SSLContext,
    server: TunnelServer,
    service: LocalService,
) -> None:
    https, plain, clients = free_ports(3)
    tcp = server.config.tcp_ports[0]
    pem = tmp_path / "tinytun.pem"
    authority.issue_cert("*.tunnel.example.com", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        pem
    )
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    config = replaced(
        example("haproxy.cfg"),
        ("/etc/tinytun/tinytun.pem", str(pem)),
        ("bind :::80 v4v6", f"bind 127.0.0.1:{plain}"),
        ("bind :::443 v4v6", f"bind 127.0.0.1:{https}"),
        ("bind :::5554 v4v6", f"bind 127.0.0.1:{clients}"),
        ("bind :::20000-20099 v4v6", f"bind 127.0.0.1:{tcp}"),
        ("127.0.0.1:5555", f"127.0.0.1:{server.proxy_port}"),
        ("127.0.0.1:5564", f"127.0.0.1:{server.connection_port}"),
        ("127.0.0.1:5556", f"127.0.0.1:{server.tcp_proxy_port}"),
        ("maxconn 50000", "maxconn 100"),  # as many files as a test machine allows
        ("timeout http-request 10s", "timeout http-request 60s"),  # a busy one takes long to begin
    )
    file = tmp_path / "haproxy.cfg"
    file.write_text(config)
    check("haproxy", "-c", "-f", str(file))
    through_proxy = f"https://127.0.0.1:{clients}"
    with running("haproxy", "-db", "-f", str(file), port=https):
        with Tunnel(service.port, server=through_proxy, ca=tmp_path / "ca.pem", subdomain="app", proxy=""):
            assert told(visit(https, trust)) == {
                "for": VISITOR,
                "proto": "https",
                "host": HOST,
                "port": str(https),
            }
        assert_websockets_pass(https, trust, server)
        with visitor_socket(clients, trust) as client:
            client.sendall(b"CONNECT server HTTP/1.1\r\nx-tinytun-type: http\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 101"
            (opened,) = server.registry.tunnels.values()
            assert opened.remote == f"{VISITOR}:{client.getsockname()[1]}"
        with (
            Tunnel(service.port, kind="tcp", server=server.url),
            socket.create_connection(("127.0.0.1", tcp), timeout=DEADLINE) as visitor,
        ):
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert visitor.recv(100).startswith(b"HTTP/1.1 200 ")
