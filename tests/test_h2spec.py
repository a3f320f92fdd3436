"""The tunnel client against h2spec, 145 cases of a peer that speaks HTTP/2 wrongly, or unusually.

h2spec is a client of HTTP/2, as the tunnel's server is. So each of its connections gets a tunnel client of
its own: that one dials a server which answers 101, and from there on the bytes of both are passed to and fro.
``tests/h2spec`` says how to build it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket as native
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gevent
import pytest
from fake_server import local_service
from gevent import socket, subprocess
from gevent.server import StreamServer

from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.config import make_config
from tinytun_gevent.wire.handshake import OpenReply, build_reply, head_end

REQUIRED = os.environ.get("TINYTUN_INTEROP") == "require"  # as .ci/run says: no skipping
H2SPEC = shutil.which("h2spec")

CASES = {"generic": 44, "http2": 94, "hpack": 7}
"""How many cases each group has: fewer would be another h2spec, or one that ended early."""

PATIENCE = 1
"""Seconds that h2spec waits for an answer; most cases end with the first frame."""

DEADLINE = 60.0

PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


def answer_at_once(sock: socket.socket) -> None:
    """A service that says something to everybody who connects, and closes."""
    with sock, suppress(OSError):  # h2spec has gone already
        sock.sendall(PAGE)
        sock.shutdown(native.SHUT_WR)
        while sock.recv(65536):
            pass


def splice(source: socket.socket, sink: socket.socket) -> None:
    """Passes bytes until their end, and the end too."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(native.SHUT_WR)
    except OSError:
        sink.close()
        source.close()


class Bridge:
    """h2spec connects to `port`, and talks to a tunnel client of its own."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._front = StreamServer(("127.0.0.1", 0), self._serve)
        self._front.start()
        self.port = self._front.server_port

    def close(self) -> None:
        self._front.stop()

    def _serve(self, visitor: socket.socket, _: Any) -> None:
        visitor.setsockopt(native.IPPROTO_TCP, native.TCP_NODELAY, 1)
        with socket.socket(native.AF_INET, native.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            agent = Agent(make_config(self._target, server=url, environ={}))
            agent.start()
            try:
                client, _ = listener.accept()
                self._pair(visitor, client)
            finally:
                agent.stop(grace=0)

    def _pair(self, visitor: socket.socket, client: socket.socket) -> None:
        client.setsockopt(native.IPPROTO_TCP, native.TCP_NODELAY, 1)
        head = b""
        while head_end(head) < 0:
            head += client.recv(4096)
        client.sendall(build_reply(OpenReply("0" * 32, domain="h2spec.test", subdomain="h2spec")))
        with visitor, client:
            gevent.joinall([gevent.spawn(splice, visitor, client), gevent.spawn(splice, client, visitor)])


@contextmanager
def bridge() -> Iterator[Bridge]:
    with local_service(answer_at_once) as target:
        running = Bridge(target)
        try:
            yield running
        finally:
            running.close()


def run(group: str, port: int) -> tuple[int, str]:
    """How many cases of ``group`` passed, and h2spec's own report of the others.

    That one is text: in its other form, XML, are the bytes that came as they are.
    """
    done = subprocess.run(
        [str(H2SPEC), group, "-p", str(port), "-o", str(PATIENCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE,
        check=False,
    )
    report = done.stdout.decode(errors="replace")
    total = re.search(r"^(\d+) tests, (\d+) passed, ", report, re.MULTILINE)
    assert total, report
    return int(total[2]), "" if total[1] == total[2] else report[report.find("Failures:") :]


@pytest.mark.skipif(H2SPEC is None and not REQUIRED, reason="h2spec is not installed")
def test_the_client_passes_every_case_of_h2spec() -> None:
    assert H2SPEC is not None, "TINYTUN_INTEROP=require, but h2spec is not installed"
    with bridge() as running:
        jobs = {group: gevent.spawn(run, group, running.port) for group in CASES}
        gevent.joinall(list(jobs.values()), raise_error=True)
    failures = "".join(job.value[1] for job in jobs.values())
    assert not failures, failures
    assert {group: job.value[0] for group, job in jobs.items()} == CASES
