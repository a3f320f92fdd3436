"""Loops over what a peer sends let others run, in both programs, however many and small its messages are.

The table of them is in SECURITY.md. Each is driven with 200,000 of the smallest messages it takes, by peers
that read, read slowly, or do not read at all, while a visitor of another tunnel asks for a page every 50 ms.
What the process under attack works until that visitor is answered is measured in its own processor time.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from malice import DATA, PADDED, FakeServer, Link, as_client, frame
from support import DEADLINE, Service, connect, request

from tinytun_gevent import TunnelServer

HERE = Path(__file__).parent

MESSAGES = 200_000

HELD_UP = 0.1
"""Processor seconds that the attacked process may use until an innocent visitor has his page."""

VISITS = 20
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


class Bystander(Program):
    """The innocent visitor."""

    def __init__(self, victim: Program) -> None:
        super().__init__("bystander.py", str(victim.process.pid))
        #: The worst visit since an attack began, in processor seconds.
        self.worst = 0.0

    def take(self) -> tuple[int, float]:
        """How often he has been served until now, and the worst that it cost since he was asked last."""
        self.tell("take")
        count, worst = self.hear().split()
        return int(count), float(worst)

    def served_again(self, times: int) -> None:
        """Waits until he has been served so often from now on."""
        until = self.take_quietly() + times
        deadline = time.monotonic() + 6 * DEADLINE
        while self.take_quietly() < until:
            assert time.monotonic() < deadline, "nobody is served"
            time.sleep(0.02)

    def take_quietly(self) -> int:
        count, worst = self.take()
        self.worst = max(self.worst, worst)
        return count


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
    bystander.worst = 0.0
    began = bystander.take()[0]
    while True:
        moved = sum(flood.go_on() for flood in floods if not flood.over)
        enough = bystander.take_quietly() >= began + VISITS
        if enough or all(flood.over for flood in floods):
            break
        if not moved:
            bystander.served_again(1)
    bystander.served_again(2)
    assert bystander.worst < HELD_UP


def batches(message: bytes, count: int, before: bytes = b"", at_once: int = 4000) -> Iterator[bytes]:
    """``count`` times the message, many in one call."""
    if before:
        yield before
    for _ in range(count // at_once):
        yield message * at_once


@pytest.fixture(scope="module")
def attacked_server() -> Iterator[tuple[Bystander, int, int]]:
    with contextlib.ExitStack() as stack:
        victim = stack.enter_context(contextlib.closing(Program("victim.py", "server")))
        port, proxy_port = map(int, victim.hear().split())
        bystander = stack.enter_context(contextlib.closing(Bystander(victim)))
        bystander.tell(f"serve http://127.0.0.1:{port}")
        assert bystander.hear() == "open\n"
        bystander.tell(f"visit {proxy_port}")
        bystander.served_again(3)
        yield bystander, port, proxy_port


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
        victim = stack.enter_context(contextlib.closing(Program("victim.py", *arguments)))
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
