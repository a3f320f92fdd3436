"""Death, stalls and abuse: real processes killed and stopped, slow lines, stalled readers, leaks.

Most of it is waiting, so all scenarios run at the same time, each in a thread with processes of
its own; a test waits for its scenario and shows what went wrong there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gevent
import psutil
import pytest
from helpers import MIB, Process, Wire, fd_count, greenlet_count
from network import Network, network
from server_process import COMMAND, ServerProcess, environment
from support import (
    DEADLINE,
    Peer,
    Service,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    request,
    reset,
    respond,
)

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.client.events import Listener, State
from tinytun_gevent.liveness import PATIENCE, QUIET

LONG = 240.0
"""Seconds after which a scenario has failed; on a quiet machine the longest takes 20. How soon a loss is
noticed, and a name is back, is measured by ``benchmarks/faults``."""

Scenario = Callable[[], None]
Running = dict[str, "Future[None]"]
_scenarios: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    _scenarios[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Running]:
    """The scenarios of the tests that were asked for, all started."""
    wanted = {getattr(item, "originalname", "") for item in request.session.items}
    started = {name: run for name, run in _scenarios.items() if f"test_{name}" in wanted}
    with ThreadPoolExecutor(len(started)) as pool:
        yield {name: pool.submit(run) for name, run in started.items()}


def client(server: ServerProcess, service: Service, name: str, *options: str) -> Process:
    process = Process("tinytun", "http", service.target, "-s", name, "--server", server.url, *options)
    process.wait_line(f"http://{name}\\.", stderr=False)
    return process


def names(server: ServerProcess) -> set[str]:
    return {tunnel["name"]["Subdomain"] for tunnel in server.tunnels()}


def serves(server: ServerProcess, name: str) -> bool:
    try:
        return get(server.proxy_port, name).status == 200
    except (OSError, AssertionError):
        return False


# -- death --------------------------------------------------------------------


@scenario
def a_killed_client_has_its_name_again_at_once() -> None:
    kept_for_long = environment(LEASE_SECONDS="3600")
    with ServerProcess(environ=kept_for_long).wait_serving() as server, Service() as service:
        process = client(server, service, "demo")
        for _ in range(3):
            process.kill()
            process = client(server, service, "demo")
            eventually(lambda: serves(server, "demo"))
        assert process.stop() == 0
        assert not server.tunnels()


@scenario
def a_killed_server_gets_its_tunnels_back() -> None:
    with ServerProcess() as first, Service() as service:
        first.wait_serving()
        process = client(first, service, "demo")
        environ = environment(
            CONNECTION_PORT=str(first.connection_port),
            PROXY_PORT=str(first.proxy_port),
            TCP_PROXY_PORT=str(first.tcp_proxy_port),
            METADATA_PORT=str(first.metadata_port),
        )
        server = first
        try:
            for number in range(3):
                kill_all(server)
                process.wait_line("reconnecting", skip=number)
                server = ServerProcess(environ=environ).wait_serving()
                eventually(lambda server=server: serves(server, "demo"))
        finally:
            kill_all(server)
            process.kill()


def kill_all(server: ServerProcess) -> None:
    """``kill -9`` of master and worker."""
    if server.process.poll() is None:
        for process in (psutil.Process(pid) for pid in [server.process.pid, *server.workers()]):
            process.kill()
        server.process.wait(DEADLINE)


@scenario
def a_stopped_client_loses_its_name_in_time_and_gets_it_back() -> None:
    """SIGSTOP: the kernel goes on acknowledging, and visitors keep coming."""
    with ServerProcess().wait_serving() as server, Service() as service:
        stops = {"one": 0.0, "two": 15.0}
        with ThreadPoolExecutor(len(stops)) as pool:
            futures = [pool.submit(stop_for, server, service, *stop) for stop in stops.items()]
            for future in futures:
                future.result(LONG)


def stop_for(server: ServerProcess, service: Service, name: str, seconds: float) -> None:
    """For at least so long, and until the name is lost."""
    process = client(server, service, name)
    try:
        assert serves(server, name)
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        visitors = [connect(server.proxy_port, timeout=60) for _ in range(3)]
        while name in names(server):
            assert time.monotonic() - began < DEADLINE, f"{name} is still listed"
            for visitor in visitors:
                try:
                    visitor.sendall(request(name))
                except OSError:
                    pass
            time.sleep(0.2)
        assert time.monotonic() - began > 4, "too hasty for a pause"
        for visitor in visitors:
            visitor.close()
        time.sleep(max(0.0, began + seconds - time.monotonic()))
        process.signal(signal.SIGCONT)
        process.wait_line(r"no answer from 127.0.0.1:\d+ for \d+ s: this computer was asleep or offline")
        eventually(lambda: serves(server, name), what=f"{name} back")
        assert "is stopping" not in "".join(process.stderr)
    finally:
        process.kill()


@scenario
def a_stopped_server_is_noticed_by_its_client() -> None:
    with ServerProcess().wait_serving() as server, Service() as service:
        process = client(server, service, "demo")
        worker = server.worker()
        try:
            os.kill(worker, signal.SIGSTOP)
            process.wait_line("reconnecting")
            os.kill(worker, signal.SIGCONT)
            eventually(lambda: serves(server, "demo"))
        finally:
            process.kill()


SERVICE = (
    "from support import Service; import time; s = Service(); print(s.port, flush=True); time.sleep(120)"
)
VISIT = """
from support import *
with connect({}, "10.77.0.1") as sock:
    sock.sendall(request("demo"))
    print(read_response(sock).status)
"""


@scenario
def a_dead_link_is_noticed_by_both_sides_and_survived() -> None:
    """Nobody's kernel says anything: the client's interface is down."""
    with ExitStack() as stack:
        cut_the_link(network(stack))


def cut_the_link(net: Network) -> None:
    port = net.output(net.client, SERVICE)
    environ = environment(BIND="10.77.0.1", METADATA_BIND="10.77.0.1")
    with ServerProcess(command=(*net.server, *COMMAND), environ=environ).wait_serving() as server:
        visit = VISIT.format(server.proxy_port)
        url = f"http://10.77.0.1:{server.connection_port}"
        process = Process("tinytun", "http", port, "-s", "demo", "--server", url, prefix=net.client)
        try:
            process.wait_line("http://demo\\.", stderr=False)
            assert net.output(net.server, visit) == "200"
            net.link("down")
            process.wait_line("reconnecting")
            server.wait_line("tunnel demo (lost|closed)")
            net.link("up")
            server.wait_line("tunnel demo opened", count=2)
            assert net.output(net.server, visit) == "200"
        finally:
            process.kill()


# -- a slow line --------------------------------------------------------------

MEGABIT = 125_000
"""Bytes a second."""


class Recorder(Listener):
    """Remembers the states of a tunnel."""

    def __init__(self) -> None:
        self.states: list[tuple[State, str]] = []

    def state(self, state: State, reason: str) -> None:
        self.states.append((state, reason))


@scenario
def a_slow_line_full_of_bulk_is_not_dead() -> None:
    """Uploads, downloads, and both at once, for twice as long as a silent peer has, over 1 Mbit/s each."""
    over = threading.Event()
    with TunnelServer(**LOOPBACK) as server, Service(pour) as service:
        wires: list[Wire] = []
        with ThreadPoolExecutor(4) as pool:
            lines = pool.submit(keep_lines, server.connection_port, wires, over)
            eventually(lambda: len(wires) == 3)
            ways = [b"u", b"d", b"b"]
            futures = [
                pool.submit(pour_over, wire, way, service) for wire, way in zip(wires, ways, strict=True)
            ]
            try:
                for future in futures:
                    future.result(LONG)
            finally:
                over.set()
                lines.result(DEADLINE)


LOOPBACK: dict[str, Any] = {
    "bind": "127.0.0.1",
    "connection_port": 0,
    "proxy_port": 0,
    "tcp_proxy_port": 0,
    "metadata_port": 0,
    "base_domains": "localhost",
    "tcp_ports": "20000-32000",
}


def keep_lines(port: int, wires: list[Wire], over: threading.Event) -> None:
    """Runs the lines in this thread's own hub."""
    wires += [Wire(port, rate=MEGABIT) for _ in range(3)]
    while not over.is_set():
        gevent.sleep(0.02)
    for wire in wires:
        wire.close()


def pour(peer: Peer) -> None:
    """A service that sends, takes, or both, without end; what it took is what its log would be."""
    way = peer.sock.recv(1)
    poured = [threading.Thread(target=fill, args=(peer.sock,), daemon=True)] if way in b"db" else []
    for thread in poured:
        thread.start()
    taken = 0
    if way in b"ub":
        while data := peer.sock.recv(65536):
            taken += len(data)
            peer.number = taken
    for thread in poured:
        thread.join()


def fill(sock: socket.socket) -> None:
    try:
        while True:
            sock.sendall(bytes(16384))
    except OSError:
        pass


def pour_over(wire: Wire, way: bytes, service: Service) -> None:
    seconds, states = 2 * (QUIET + PATIENCE), Recorder()
    tunnel = Tunnel(
        service.target, kind="tcp", server=f"http://127.0.0.1:{wire.port}", proxy="", events=states
    )
    tunnel.open()
    with closing_at_once(tunnel), connect(int(tunnel.url.rpartition(":")[2])) as visitor:
        before = list(states.states)
        visitor.sendall(way)
        if way in b"ub":
            threading.Thread(target=fill, args=(visitor,), daemon=True).start()
        began, got = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            if way in b"db":
                got += len(visitor.recv(65536))
            else:
                time.sleep(0.5)
        counters = tunnel.counters
        assert states.states == before, f"{way!r}: {states.states}"
        assert tunnel.state is State.CONNECTED
        assert got or way == b"u"
        assert counters.bytes_in > 1 or way == b"d"
        reset(visitor)


@contextmanager
def closing_at_once(tunnel: Tunnel) -> Iterator[None]:
    try:
        yield
    finally:
        tunnel.close(grace=0)


# -- stalled readers ----------------------------------------------------------

GROWTH = 24 * MIB
BODY = 64 * MIB
BUSY = 20


@scenario
def a_stalled_download_beside_busy_ones() -> None:
    stall(download_stalled)


@scenario
def a_stalled_upload_beside_busy_ones() -> None:
    stall(upload_stalled)


def stall(run: Callable[[ServerProcess, Callable[[], None]], None]) -> None:
    with ServerProcess().wait_serving() as server, Service(big) as service:
        process = client(server, service, "demo")
        try:
            for _ in range(BUSY):  # everything that is made once is made
                download(server, MIB)
                upload(server, MIB)
            watched = {"client": psutil.Process(process.pid), "server": psutil.Process(server.worker())}
            before = {name: watched[name].memory_info().rss for name in watched}
            grown = dict.fromkeys(watched, 0)

            def look() -> None:
                for name in watched:
                    grown[name] = max(grown[name], watched[name].memory_info().rss - before[name])

            run(server, look)
            look()
            assert max(grown.values()) < GROWTH, grown
        finally:
            process.kill()


def content(count: int) -> Iterator[bytes]:
    block = random.Random(7).randbytes(MIB)
    for number in range(count // MIB):
        yield number.to_bytes(8, "big") + block[8:]


def digest(count: int) -> str:
    sha = hashlib.sha256()
    for piece in content(count):
        sha.update(piece)
    return sha.hexdigest()


def big(peer: Peer) -> None:
    """``GET /n`` sends n bytes, ``PUT /n`` answers with the sum of n bytes; /slow-n waits to read."""
    while (head := peer.read_head()) is not None:
        kind, _, size = head.target.decode().strip("/").rpartition("-")
        if head.method == b"GET":
            peer.sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % int(size))
            for piece in content(int(size)):
                peer.sock.sendall(piece)
            continue
        if kind == "slow":
            may_read.wait(LONG)
        peer.sendall(respond(sum_of(peer.sock, int(size)).encode()))


may_read = threading.Event()


def sum_of(sock: socket.socket, count: int) -> str:
    sha, buffer = hashlib.sha256(), bytearray(MIB)
    while count:
        size = sock.recv_into(buffer, min(count, MIB))
        assert size, f"{count} bytes are missing"
        sha.update(memoryview(buffer)[:size])
        count -= size
    return sha.hexdigest()


def download(server: ServerProcess, count: int) -> None:
    with connect(server.proxy_port, timeout=LONG) as visitor:
        visitor.sendall(request("demo", f"/x-{count}"))
        assert read_head(visitor).status == 200
        assert sum_of(visitor, count) == digest(count)


def upload(server: ServerProcess, count: int, kind: str = "x") -> None:
    with connect(server.proxy_port, timeout=LONG) as visitor:
        visitor.sendall(request("demo", f"/{kind}-{count}", b"Content-Length: %d" % count, method=b"PUT"))
        for piece in content(count):
            visitor.sendall(piece)
        assert read_response(visitor).body.decode() == digest(count)


def all_busy(job: Callable[[ServerProcess, int], None], server: ServerProcess) -> None:
    with ThreadPoolExecutor(BUSY) as pool:
        for future in [pool.submit(job, server, 4 * MIB) for _ in range(BUSY)]:
            future.result(LONG)


def download_stalled(server: ServerProcess, look: Callable[[], None]) -> None:
    with connect(server.proxy_port, timeout=LONG) as stalled:
        stalled.sendall(request("demo", f"/x-{BODY}"))
        assert read_head(stalled).status == 200
        sha, pieces = hashlib.sha256(), content(BODY)
        for _ in range(8):  # fast at first, so that its window has grown
            piece = next(pieces)
            got = read_exactly(stalled, len(piece))
            assert got == piece
            sha.update(got)
        for _ in range(2):
            all_busy(download, server)
            look()
        for piece in pieces:
            assert read_exactly(stalled, len(piece)) == piece


def upload_stalled(server: ServerProcess, look: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        stalled = pool.submit(upload, server, BODY, "slow")
        try:
            for _ in range(2):
                all_busy(upload, server)
                look()
            assert not stalled.done()
        finally:
            may_read.set()
        stalled.result(LONG)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        size = sock.recv_into(view)
        assert size, f"{len(view)} bytes are missing"
        view = view[size:]
    return bytes(data)


# -- leaks --------------------------------------------------------------------


@scenario
def nothing_is_left_behind() -> None:
    """In a process of its own, whose descriptors and greenlets nobody else uses."""
    code = "import test_resilience; test_resilience.probe()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    assert after["fds"] <= before["fds"] + 5, (before, after)
    assert after["greenlets"] <= before["greenlets"], (before, after)
    assert after["ports"] == before["ports"], (before, after)


VISITORS = 1000
CYCLES = 50


def probe() -> None:
    """Opens, closes and aborts; prints what the process held before and after."""
    with TunnelServer(**LOOPBACK) as server, Service(page) as service:

        def tunnel(kind: str) -> Tunnel:
            return Tunnel(service.target, kind=kind, server=server.url, proxy="", subdomain=name_for(kind))

        def cycle(kind: str) -> None:
            with tunnel(kind) as opened:
                port = server.proxy_port if kind == "http" else int(opened.url.rpartition(":")[2])
                assert get(port).status == 200

        with tunnel("http"), tunnel("tcp") as tcp:
            ports = (server.proxy_port, int(tcp.url.rpartition(":")[2]))
            for number in range(50):
                abort(ports[number % 2], number)
            service.peers.clear()
            before = settle(server, held)
            for number in range(VISITORS):
                abort(ports[number % 2], number)
                if number % 100 == 0:
                    assert get(server.proxy_port).status == 200
                    service.peers.clear()
            after = settle(server, lambda: held_at_most(before))
        for number in range(CYCLES):
            cycle(("http", "tcp")[number % 2])
            service.peers.clear()
        with tunnel("http"), tunnel("tcp"):
            after = settle(server, lambda: held_at_most(before))
    print(json.dumps([before, after]))


def page(peer: Peer) -> None:
    """Answers every whole request; a visitor may leave inside one."""
    while peer.until(b"\r\n\r\n").endswith(b"\r\n\r\n"):
        peer.sendall(respond(b"x" * 100_000))


def name_for(kind: str) -> str | None:
    return "demo" if kind == "http" else None


def abort(port: int, number: int) -> None:
    """A visitor who leaves: at once, in the middle of his request, or in the middle of his answer."""
    try:
        visitor = connect(port)
    except OSError:
        return
    try:
        if number % 4 == 1:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: demo.loc")
        elif number % 4 >= 2:
            visitor.sendall(request())
        if number % 8 >= 6:
            visitor.recv(1000)
    except OSError:
        pass
    if number % 3:
        reset(visitor)
    else:
        visitor.close()


def held() -> dict[str, int]:
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    return {"fds": fd_count(), "greenlets": greenlet_count(), "ports": len(listening)}


def held_at_most(before: dict[str, int]) -> dict[str, int]:
    """What is held, as soon as it is no more than before; at the latest at the deadline."""
    until = time.monotonic() + DEADLINE
    while True:
        now = held()
        if all(now[what] <= before[what] for what in now) or time.monotonic() > until:
            return now
        time.sleep(0.1)


def settle(server: TunnelServer, look: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Looks when nothing runs and the pools have let their idle streams go."""
    eventually(lambda: not server.core.busy)
    eventually(lambda: all(not s.stream_count for t in server.registry.listed() for s in t.sessions))
    return look()


# -- the tests ----------------------------------------------------------------


def test_a_killed_client_has_its_name_again_at_once(running: Running) -> None:
    running["a_killed_client_has_its_name_again_at_once"].result(LONG)


def test_a_killed_server_gets_its_tunnels_back(running: Running) -> None:
    running["a_killed_server_gets_its_tunnels_back"].result(LONG)


def test_a_stopped_client_loses_its_name_in_time_and_gets_it_back(running: Running) -> None:
    running["a_stopped_client_loses_its_name_in_time_and_gets_it_back"].result(LONG)


def test_a_stopped_server_is_noticed_by_its_client(running: Running) -> None:
    running["a_stopped_server_is_noticed_by_its_client"].result(LONG)


def test_a_dead_link_is_noticed_by_both_sides_and_survived(running: Running) -> None:
    running["a_dead_link_is_noticed_by_both_sides_and_survived"].result(LONG)


def test_a_slow_line_full_of_bulk_is_not_dead(running: Running) -> None:
    running["a_slow_line_full_of_bulk_is_not_dead"].result(LONG)


def test_a_stalled_download_beside_busy_ones(running: Running) -> None:
    running["a_stalled_download_beside_busy_ones"].result(LONG)


def test_a_stalled_upload_beside_busy_ones(running: Running) -> None:
    running["a_stalled_upload_beside_busy_ones"].result(LONG)


def test_nothing_is_left_behind(running: Running) -> None:
    running["nothing_is_left_behind"].result(LONG)
