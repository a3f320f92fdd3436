"""Loops over what a peer sends let others run, in both programs, however many and small its messages are.

The table of them is in SECURITY.md. Each is driven with 200,000 of the smallest messages it takes, by peers
that read, read slowly, or do not read at all, while a visitor of another tunnel asks for a page every 50 ms.
What the process under attack works while one request makes its way is measured in its own processor time.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import certificates
import pytest
from malice import DATA, PADDED, FakeServer, Link, as_client, frame
from support import DEADLINE, Service, connect, request

from tinytun_gevent import TunnelServer

HERE = Path(__file__).parent

MESSAGES = 200_000

HELD_UP = 0.5
"""Processor seconds that the attacked process may work while an innocent request makes its way. The promise
is 0.1; on a machine whose processors are shared with others the same work takes up to five times as many."""

VISITS = 10
"""Innocent visits that an attack lasts for, at least, unless all its messages are taken earlier."""

ATTACKERS = 10

numbers = itertools.count()
"""For the names of malicious tunnels: the last one may not be gone yet."""

MODES = ("reads", "reads slowly", "is deaf")


class Program:
    """A Python program of ours that is told things by lines."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(HERE / script), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def hear(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 6 * DEADLINE)[0], "no answer"
        line = self.process.stdout.readline()
        assert line
        return line

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(6 * DEADLINE) == 0
        finally:
            self.process.kill()


class Victim(Program):
    """The process under attack."""

    def held_up(self) -> float:
        """The longest that a request can have waited since this was asked last, in its processor seconds."""
        self.tell("")
        return float(self.hear().split()[1])


class Bystander(Program):
    """The innocent visitor."""

    def __init__(self, victim: Victim) -> None:
        super().__init__("bystander.py")
        self.victim = victim

    @property
    def served(self) -> int:
        """How often the page has come until now."""
        self.tell("take")
        return int(self.hear())

    def served_again(self, times: int) -> None:
        """Waits until the page has come so often from now on."""
        until, deadline = self.served + times, time.monotonic() + 6 * DEADLINE
        while self.served < until:
            assert time.monotonic() < deadline, "nobody is served"
            time.sleep(0.02)


class Flood:
    """One attacker's connection: sends, reads as its mode says, and never waits for long."""

    def __init__(self, sock: socket.socket, messages: Iterator[bytes], mode: str) -> None:
        self.sock = sock
        self._messages = messages
        self._mode = mode
        self._rest = b""
        self.over = False
        sock.setblocking(False)

    def go_on(self) -> bool:
        """Sends and reads what is possible now; whether anything was."""
        moved = False
        try:
            moved = self._send()
            if self._mode != "is deaf":
                moved |= bool(self.sock.recv(65536 if self._mode == "reads" else 16))
        except BlockingIOError:
            pass
        except OSError:
            self.over = True
        return moved

    def _send(self) -> bool:
        if not self._rest:
            self._rest = next(self._messages, b"")
            if not self._rest:
                self.over = self._mode == "is deaf"
                return False
        sent = self.sock.send(self._rest)
        self._rest = self._rest[sent:]
        return True


def rage(bystander: Bystander, floods: list[Flood]) -> None:
    """Lets the attackers do their worst, and holds the victim to what is promised."""
    bystander.victim.held_up()
    began = bystander.served
    while True:
        moved = sum(flood.go_on() for flood in floods if not flood.over)
        enough = bystander.served >= began + VISITS
        if enough or all(flood.over for flood in floods):
            break
        if not moved:
            bystander.served_again(1)
    bystander.served_again(2)
    assert bystander.victim.held_up() < HELD_UP


def batches(message: bytes, count: int, before: bytes = b"", at_once: int = 4000) -> Iterator[bytes]:
    """``count`` times the message, many in one call."""
    if before:
        yield before
    for _ in range(count // at_once):
        yield message * at_once


@pytest.fixture(scope="module")
def attacked_with_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bystander, int, int, int]]:
    directory = tmp_path_factory.mktemp("tls")
    certificates.install(directory, certificates.issue("localhost"))
    with contextlib.ExitStack() as stack:
        victim = stack.enter_context(contextlib.closing(Victim("victim.py", "server", str(directory))))
        port, proxy_port, tls_port = map(int, victim.hear().split())
        bystander = stack.enter_context(contextlib.closing(Bystander(victim)))
        bystander.tell(f"serve http://127.0.0.1:{port}")
        assert bystander.hear() == "open\n"
        bystander.tell(f"visit {proxy_port}")
        bystander.served_again(3)
        yield bystander, port, proxy_port, tls_port


@pytest.fixture(scope="module")
def attacked_server(attacked_with_tls: tuple[Bystander, int, int, int]) -> tuple[Bystander, int, int]:
    return attacked_with_tls[:3]


# -- visitors against the server --------------------------------------------------------------------

ASKED = {
    "no such tunnel": b"GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n",
    "no such name": b"GET / HTTP/1.1\r\nHost: a.b.localhost\r\n\r\n",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", ASKED)
def test_requests_that_the_server_answers_itself(
    attacked_server: tuple[Bystander, int, int], what: str, mode: str
) -> None:
    bystander, _, proxy_port = attacked_server
    with contextlib.ExitStack() as stack:
        floods = [
            Flood(stack.enter_context(connect(proxy_port)), batches(ASKED[what], MESSAGES // ATTACKERS), mode)
            for _ in range(ATTACKERS)
        ]
        rage(bystander, floods)


@pytest.mark.parametrize("mode", MODES)
def test_requests_of_one_connection_that_a_service_answers(
    attacked_server: tuple[Bystander, int, int], mode: str
) -> None:
    bystander, _, proxy_port = attacked_server
    with connect(proxy_port) as sock:
        rage(bystander, [Flood(sock, batches(request("good"), MESSAGES), mode)])


CHUNKS = {"plain": b"1\r\na\r\n", "with extensions": b"1;a\r\na\r\n", "with zeros": b"01\r\na\r\n"}


@pytest.mark.parametrize("what", CHUNKS)
def test_a_request_in_chunks(attacked_server: tuple[Bystander, int, int], what: str) -> None:
    bystander, _, proxy_port = attacked_server
    head = request("good", "/", b"Transfer-Encoding: chunked", method=b"POST")
    with contextlib.ExitStack() as stack:
        floods = [
            Flood(stack.enter_context(connect(proxy_port)), batches(CHUNKS[what], MESSAGES, head), "reads")
            for _ in range(4)
        ]
        rage(bystander, floods)


class TlsFlood(Flood):
    """The same by TLS, one byte a record."""

    def _send(self) -> bool:
        try:
            for _ in range(500):
                self.sock.send(next(self._messages))
        except ssl.SSLWantWriteError:
            return False
        except StopIteration:
            self.over = True
        return True

    def go_on(self) -> bool:
        try:
            return self._send()
        except OSError:
            self.over = True
            return False


def test_records_of_tls(attacked_with_tls: tuple[Bystander, int, int, int]) -> None:
    """A body whose bytes come in records of their own, which take twenty times as many."""
    bystander, _, _, tls_port = attacked_with_tls
    head = request("good", "/", b"Content-Length: %d" % MESSAGES, method=b"POST")
    context = ssl.create_default_context()
    certificates.AUTHORITY.configure_trust(context)
    with contextlib.ExitStack() as stack:
        floods = []
        for _ in range(4):
            sock = stack.enter_context(connect(tls_port))
            secure = stack.enter_context(context.wrap_socket(sock, server_hostname="localhost"))
            secure.sendall(head)
            floods.append(TlsFlood(secure, (b"x" for _ in range(MESSAGES)), "reads"))
        rage(bystander, floods)


# -- a tunnel's client against the server -----------------------------------------------------------


class LinkFlood(Flood):
    """The same on a session, whose window lets it send without waiting."""

    def __init__(self, link: Link, messages: Iterator[bytes]) -> None:
        self._link = link
        self._messages = messages
        self.over = False

    def go_on(self) -> bool:
        piece = next(self._messages, b"")
        self.over = not piece or not self._link.send(piece)
        return not self.over


def of_length(stream: int) -> Iterator[bytes]:
    """An answer whose bytes come one by one."""
    yield frame(DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n", 0, stream)
    yield from batches(frame(DATA, b"x", 0, stream), MESSAGES)


def padded(stream: int) -> Iterator[bytes]:
    yield frame(DATA, b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n", 0, stream)
    yield from batches(frame(DATA, b"\0x", PADDED, stream), MESSAGES // 2)


def in_chunks(chunk: bytes) -> Callable[[int], Iterator[bytes]]:
    """An answer in chunks, as many as a window holds, thousands in each frame."""

    def script(stream: int) -> Iterator[bytes]:
        yield frame(DATA, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", 0, stream)
        for _ in range(4):
            yield frame(DATA, chunk * (65000 // len(chunk)), 0, stream)

    return script


def head_by_bytes(stream: int) -> Iterator[bytes]:
    """A head that does not end, byte by byte."""
    yield frame(DATA, b"HTTP/1.1 200 OK\r\n", 0, stream)
    for number in range(MESSAGES // 10_000):
        head = b"X-%d: " % number + b"a" * 10_000 + b"\r\n"
        yield b"".join(frame(DATA, head[i : i + 1], 0, stream) for i in range(len(head)))


ANSWERS: dict[str, Callable[[int], Iterator[bytes]]] = {
    "bytes of a body": of_length,
    "padded bytes of a body": padded,
    "chunks": in_chunks(b"1\r\na\r\n"),
    "chunks with extensions": in_chunks(b"1;a\r\na\r\n"),
    "bytes of a head": head_by_bytes,
}


@pytest.mark.parametrize("mode", ["reads", "is deaf"])
@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_in_small_pieces(attacked_server: tuple[Bystander, int, int], what: str, mode: str) -> None:
    bystander, port, proxy_port = attacked_server
    with contextlib.ExitStack() as stack:
        visitors: list[Flood] = []
        name = f"evil{next(numbers)}"

        def visit() -> None:
            visitor = stack.enter_context(connect(proxy_port))
            visitor.sendall(request(name))
            visitors.append(Flood(visitor, iter(()), mode))

        link = stack.enter_context(as_client(port, name, visit))
        link.greet()
        streams = [link.open() for _ in range(4)]
        rage(bystander, [*visitors, *(LinkFlood(link, ANSWERS[what](stream)) for stream in streams)])


# -- a server against a client -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["reads", "is deaf", "is away"])
def test_a_visitor_in_small_pieces(target: str) -> None:
    """The service that he comes to reads, does not, or is not there."""
    ports = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
    with contextlib.ExitStack() as stack:
        evil = stack.enter_context(contextlib.closing(FakeServer()))
        good = stack.enter_context(TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports))
        reading = stack.enter_context(Service(lambda peer: peer.rest() and None))
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        away = stack.enter_context(socket.socket())
        away.bind(("127.0.0.1", 0))  # and does not listen
        targets = {"reads": reading.port, "is deaf": deaf.getsockname()[1], "is away": away.getsockname()[1]}
        honest = stack.enter_context(Service())
        arguments = ("client", evil.url, good.url, str(targets[target]), honest.target)
        victim = stack.enter_context(contextlib.closing(Victim("victim.py", *arguments)))
        link = stack.enter_context(evil.accept())
        link.greet()
        assert victim.hear() == "open\n"
        bystander = stack.enter_context(contextlib.closing(Bystander(victim)))
        bystander.tell(f"visit {good.proxy_port}")
        bystander.served_again(3)
        streams = [link.open() for _ in range(4)]
        rage(
            bystander,
            [LinkFlood(link, batches(frame(DATA, b"x", 0, stream), MESSAGES)) for stream in streams],
        )
