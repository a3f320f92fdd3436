"""Whether bytes pass as fast as a limit lets them: ``python -m benchmarks.limits``, about 30 seconds.

Real programs, whose tunnels may move a megabyte a second. What counts are ratios: of what passed in each
second to the limit, of what the visitors of one tunnel got to each other, of a download beside a limited
tunnel to the same one alone. The exit code is 1 if a promise was kept in none of some rounds: where others
use the machine, a second may come out wrong that is right.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from statistics import median

from .peers import Contender, Ground
from .peers.ours import Tinytun, TinytunToken
from .processes import Workspace
from .shares import LENGTH, start_service
from .way import Endpoint

RATE = 1_000_000  # bytes a second
ROUNDS = 3  # how often it is measured at most
SECONDS = 3.0  # for each measurement
FULL = 0.6  # seconds until buffers have filled
TIMEOUT = 20.0
CROWD = 10  # downloads of one tunnel
NEIGHBOURS = 8  # downloads of the limited tunnel beside the free one

SLOW = "slow"  # the name of the limited one

Ratios = tuple[float, float]  # the smallest and the largest


class OneLimited(TinytunToken):
    """The tunnel `SLOW` is opened with a token of its own, which may move half as much."""

    _slow_token: str  # known when the server is started

    def _server_options(self, ground: Ground, ports: dict[str, int]) -> list[str]:
        options = super()._server_options(ground, ports)
        self._slow_token = self._new_token("slow")
        with self._file.open("a") as tokens:  # the last one's table is the file's end
            tokens.write(f"limits = {{rate = {RATE // 2}}}\n")
        return options

    def _client_variables(self, name: str) -> dict[str, str]:
        return {"TINYTUN_TOKEN": self._slow_token} if name == SLOW else super()._client_variables(name)


class Meter:
    """When how many bytes have passed."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def note(self, count: int) -> None:
        self.times.append(time.monotonic())
        self.counts.append(count)

    def since(self, began: float) -> int:
        return sum(self.counts[bisect_left(self.times, began) :])


def together(meters: Iterable[Meter]) -> Meter:
    """What all of them saw."""
    meter = Meter()
    for at, count in sorted(pair for one in meters for pair in zip(one.times, one.counts, strict=True)):
        meter.times.append(at)
        meter.counts.append(count)
    return meter


def seconds_of(meter: Meter, began: float, ended: float, step: float = 0.05) -> Ratios:
    """What passed in each second between two moments, overlapping ones included, to `RATE`."""
    sums = [0, *accumulate(meter.counts)]
    found = []
    while began + 1 <= ended:
        first, last = (bisect_left(meter.times, at) for at in (began, began + 1))
        found.append((sums[last] - sums[first]) / RATE)
        began += step
    return min(found), max(found)


def download(endpoint: Endpoint, meter: Meter, until: float) -> None:
    with socket.create_connection(("127.0.0.1", endpoint.port), TIMEOUT) as visitor:
        visitor.sendall(endpoint.request(""))
        while time.monotonic() < until:
            meter.note(len(visitor.recv(16384)))


def upload(endpoint: Endpoint, meter: Meter, until: float) -> None:
    """In small pieces, with a small buffer: what counts is when they are taken."""
    with socket.socket() as visitor:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        visitor.settimeout(TIMEOUT)
        visitor.connect(("127.0.0.1", endpoint.port))
        fields = f"Host: {endpoint.host}\r\nContent-Length: {LENGTH}\r\n"
        visitor.sendall(f"POST / HTTP/1.1\r\n{fields}\r\n".encode())
        while time.monotonic() < until:
            meter.note(visitor.send(bytes(4096)))


def ask(endpoint: Endpoint, waits: list[float], until: float) -> None:
    """Fetches the small answer again and again, each time with a connection of its own."""
    while time.monotonic() < until:
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", endpoint.port), TIMEOUT) as visitor:
            visitor.sendall(endpoint.request("small"))
            got = b""
            while not got.endswith(b"\r\n\r\nsmall"):
                piece = visitor.recv(4096)
                assert piece, "the small answer did not come"
                got += piece
        waits.append(time.monotonic() - began)


def side_by_side(tasks: list[Callable[[], None]]) -> None:
    """Runs them all in threads; raises what one of them raises."""
    errors: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def tunnels(contender: Contender, workspace: Workspace, port: int, *names: str) -> Iterator[list[Endpoint]]:
    """A server, and a client for each of these tunnels to the service at ``port``."""
    ground = Ground(workspace, dict.fromkeys(names, port))
    server = contender.start_server(ground)
    running = contender.start_client(ground, server)
    try:
        yield [running.endpoints[name] for name in names]
    finally:
        workspace.stop([*server.processes, *running.processes])


# -- what is promised --------------------------------------------------------------------------------


def each_second(workspace: Workspace, port: int) -> dict[str, Ratios]:
    """A download, an upload, and ten downloads of one tunnel, all at once."""
    contender = Tinytun("http", options=("--tunnel-rate", str(RATE)))
    with tunnels(contender, workspace, port, "down", "up", "many") as (down, up, many):
        began = time.monotonic()
        until = began + SECONDS
        one, other, crowd = Meter(), Meter(), [Meter() for _ in range(CROWD)]
        side_by_side(
            [
                lambda: download(down, one, until),
                lambda: upload(up, other, until),
                *[lambda meter=meter: download(many, meter, until) for meter in crowd],  # type: ignore[misc]
            ]
        )
    shares = [meter.since(began + FULL) for meter in crowd]
    equal = sum(shares) / CROWD
    return {
        "a download, each second to its limit": seconds_of(one, began + FULL, until),
        "an upload, each second to its limit": seconds_of(other, began + FULL, until),
        "ten downloads of one tunnel, each second to its limit": seconds_of(
            together(crowd), began + FULL, until
        ),
        "… each of them to an equal share": (min(shares) / equal, max(shares) / equal),
    }


def both_ways(workspace: Workspace, port: int) -> dict[str, Ratios]:
    """Two tunnels of one token, a download of one and an upload of the other."""
    contender = TinytunToken("http", options=("--token-rate", str(RATE)))
    with tunnels(contender, workspace, port, "one", "two") as (one, two):
        began = time.monotonic()
        until = began + SECONDS
        meters = Meter(), Meter()
        side_by_side([lambda: download(one, meters[0], until), lambda: upload(two, meters[1], until)])
    found = seconds_of(together(meters), began + FULL, until)
    return {"two tunnels of one token, both ways, each second to its limit": found}


def neighbours(workspace: Workspace, port: int) -> dict[str, Ratios]:
    """A limited tunnel full of downloads: what a small answer waits there, and what another tunnel loses."""
    alone, beside, waits = Meter(), Meter(), list[float]()
    with tunnels(OneLimited("http"), workspace, port, SLOW, "fast") as (slow, fast):
        began = time.monotonic()
        download(fast, alone, began + SECONDS)
        middle = time.monotonic()
        until = middle + SECONDS
        side_by_side(
            [
                *[lambda: download(slow, Meter(), until)] * NEIGHBOURS,
                lambda: download(fast, beside, until),
                lambda: ask(slow, waits, until),
            ]
        )
    # Its head and its answer each wait for one turn of the others: a hundredth of a second for each of them.
    turns = 2 * NEIGHBOURS * 0.01
    loss = alone.since(began + FULL) / max(1, beside.since(middle + FULL))
    return {
        "a small answer beside eight downloads, to its turns": (min(waits) / turns, median(waits) / turns),
        "another tunnel's download alone, to beside them": (loss, loss),
    }


PROMISES: dict[Callable[[Workspace, int], dict[str, Ratios]], Ratios] = {
    each_second: (0.9, 1.1),
    both_ways: (0.88, 1.12),
    neighbours: (0.0, 2.0),
}
"""What is measured together, and between which ratios everything of it is to be."""

OTHERS: dict[str, Ratios] = {
    "… each of them to an equal share": (0.8, 1.2),
    "another tunnel's download alone, to beside them": (0.0, 1.5),
}
"""… but for these."""


def check(measure: Callable[[Workspace, int], dict[str, Ratios]], workspace: Workspace, port: int) -> bool:
    """Whether all of it is as promised in one of some rounds; prints each."""
    for _ in range(ROUNDS):
        kept = True
        for what, (low, high) in measure(workspace, port).items():
            least, most = OTHERS.get(what, PROMISES[measure])
            right = least <= low and high <= most
            print(f"{what}: {low:.2f} to {high:.2f} ({'kept' if right else 'missed'})", flush=True)
            kept = kept and right
        if kept:
            return True
    return False


def main() -> int:
    with Workspace() as workspace:
        port = start_service(workspace)
        results = [check(measure, workspace, port) for measure in PROMISES]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
