"""Services in Python that people run, aiohttp and uvicorn, behind a tunnel: what gets to them, and back."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OpenTunnel
from support import DEADLINE, Response, connect, read_response, request

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
