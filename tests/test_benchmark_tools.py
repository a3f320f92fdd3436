"""The benchmark's C programs: what they carry arrives unchanged, and no earlier than was asked."""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import select
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from websockets.asyncio.client import connect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tools as tools_module  # noqa: E402
from benchmarks.processes import BenchmarkError, Workspace  # noqa: E402
from benchmarks.tools import (  # noqa: E402
    BulkResult,
    MessagesResult,
    Tools,
    build,
    first_bytes,
    missing,
    read_bulk,
    start_echo,
    start_relay,
    websocket_load,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the programs use epoll"),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
]

DELAY = 0.03  # seconds each way
PATIENCE = 60.0  # seconds until something that has to come counts as lost
HOST = "localhost"


@pytest.fixture(scope="module")
def workspace() -> Iterator[Workspace]:
    with Workspace() as made:
        yield made


@pytest.fixture(scope="module")
def tools(workspace: Workspace) -> Tools:
    return build(workspace)


@pytest.fixture(scope="module")
def echo(workspace: Workspace, tools: Tools) -> int:
    return start_echo(workspace, tools)[1]


class Way:
    """Both ends of a TCP connection through a relay; the far end listens as long as the test runs."""

    def __init__(
        self, workspace: Workspace, tools: Tools, *, delay: float = 0.0, rate: int = 0, window: int = 0
    ) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)
        target = self.listener.getsockname()[1]
        self.relay, self.port = start_relay(workspace, tools, target, delay=delay, rate=rate, window=window)

    def open(self) -> tuple[socket.socket, socket.socket]:
        """A connection: the client's end and the target's."""
        near = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        far, _ = self.listener.accept()
        far.settimeout(PATIENCE)
        return near, far


@pytest.fixture
def way(workspace: Workspace, tools: Tools) -> Iterator[type[Way]]:
    made: list[Way] = []

    class Made(Way):
        def __init__(self, *, delay: float = 0.0, rate: int = 0, window: int = 0) -> None:
            super().__init__(workspace, tools, delay=delay, rate=rate, window=window)
            made.append(self)

    yield Made
    for one in made:
        one.listener.close()
        workspace.stop([one.relay])


def receive_all(sock: socket.socket) -> bytes:
    parts = []
    while part := sock.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def receive_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        assert part, f"it ended after {len(data)} of {count} bytes"
        data += part
    return data


def send_while_taken(sock: socket.socket, quiet: float, least: int = 0) -> int:
    """Sends ``least`` bytes, and on until nothing was taken for ``quiet`` seconds; how much was."""
    sock.settimeout(PATIENCE)
    sock.sendall(bytes(least))
    sock.setblocking(False)
    sent = least
    while select.select([], [sock], [], quiet)[1]:
        sent += sock.send(bytes(1 << 16))
    return sent


def send_until_it_fails(sock: socket.socket) -> None:
    """Sends until the socket raises, for `PATIENCE` at most."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        sock.sendall(bytes(1 << 16))


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize(
    "limits",
    [{}, {"delay": 0.005}, {"delay": 0.005, "rate": 200_000_000}, {"delay": 0.005, "window": 1 << 20}],
    ids=["plain", "delay", "rate", "window"],
)
def test_what_is_sent_arrives_unchanged_both_ways(way: type[Way], limits: dict[str, int]) -> None:
    near, far = way(**limits).open()
    sent = random.Random(4).randbytes(64 << 20)
    got: dict[str, str] = {}

    def send(sock: socket.socket, data: bytes) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    def take(name: str, sock: socket.socket) -> None:
        got[name] = hashlib.sha256(receive_all(sock)).hexdigest()

    back = sent[: 8 << 20]
    threads = [
        threading.Thread(target=send, args=(near, sent)),
        threading.Thread(target=send, args=(far, back)),
        threading.Thread(target=take, args=("far", far)),
        threading.Thread(target=take, args=("near", near)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    near.close()
    far.close()
    assert got == {name: hashlib.sha256(data).hexdigest() for name, data in (("far", sent), ("near", back))}


def test_bytes_take_the_delay_each_way(way: type[Way]) -> None:
    near, far = way(delay=DELAY).open()
    with near, far:
        for source, sink in ((near, far), (far, near)):
            receive_exactly_after(source, sink, DELAY)


def receive_exactly_after(source: socket.socket, sink: socket.socket, least: float) -> None:
    began = time.monotonic()
    source.sendall(b"x")
    receive_exactly(sink, 1)
    assert time.monotonic() - began >= least


def test_a_new_connection_costs_a_round_trip(way: type[Way]) -> None:
    path = way(delay=DELAY)
    began = time.monotonic()
    near = socket.create_connection(("127.0.0.1", path.port), timeout=PATIENCE)
    near.sendall(b"first")
    far, _ = path.listener.accept()
    far.settimeout(PATIENCE)
    assert receive_exactly(far, 5) == b"first"
    assert time.monotonic() - began >= 3 * DELAY
    far.sendall(b"answer")
    assert receive_exactly(near, 6) == b"answer"
    assert time.monotonic() - began >= 4 * DELAY
    near.close()
    far.close()


def test_a_half_closed_connection_still_carries_the_other_way(way: type[Way]) -> None:
    near, far = way(delay=DELAY).open()
    with near, far:
        began = time.monotonic()
        near.sendall(b"request")
        near.shutdown(socket.SHUT_WR)
        assert receive_all(far) == b"request"
        assert time.monotonic() - began >= DELAY
        far.sendall(b"answer")
        far.shutdown(socket.SHUT_WR)
        assert receive_all(near) == b"answer"


@pytest.mark.parametrize("from_the_client", [True, False])
def test_a_reset_arrives_as_a_reset(way: type[Way], from_the_client: bool) -> None:
    near, far = way(delay=DELAY).open()
    source, sink = (near, far) if from_the_client else (far, near)
    source.sendall(b"x")
    receive_exactly(sink, 1)
    began = time.monotonic()
    reset(source)
    with closing(sink), pytest.raises(ConnectionResetError):
        sink.recv(1)
    assert time.monotonic() - began >= DELAY


def test_a_reset_passes_a_receiver_that_does_not_read(way: type[Way]) -> None:
    near, far = way(delay=0.001, window=1 << 20).open()
    send_while_taken(near, 0.3)
    reset(near)
    errors = select.poll()
    errors.register(far, 0)  # nothing is read: only its end is told
    assert errors.poll(PATIENCE * 1e3)
    with far, pytest.raises(ConnectionResetError):
        receive_all(far)


def test_writing_to_a_dead_side_resets_the_other(way: type[Way]) -> None:
    near, far = way(delay=0.001).open()
    far.sendall(b"left unread")
    assert select.select([near], [], [], PATIENCE)[0]
    near.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    near.close()  # with bytes unread, and a FIN sent already: the kernel resets
    with far, pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_until_it_fails(far)


def test_a_target_that_refuses_resets_the_client(workspace: Workspace, tools: Tools) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        target = gone.getsockname()[1]
    relay, port = start_relay(workspace, tools, target, delay=0.001)
    near = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    with near, pytest.raises(ConnectionResetError):
        near.recv(1)
    workspace.stop([relay])


def test_the_rate_is_not_exceeded(way: type[Way]) -> None:
    rate, size = 20_000_000, 4_000_000
    path = way(delay=0.001, rate=rate)
    pairs = [path.open() for _ in range(2)]  # the line is one for both
    began = time.monotonic()
    threads = [threading.Thread(target=near.sendall, args=(bytes(size),)) for near, _ in pairs]
    threads += [threading.Thread(target=receive_exactly, args=(far, size)) for _, far in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert time.monotonic() - began >= len(pairs) * size / rate
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_two_connections_share_the_line(way: type[Way]) -> None:
    path = way(delay=0.001, rate=20_000_000)
    (busy, busy_far), (second, second_far) = path.open(), path.open()
    size = 4_000_000
    thread = threading.Thread(target=busy.sendall, args=(bytes(4 * size),))
    thread.start()
    begun = len(receive_exactly(busy_far, 100_000))  # it is at full speed
    sender = threading.Thread(target=second.sendall, args=(bytes(size),))
    sender.start()
    open_far = [busy_far, second_far]
    totals = {busy_far: begun, second_far: 0}
    while totals[second_far] < size:
        for sock in select.select(open_far, [], [], PATIENCE)[0]:
            totals[sock] += len(sock.recv(1 << 16))
    assert totals[busy_far] < 4 * size, "the second one had to wait until the first was done"
    while totals[busy_far] < 4 * size:
        totals[busy_far] += len(busy_far.recv(1 << 16))
    thread.join(PATIENCE)
    sender.join(PATIENCE)
    for sock in (busy, second, busy_far, second_far):
        sock.close()


def test_the_window_bounds_the_speed(way: type[Way]) -> None:
    window, size = 1 << 20, 8 << 20
    near, far = way(delay=DELAY, window=window).open()
    began = time.monotonic()
    thread = threading.Thread(target=near.sendall, args=(bytes(size),))
    thread.start()
    receive_exactly_quickly(far, size)
    # The first window needs no acknowledgement; each further one waits a round trip for one.
    assert time.monotonic() - began >= (size / window - 1) * 2 * DELAY + DELAY
    thread.join(PATIENCE)
    near.close()
    far.close()


def receive_exactly_quickly(sock: socket.socket, count: int) -> None:
    while count:
        part = sock.recv(min(count, 1 << 20))
        assert part
        count -= len(part)


def test_a_window_bounds_what_a_stalled_receiver_is_sent(way: type[Way]) -> None:
    for delay in (1.0, 4.0, 16.0):
        near, far = way(delay=delay, window=256 << 10).open()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        began = time.monotonic()
        taken = send_while_taken(near, 0.3, least=256 << 10)
        # Within the time that the first byte needs, nothing is delivered: the window, the relay's small
        # receive buffer (the kernel doubles it) and our own are all that there is.
        in_time = time.monotonic() - began < delay
        near.close()
        far.close()
        if in_time:
            break
    assert in_time
    assert taken <= (256 << 10) + (1 << 20)


def test_many_connections_at_once(workspace: Workspace, tools: Tools, echo: int) -> None:
    relay, port = start_relay(workspace, tools, echo, delay=DELAY)
    result = first_bytes(workspace, tools, HOST, port, "/bytes/5", visitors=400)
    assert (result.failures, result.attempts) == (0, 400)
    assert 4 * DELAY * 1e3 <= result.p50_ms <= result.p99_ms <= result.max_ms
    workspace.stop([relay])


async def exchange(port: int, messages: list[str | bytes]) -> list[str | bytes]:
    async with connect(f"ws://127.0.0.1:{port}/", proxy=None, max_size=None) as client:
        answers = []
        for message in messages:
            await client.send(message)
            answers.append(await asyncio.wait_for(client.recv(), PATIENCE))
        await client.send(["in ", "three ", "fragments"])
        answers.append(await asyncio.wait_for(client.recv(), PATIENCE))
        await asyncio.wait_for(await client.ping(), PATIENCE)
        return answers


def test_the_echo_speaks_websocket(echo: int) -> None:
    messages: list[str | bytes] = [
        "",
        "text",
        b"\0binary",
        b"x" * 125,
        b"y" * 126,
        b"z" * 65536,
        bytes(900_000),
    ]
    assert asyncio.run(exchange(echo, messages)) == [*messages, "in three fragments"]


def test_the_chunks_are_whole_and_the_connection_is_kept(echo: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{echo}/chunks", timeout=PATIENCE) as response:
        assert response.headers["Transfer-Encoding"] == "chunked"
        assert response.read() == b"c" * 20_000_000
    # The pipelined request after it is answered on the same connection.
    with socket.create_connection(("127.0.0.1", echo), timeout=PATIENCE) as sock:
        sock.sendall(b"GET /chunks HTTP/1.1\r\nHost: x\r\n\r\n")
        sock.sendall(b"GET /bytes/3 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = receive_all(sock)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    body, _, second = rest.partition(b"0\r\n\r\n")
    assert body == (b"64\r\n" + b"c" * 100 + b"\r\n") * 200_000
    assert second.startswith(b"HTTP/1.1 200 ")
    assert second.endswith(b"Content-Length: 3\r\n\r\nfff")


R = TypeVar("R", MessagesResult, BulkResult)


def repeated(measure: Callable[[float], R], seconds: float, attempts: int) -> tuple[R, float]:
    """A measurement that lasts long enough on this machine for so many attempts, and how long that is."""
    while (result := measure(seconds)).attempts < attempts:
        assert (result.failures, result.reason) == (0, "")
        assert seconds < PATIENCE
        seconds *= 2
    return result, seconds


@pytest.mark.parametrize("payload", [0, 100, 70_000, 1 << 20])
def test_the_load_counts_echoes(workspace: Workspace, tools: Tools, echo: int, payload: int) -> None:
    load = partial(websocket_load, workspace, tools, HOST, echo, sockets=4, payload=payload)
    result, seconds = repeated(lambda seconds: load(seconds=seconds), 0.4, 5)
    assert (result.failures, result.reason) == (0, "")
    assert 0 < result.rate * seconds <= result.attempts
    assert 0 < result.p50_ms <= result.p99_ms


class Liar:
    """A service that answers each connection with the same bytes, whatever it is asked."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            while True:
                connection, _ = self.listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(self.answer)
        except OSError:
            pass  # closed: the test is over

    def close(self) -> None:
        self.listener.close()


def test_wrong_answers_are_failures(workspace: Workspace, tools: Tools) -> None:
    with closing(Liar(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")) as liar:
        load = websocket_load(workspace, tools, HOST, liar.port, sockets=3, seconds=0.2)
        bulk = read_bulk(workspace, tools, HOST, liar.port, "/x", visitors=2, seconds=0.2)
        first = first_bytes(workspace, tools, HOST, liar.port, "/x", visitors=4)
    assert (load.failures, load.attempts, load.rate) == (3, 3, 0.0)
    assert (bulk.failures, bulk.attempts, bulk.rate_bytes_per_s) == (2, 2, 0.0)
    assert (first.failures, first.attempts) == (4, 4)
    assert "101" in load.reason
    assert "200" in bulk.reason
    assert "200" in first.reason


def test_a_refused_visitor_is_a_failure(workspace: Workspace, tools: Tools) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert websocket_load(workspace, tools, HOST, port, sockets=2, seconds=0.2).failures == 2
    assert read_bulk(workspace, tools, HOST, port, "/x", visitors=2, seconds=0.2).failures == 2
    assert first_bytes(workspace, tools, HOST, port, "/x", visitors=2).failures == 2


def test_the_reader_counts_body_bytes_only(
    workspace: Workspace, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer, then the connection ends: what was counted is known to the byte."""
    reports: list[str] = []
    monkeypatch.setattr(tools_module, "_rate_after", lambda report, _: reports.append(report) or 0.0)
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + bytes(1000)
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked += b"1F4\r\n" + bytes(500) + b"\r\n1f4;name=ff\r\n" + bytes(500) + b"\r\n0\r\nA: trailer\r\n\r\n"
    for answer in (plain, chunked):
        with closing(Liar(answer)) as liar:
            result = read_bulk(workspace, tools, HOST, liar.port, "/x", visitors=1, seconds=0.3)
        # The second request, on the connection that was closed, is what fails.
        assert (result.failures, result.attempts) == (1, 2)
        assert sum(map(int, re.findall(r"(?m)^at [\d.]+ (\d+)$", reports.pop()))) == 1000


@pytest.mark.parametrize("path", ["/bytes/50000", "/chunks"])
def test_the_reader_asks_again(workspace: Workspace, tools: Tools, echo: int, path: str) -> None:
    # An answer of /chunks is 20 MB, and takes tenths of a second.
    read = partial(read_bulk, workspace, tools, HOST, echo, path, visitors=1, skip=0.1)
    result, _ = repeated(lambda seconds: read(seconds=seconds), 0.6, 2)
    assert result.failures == 0
    assert result.rate_bytes_per_s > 0


def test_what_is_skipped_is_left_out() -> None:
    report = "at 0.1 900\nat 0.2 100\nat 0.3 100\nfailures 0\n"
    assert tools_module._rate_after(report, 0.0) == pytest.approx(1100 / 0.3)
    assert tools_module._rate_after(report, 0.1) == pytest.approx(1000)
    with pytest.raises(BenchmarkError, match="ended before"):
        tools_module._rate_after(report, 5.0)


def test_a_machine_without_a_compiler_is_told_so(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools_module, "COMPILER", "no-such-compiler")
    with pytest.raises(BenchmarkError, match="no C compiler"):
        build(workspace)


def test_a_wrong_argument_is_named(workspace: Workspace, tools: Tools) -> None:
    with pytest.raises(BenchmarkError, match="an address is four numbers"):
        start_relay(workspace, tools, 1, delay=0.0, bind="nowhere")
