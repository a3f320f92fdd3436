"""Services in Python that people run, aiohttp and uvicorn, behind a tunnel: what gets to them, and back."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OpenTunnel
from python_services import PARTS
from support import DEADLINE, Response, connect, eventually, read_head, read_response, read_rest, request

from tinytun_gevent import TunnelServer

SCRIPT = Path(__file__).with_name("python_services.py")


@pytest.fixture(params=["aiohttp", "uvicorn"])
def service(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of such a service, which listens from the start."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        argv = [sys.executable, str(SCRIPT), request.param, str(listener.fileno())]
        with subprocess.Popen(argv, pass_fds=[listener.fileno()]) as process:
            try:
                yield listener.getsockname()[1]
            finally:
                process.kill()
                process.wait(DEADLINE)


def told_of(response: Response) -> set[bytes]:
    """The names of the fields that the service says it has got."""
    assert response.status == 200, response
    return {line.partition(b":")[0].lower() for line in response.body.splitlines()}


# -- trailers of requests --------------------------------------------------------------------------

TRAILERS = (b"Cookie", b"X-HTTP-Method-Override", b"X-Forwarded-User", b"X-Fine")


@pytest.mark.parametrize("announced", [False, True], ids=["unannounced", "announced"])
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "drops"])
def test_a_request_s_trailers_reach_neither_it_nor_the_next(
    server: TunnelServer, open_tunnel: OpenTunnel, service: int, announced: bool, drops: bool
) -> None:
    """aiohttp gave them to the next request on the connection, uvicorn merged them into the fields."""
    open_tunnel(service)
    fields = [b"Transfer-Encoding: chunked"]
    if announced:
        fields.append(b"Trailer: " + b", ".join(TRAILERS))
    first = request("demo", "/fields", *fields, method=b"POST") + b"5\r\nhello\r\n0\r\n"
    first += b"".join(name + b": admin\r\n" for name in TRAILERS) + b"\r\n"
    with connect(server.proxy_port) as sock:
        for piece in [first[i : i + 1] for i in range(len(first))] if drops else [first]:
            sock.sendall(piece)
        told = [told_of(read_response(sock))]
        for _ in range(2):
            sock.sendall(request("demo", "/fields"))
            told.append(told_of(read_response(sock)))
    for names in told:
        assert b"host" in names
        assert not names & {b"trailer", *map(bytes.lower, TRAILERS)}


# -- HTTP/1.0 --------------------------------------------------------------------------------------

NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr;
events {{ }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{
        listen unix:{folder}/nginx.sock;
        location / {{
            proxy_pass http://127.0.0.1:{port};
            proxy_http_version 1.0;
            proxy_set_header Host demo.localhost;
        }}
    }}
}}
"""


@pytest.fixture
def nginx(server: TunnelServer, tmp_path: Path) -> Iterator[Path]:
    """The socket of an nginx in front of the server, to which it speaks HTTP/1.0."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    config, path = tmp_path / "nginx.conf", tmp_path / "nginx.sock"
    config.write_text(NGINX.format(folder=tmp_path, port=server.proxy_port))
    with subprocess.Popen([program, "-p", str(tmp_path), "-c", str(config)]) as process:
        try:
            eventually(path.exists, what="nginx")
            yield path
        finally:
            process.kill()
            process.wait(DEADLINE)


def test_nginx_that_speaks_http_1_0_gets_streamed_answers(
    nginx: Path, open_tunnel: OpenTunnel, service: int
) -> None:
    """As it does for a plain proxy_pass; uvicorn answers in chunks to HTTP/1.0 as well."""
    open_tunnel(service)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(str(nginx))
        for _ in range(2):
            sock.sendall(request("demo", "/stream"))
            response = read_response(sock)
            assert (response.status, response.body) == (200, b"".join(PARTS))


def test_a_visitor_of_http_1_0_gets_a_streamed_answer_and_the_end(
    server: TunnelServer, open_tunnel: OpenTunnel, service: int
) -> None:
    open_tunnel(service)
    for fields in ((), (b"Connection: keep-alive",)):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", "/stream", *fields, minor=0))
            head = read_head(sock)
            assert head.status == 200
            assert head.get(b"transfer-encoding") is None
            assert head.get(b"connection") == b"close"
            assert read_rest(sock) == b"".join(PARTS)


def test_half_of_a_streamed_answer_does_not_look_whole_to_http_1_0(
    server: TunnelServer, open_tunnel: OpenTunnel, service: int
) -> None:
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/cut", minor=0))
        assert read_head(sock).status == 200
        with pytest.raises(ConnectionResetError):
            read_rest(sock)
