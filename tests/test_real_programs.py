"""Programs that people use, through real tunnels: curl, wrk, git, nginx, HAProxy, Redis, ssh and scp."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import http.server
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OpenTunnel, StartServer, StartService
from free_ports import free_tunnel_ports
from helpers import MIB
from support import DEADLINE, Peer, Request, answering, connect, eventually, read_response, request, respond

from tinytun_gevent import Tunnel, TunnelServer

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
GIT_CORE = Path("/usr/lib/git-core")


def program(name: str) -> str:
    """Where a program is; the test is skipped if it is nowhere."""
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*argv: str, timeout: float = 30, check: bool = True, **options: Any) -> str:
    """The output of a program that must succeed in time."""
    options.setdefault("stderr", subprocess.STDOUT)
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= options.pop("env", {})
    done = subprocess.run(
        argv, stdout=subprocess.PIPE, timeout=timeout, text=True, env=environment, check=False, **options
    )
    assert not check or done.returncode == 0, f"{argv[0]} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@contextlib.contextmanager
def daemon(
    *argv: str, ready: Callable[[], object] | None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the end of the block, from the moment it is ``ready``."""
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
        )
        stack.callback(process.wait, DEADLINE)
        stack.callback(process.kill)
        assert process.stdout is not None
        output: list[bytes] = []
        threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True).start()

        def is_up() -> bool:
            assert process.poll() is None, f"{argv[0]} ended:\n{b''.join(output).decode(errors='replace')}"
            return ready is None or bool(ready())

        eventually(is_up, what=argv[0])
        yield process


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


def tcp_port(tunnel: Tunnel) -> int:
    return int(tunnel.url.rpartition(":")[2])


# -- a web server with files ---------------------------------------------------


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; PUT and POST answer with the sum of what came."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers["Content-Length"]))
        answer = hashlib.sha256(data).hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_POST = do_PUT

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Visitors leave as they like."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder, and the port of a web server that serves it."""
    root = tmp_path / "files"
    root.mkdir()
    (root / "index.html").write_bytes(b"<h1>hello</h1>")
    with Server(("127.0.0.1", 0), lambda *args: Files(*args, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield root, int(server.server_address[1])
        server.shutdown()


@pytest.fixture
def site(
    server: TunnelServer, folder: tuple[Path, int], open_tunnel: OpenTunnel
) -> tuple[Path, str, list[str]]:
    """The folder, its public URL, and what makes curl find it."""
    tunnel = open_tunnel(folder[1])
    host = tunnel.url.removeprefix("http://")
    return folder[0], tunnel.url, ["--resolve", f"{host}:127.0.0.1", "--max-time", "20"]


# -- curl and wrk -------------------------------------------------------------


def test_curl_gets_and_puts(site: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    root, url, options = site
    curl = [program("curl"), "-sS", "-f", *options]
    data = random.Random(1).randbytes(5 * MIB)
    (root / "data.bin").write_bytes(data)
    assert run(*curl, f"{url}/") == "<h1>hello</h1>"
    assert "HTTP/1.1 200" in run(*curl, "-I", f"{url}/data.bin")
    run(*curl, "-o", str(tmp_path / "got"), f"{url}/data.bin")
    assert (tmp_path / "got").read_bytes() == data
    run(*curl, "--compressed", "-0", "-o", str(tmp_path / "old"), f"{url}/data.bin")
    assert (tmp_path / "old").read_bytes() == data
    digest = hashlib.sha256(data).hexdigest()
    upload = ["--data-binary", f"@{root / 'data.bin'}", f"{url}/up"]
    assert run(*curl, "-H", "Expect: 100-continue", *upload) == digest
    assert run(*curl, "-T", "-", f"{url}/up", stdin=(root / "data.bin").open("rb")) == digest  # chunked


def test_curl_uses_one_connection_for_many_requests(site: tuple[Path, str, list[str]]) -> None:
    _, url, options = site
    urls = [f"{url}/?{number}" for number in range(20)]
    said = run(program("curl"), "-sS", "-f", *options, "-w", "%{num_connects} %{http_code}\n", *urls)
    counts = re.findall(r"(\d) (\d+)\n", said.replace("<h1>hello</h1>", ""))
    assert counts == [("1", "200")] + [("0", "200")] * 19


def test_curl_is_told_what_is_wrong(server: TunnelServer) -> None:
    url = f"http://nobody.localhost:{server.proxy_port}/"
    options = ["-sS", "--resolve", f"nobody.localhost:{server.proxy_port}:127.0.0.1", "--max-time", "20"]
    said = run(program("curl"), *options, "-w", "%{http_code}", "-H", "Accept: application/json", url)
    assert said.endswith("404")
    assert isinstance(json.loads(said[:-3]), dict)


def test_wrk_sees_no_error(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    wrk = program("wrk")
    open_tunnel(start_service(answering(lambda _: respond(b"x" * 1024))))
    url = f"http://127.0.0.1:{server.proxy_port}/"
    for connection in ("keep-alive", "close"):
        fields = ["-H", "Host: demo.localhost", "-H", f"Connection: {connection}"]
        for seconds in (1, 4, 10):  # longer on a machine that is busy with something else
            said = run(wrk, "-t1", "-c16", f"-d{seconds}s", *fields, url)
            assert "Non-2xx" not in said, said
            assert "Socket errors" not in said, said
            done = re.search(r"(\d+) requests in", said)
            if done is not None and int(done[1]) > 100:
                break
        else:
            pytest.fail(said)


# -- git ----------------------------------------------------------------------

GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.com",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.com",
}


def git(*arguments: str, cwd: Path) -> str:
    return run(program("git"), "-c", "safe.directory=*", *arguments, cwd=cwd, env=GIT)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A bare repository with one commit of 2 MiB."""
    work, bare = tmp_path / "work", tmp_path / "project.git"
    work.mkdir()
    git("init", "-q", "-b", "main", cwd=work)
    (work / "data.bin").write_bytes(random.Random(2).randbytes(2 * MIB))
    (work / "read.me").write_text("hello\n")
    git("add", ".", cwd=work)
    git("commit", "-q", "-m", "first", cwd=work)
    git("clone", "-q", "--bare", str(work), str(bare), cwd=tmp_path)
    git("update-server-info", cwd=bare)
    git("config", "http.receivepack", "true", cwd=bare)
    return bare


def check_clone(clone: Path) -> None:
    assert (clone / "data.bin").read_bytes() == random.Random(2).randbytes(2 * MIB)
    git("fsck", "--strict", cwd=clone)


class GitBackend(http.server.BaseHTTPRequestHandler):
    """Runs ``git http-backend`` as CGI (RFC 3875)."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        environment = os.environ | GIT
        environment |= {
            "GIT_PROJECT_ROOT": str(self.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "REMOTE_USER": "tester",
        }
        done = subprocess.run(
            [GIT_CORE / "git-http-backend"], input=body, stdout=subprocess.PIPE, env=environment, check=True
        )
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = [line.partition(b": ") for line in head.split(b"\r\n")]
        status = next((int(value[:3]) for name, _, value in fields if name.lower() == b"status"), 200)
        self.send_response(status)
        for name, _, value in fields:
            if name.lower() != b"status":
                self.send_header(name.decode(), value.decode())
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_git_clones_and_pushes_over_smart_http(
    server: TunnelServer, open_tunnel: OpenTunnel, repository: Path, tmp_path: Path
) -> None:
    if not (GIT_CORE / "git-http-backend").exists():
        pytest.skip("git http-backend is not installed")
    handler = type("Handler", (GitBackend,), {"root": repository.parent})
    with Server(("127.0.0.1", 0), handler) as backend:
        threading.Thread(target=backend.serve_forever, args=(0.05,), daemon=True).start()
        tunnel = open_tunnel(int(backend.server_address[1]))
        host = tunnel.url.removeprefix("http://")
        resolve = ["-c", f"http.curloptResolve={host}:127.0.0.1"]
        git(*resolve, "clone", "-q", f"{tunnel.url}/project.git", "smart", cwd=tmp_path)
        check_clone(tmp_path / "smart")
        (tmp_path / "smart" / "more.bin").write_bytes(random.Random(3).randbytes(3 * MIB))
        git("add", ".", cwd=tmp_path / "smart")
        git("commit", "-q", "-m", "second", cwd=tmp_path / "smart")
        git(*resolve, "push", "-q", "origin", "main", cwd=tmp_path / "smart")
        assert git("log", "-1", "--format=%s", "main", cwd=repository) == "second\n"
        backend.shutdown()


def test_git_clones_over_dumb_http(
    repository: Path, site: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    program("git")
    root, url, _ = site
    shutil.copytree(repository, root / "project.git")
    host = url.removeprefix("http://")
    resolve = ["-c", f"http.curloptResolve={host}:127.0.0.1"]
    git(*resolve, "clone", "-q", f"{url}/project.git", "dumb", cwd=tmp_path)
    check_clone(tmp_path / "dumb")


def test_git_clones_over_its_own_protocol(
    server: TunnelServer, open_tunnel: OpenTunnel, repository: Path, tmp_path: Path
) -> None:
    if not (GIT_CORE / "git-daemon").exists():
        pytest.skip("git daemon is not installed")
    (port,) = free_tunnel_ports(1)
    arguments = ["--reuseaddr", "--listen=127.0.0.1", f"--port={port}", "--export-all"]
    environment = os.environ | GIT
    environment |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    with daemon(
        str(GIT_CORE / "git-daemon"),
        *arguments,
        f"--base-path={repository.parent}",
        ready=lambda: listens(port),
        env=environment,
    ):
        tunnel = open_tunnel(port, kind="tcp")
        git("clone", "-q", f"git://127.0.0.1:{tcp_port(tunnel)}/project.git", "own", cwd=tmp_path)
        check_clone(tmp_path / "own")


# -- proxies in front ---------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    client_max_body_size 0;
    upstream tinytun {{ server 127.0.0.1:{upstream}; keepalive 4; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://tinytun;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
}}
"""

HAPROXY = """
global
    maxconn 200
defaults
    timeout connect 5s
    timeout client 30s
    timeout server 30s
frontend visitors
    mode http
    bind 127.0.0.1:{port}
    default_backend tinytun
backend tinytun
    mode http
    http-reuse always
    server one 127.0.0.1:{proxy_port} send-proxy-v2
frontend tcp
    mode tcp
    bind 127.0.0.1:{tcp_port}
    default_backend tcp
backend tcp
    mode tcp
    server one 127.0.0.1:{tcp_proxy_port} send-proxy-v2 check inter 200ms
"""


def told(name: str) -> Callable[[Peer], None]:
    """A service that says who it is and what it was told."""

    def answer(got: Request) -> bytes:
        fields = {key.decode().lower(): value.decode() for key, value in got.fields}
        return respond(json.dumps({"name": name, "fields": fields, "size": len(got.body)}).encode())

    return answering(answer)


@pytest.fixture
def behind(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> tuple[TunnelServer, list[str]]:
    """A server that believes the proxy on this machine, with three tunnels."""
    server = start_server(trusted_proxies="127.0.0.1", tcp_listen="off", tcp_ports="20000-32000")
    names = ["one", "two", "three"]
    for name in names:
        open_tunnel(start_service(told(name)), name, server=server)
    return server, names


def visit_in_turn(port: int, names: list[str]) -> dict[str, str]:
    """300 requests that alternate, over three connections at once; what the service was told last."""
    chance, seen = random.Random(6), {}
    visitors = [connect(port) for _ in range(3)]
    for number in range(300):
        name, visitor = chance.choice(names), visitors[number % 3]
        body = b"x" * chance.choice([0, 10, 100_000])
        fields = (b"X-Forwarded-For: 203.0.113.9",)
        visitor.sendall(request(name, "/", *fields, method=b"POST" if body else b"GET", body=body))
        answer = read_response(visitor)
        assert answer.status == 200, answer
        seen = json.loads(answer.body)
        assert (seen["name"], seen["size"]) == (name, len(body))
        assert seen["fields"]["host"] == f"{name}.localhost"
    for visitor in visitors:
        visitor.close()
    return dict(seen["fields"])


def test_nginx_in_front_with_kept_connections(behind: tuple[TunnelServer, list[str]], tmp_path: Path) -> None:
    nginx = program("nginx")
    server, names = behind
    (port,) = free_tunnel_ports(1)
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, upstream=server.proxy_port, port=port))
    with daemon(nginx, "-p", str(tmp_path), "-c", str(config), ready=lambda: listens(port)):
        fields = visit_in_turn(port, names)
        assert fields["x-forwarded-for"] == "203.0.113.9"  # nginx is trusted, and so is who stands before it
        assert fields["x-forwarded-proto"] == "https"
        assert server.core.fronts[1].visitors <= 8, "connections were not kept"  # type: ignore[attr-defined]


def test_haproxy_in_front_with_proxy_v2(
    behind: tuple[TunnelServer, list[str]],
    start_service: StartService,
    open_tunnel: OpenTunnel,
    tmp_path: Path,
) -> None:
    haproxy = program("haproxy")
    server, names = behind

    def echo(peer: Peer) -> None:
        while data := peer.sock.recv(65536):
            peer.sock.sendall(data)

    tunnel = open_tunnel(start_service(echo), server=server, kind="tcp")
    (port,) = free_tunnel_ports(1)
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        HAPROXY.format(
            port=port,
            proxy_port=server.proxy_port,
            tcp_port=tcp_port(tunnel),
            tcp_proxy_port=server.tcp_proxy_port,
        )
    )
    with daemon(haproxy, "-db", "-f", str(config), ready=lambda: listens(port) and listens(tcp_port(tunnel))):
        fields = visit_in_turn(port, names)
        assert fields["x-forwarded-port"] == str(port)  # where the visitor came to, not our own
        payload = random.Random(8).randbytes(4 * MIB)
        with connect(tcp_port(tunnel), timeout=60) as visitor:
            sender = threading.Thread(target=visitor.sendall, args=(payload,))
            sender.start()
            got = bytearray()
            while len(got) < len(payload):
                got += visitor.recv(65536)
            sender.join()
            assert got == payload
            visitor.shutdown(socket.SHUT_WR)
            assert visitor.recv(10) == b""


# -- Redis --------------------------------------------------------------------


def test_redis_over_tcp(server: TunnelServer, open_tunnel: OpenTunnel, tmp_path: Path) -> None:
    redis, cli = program("redis-server"), program("redis-cli")
    (port,) = free_tunnel_ports(1)
    settings = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with daemon(redis, *settings, "--dir", str(tmp_path), ready=lambda: listens(port)):
        tunnel = open_tunnel(port, kind="tcp")
        say = [cli, "-h", "127.0.0.1", "-p", str(tcp_port(tunnel))]
        assert run(*say, "ping") == "PONG\n"
        big = random.Random(9).randbytes(MIB).hex()
        assert run(*say, "-x", "set", "big", stdin=_pipe(big)) == "OK\n"
        assert run(*say, "get", "big") == big + "\n"
        many = "".join(f"SET key:{number} {number}\r\n" for number in range(20_000))
        assert "errors: 0, replies: 20000" in run(*say, "--pipe", stdin=_pipe(many))
        assert run(*say, "dbsize") == "20001\n"
        listener = subprocess.Popen([*say, "subscribe", "news"], stdout=subprocess.PIPE, text=True)
        try:
            assert listener.stdout is not None
            assert [listener.stdout.readline() for _ in range(3)] == ["subscribe\n", "news\n", "1\n"]
            assert run(*say, "publish", "news", "hello") == "1\n"
            assert [listener.stdout.readline() for _ in range(3)] == ["message\n", "news\n", "hello\n"]
        finally:
            listener.kill()
            listener.wait()
            listener.stdout.close()
        if shutil.which("redis-benchmark"):
            said = run(
                "redis-benchmark", *say[1:], "-n", "2000", "-c", "20", "-P", "4", "-q", "-t", "set,get"
            )
            assert said.count("requests per second") == 2, said


def _pipe(text: str) -> int:
    """A file descriptor with ``text`` to read."""
    reading, writing = os.pipe()

    def write() -> None:
        with os.fdopen(writing, "w") as pipe:
            pipe.write(text)

    threading.Thread(target=write, daemon=True).start()
    return reading


# -- ssh ----------------------------------------------------------------------

SSHD = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
Subsystem sftp internal-sftp
LogLevel ERROR
"""


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[int]:
    """The port of an sshd of our own."""
    program("ssh"), program("scp")
    sshd, keygen = program("sshd"), program("ssh-keygen")
    if os.geteuid() == 0 and not Path("/run/sshd").is_dir():
        pytest.skip("sshd started by root needs /run/sshd")
    for name in ("host_key", "user_key"):
        run(keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name))
    (port,) = free_tunnel_ports(1)
    config = tmp_path / "sshd_config"
    config.write_text(SSHD.format(port=port, folder=tmp_path))
    with daemon(sshd, "-D", "-e", "-f", str(config), ready=lambda: listens(port)):
        yield port


def test_ssh_and_scp_over_tcp(
    sshd: int, server: TunnelServer, open_tunnel: OpenTunnel, tmp_path: Path
) -> None:
    tunnel = open_tunnel(sshd, kind="tcp")
    options = ["-F", "none", "-i", str(tmp_path / "user_key"), "-o", "IdentitiesOnly=yes"]
    options += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={tmp_path / 'known'}"]
    options += ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR"]
    where, port = f"{getpass.getuser()}@127.0.0.1", str(tcp_port(tunnel))
    ssh = [program("ssh"), *options, "-p", port, where]
    quiet = {"stderr": subprocess.DEVNULL}  # what the user's own shell has to say
    assert run(*ssh, "echo hello; exit 3", check=False, **quiet) == "hello\n"
    data = random.Random(10).randbytes(8 * MIB)
    (tmp_path / "up").write_bytes(data)
    run(program("scp"), *options, "-q", "-P", port, str(tmp_path / "up"), f"{where}:{tmp_path}/there")
    assert (tmp_path / "there").read_bytes() == data
    run(program("scp"), *options, "-q", "-P", port, f"{where}:{tmp_path}/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    reading = os.open(tmp_path / "up", os.O_RDONLY)
    said = run(*ssh, "sha256sum", stdin=reading, **quiet)
    os.close(reading)
    assert said.split()[0] == hashlib.sha256(data).hexdigest()
