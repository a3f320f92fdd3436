"""Who gets how much of a busy server: ``python -m benchmarks.shares``, about 40 seconds.

Eight tunnels with one visitor each, and one tunnel with 100 visitors beside one with a single visitor, all at
full speed through one server. What counts are shares, not rates: the fewest and the most that one of the
eight tunnels gets of an eighth, and how many times as much the crowd gets together. The exit code is 1 if a
promise was kept in none of some rounds: others may use the machine as well.
"""

from __future__ import annotations

import argparse
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .peers import Contender, Ground
from .peers.ours import Tinytun
from .processes import BenchmarkError, Workspace
from .way import Endpoint

HEAD = 16384  # bytes of a request's head at most
CHUNK = 1 << 20  # bytes that are discarded, or offered to the kernel, in one call
LENGTH = 1 << 50  # bytes of a body that never ends
TUNNELS = 8
CROWD = 100
WARM = 1.0  # seconds until windows have grown
ROUNDS = 3  # how often it is measured at most
APART = 0.2  # parts of an equal share that one of the tunnels may have more or less
MOST = 2.0  # shares that the crowd may have together


@dataclass(frozen=True)
class Shares:
    """Bytes a second of each tunnel."""

    rates: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.rates)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest, in parts of an equal share."""
        equal = self.total / len(self.rates)
        return min(self.rates) / equal, max(self.rates) / equal


def serve() -> None:
    """A service that answers GET by zeros without an end, ``/small`` but for, and discards all else.

    Prints its port.
    """
    buffer, selector = bytearray(CHUNK), selectors.DefaultSelector()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        print(f"port {listener.getsockname()[1]}", flush=True)
        while True:
            for key, events in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    if sock is listener:
                        visitor, _ = listener.accept()
                        visitor.setblocking(False)
                        selector.register(visitor, selectors.EVENT_READ, "fresh")
                    elif events & selectors.EVENT_WRITE:
                        sock.send(buffer)
                    elif key.data == "fresh":
                        head = sock.recv(HEAD)
                        if not head:
                            raise ConnectionResetError
                        if head.startswith(b"GET /small "):
                            sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nsmall")
                            selector.modify(sock, selectors.EVENT_READ, "fresh")
                        elif head.startswith(b"GET "):
                            sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % LENGTH)
                            selector.modify(sock, selectors.EVENT_WRITE)
                        else:
                            selector.modify(sock, selectors.EVENT_READ)
                    elif not sock.recv_into(buffer, CHUNK, socket.MSG_TRUNC):
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    selector.unregister(sock)
                    sock.close()


def start_service(workspace: Workspace) -> int:
    """The port of a service of its own."""
    command = [sys.executable, "-m", "benchmarks.shares", "--serve"]
    variables = {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    service = workspace.start("service", command, variables)
    return int(service.expect(r"^port (\d+)$")[1])


class Visitors:
    """Visitors of several tunnels, all served by this one loop; what moved is counted by tunnel."""

    def __init__(self, stack: ExitStack, endpoints: list[Endpoint], counts: list[int], upload: bool) -> None:
        """``counts`` is how many visitors each endpoint has."""
        self._upload = upload
        self._buffer = bytearray(CHUNK)
        self.moved = [0] * len(endpoints)
        self._selector = stack.enter_context(selectors.DefaultSelector())
        for number, (endpoint, count) in enumerate(zip(endpoints, counts, strict=True)):
            for _ in range(count):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10))
                sock.sendall(self._request(endpoint))
                sock.setblocking(False)
                event = selectors.EVENT_WRITE if upload else selectors.EVENT_READ
                self._selector.register(sock, event, number)

    def _request(self, endpoint: Endpoint) -> bytes:
        if not self._upload:
            return endpoint.request("")
        return f"POST / HTTP/1.1\r\nHost: {endpoint.host}\r\nContent-Length: {LENGTH}\r\n\r\n".encode()

    def run(self, seconds: float) -> Shares:
        """What the tunnels move in the next ``seconds``; BenchmarkError if one is cut off."""
        before, began = list(self.moved), time.monotonic()
        while (left := began + seconds - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                try:
                    moved = (
                        sock.send(self._buffer)
                        if self._upload
                        else sock.recv_into(self._buffer, CHUNK, socket.MSG_TRUNC)
                    )
                except BlockingIOError:
                    continue
                if not moved:
                    raise BenchmarkError("a visitor was cut off")
                self.moved[key.data] += moved
        elapsed = time.monotonic() - began
        return Shares(tuple((now - was) / elapsed for now, was in zip(self.moved, before, strict=True)))


@contextmanager
def _tunnels(contender: Contender, workspace: Workspace, port: int, count: int) -> Iterator[list[Endpoint]]:
    """A server and ``count`` clients, each with a tunnel of its own to the service at ``port``."""
    ground = Ground(workspace, {f"share-{number}": port for number in range(count)})
    server = contender.start_server(ground)
    running = contender.start_client(ground, server)
    try:
        yield [running.endpoints[name] for name in ground.services]
    finally:
        workspace.stop([*server.processes, *running.processes])


def measure(
    contender: Contender,
    workspace: Workspace,
    port: int,
    counts: list[int],
    upload: bool,
    seconds: float,
    warm: float = WARM,
) -> Shares:
    """What tunnels with so many visitors each get."""
    with ExitStack() as stack:
        endpoints = stack.enter_context(_tunnels(contender, workspace, port, len(counts)))
        visitors = Visitors(stack, endpoints, counts, upload)
        visitors.run(warm)
        return visitors.run(seconds)


@dataclass(frozen=True)
class Row:
    """What was found of one promise."""

    text: str
    kept: bool


def judge(shares: Shares) -> Row:
    """Equal shares for the eight; for the crowd no more than `MOST`."""
    if len(shares.rates) == TUNNELS:
        low, high = shares.spread
        text = f"{TUNNELS} tunnels: {low:.2f} to {high:.2f} of an equal share"
        return Row(text, low > 1 - APART and high < 1 + APART)
    times = shares.rates[0] / shares.rates[1]
    return Row(f"the crowd beside 1: {times:.2f} shares", times < MOST)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement (default 3)")
    parser.add_argument("--crowd", type=int, default=CROWD, help=f"visitors of the crowd (default {CROWD})")
    parser.add_argument("--kind", choices=("http", "tcp"), help="one kind of tunnel only")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    missed = 0
    with Workspace() as workspace:
        port = start_service(workspace)
        for kind in (arguments.kind,) if arguments.kind else ("http", "tcp"):
            contender = Tinytun(kind)
            for upload, way in ((False, "down"), (True, "up")):
                for counts in ([1] * TUNNELS, [arguments.crowd, 1]):
                    for _ in range(ROUNDS):
                        shares = measure(contender, workspace, port, counts, upload, arguments.seconds)
                        row = judge(shares)
                        verdict = "kept" if row.kept else "missed"
                        together = f"{shares.total / 1e9:.2f} GB/s together"
                        print(f"{kind} {way}, {row.text}: {verdict} ({together})", flush=True)
                        if row.kept:
                            break
                    missed += not row.kept
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
