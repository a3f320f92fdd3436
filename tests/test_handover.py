"""Names, ports and visitors change hands: between two parts of one process, and on a reload for real."""

from __future__ import annotations

import http.client
import os
import signal
import socket as native
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gevent
import pytest
from free_ports import free_tunnel_ports
from gevent import socket
from h2.events import ConnectionTerminated
from helpers import deadline, wait_until
from local_service import LocalService
from raw_client import RawClient
from server_process import DEADLINE, ServerProcess, environment, wait_for
from support import connect, get, read_response, read_rest, request, respond

from tinytun_gevent import Tunnel
from tinytun_gevent.registry import Record
from tinytun_gevent.server import handover
from tinytun_gevent.server.channel import Channel
from tinytun_gevent.server.handover import FILE, Handover, Moved, Successor, take_over
from tinytun_gevent.wire.handshake import Kind
from tinytun_gevent.wire.options import Options, Rewrite

pytestmark = pytest.mark.skipif(os.name != "posix", reason="gunicorn needs POSIX")

MASTER = 1234
RECORDS = [
    Record(Kind.HTTP, "app", "0" * 32, "", True),
    Record(Kind.TCP, 30000, "1" * 32, "somebody", False, source="2001:db8:1:2::/64"),
    Record(Kind.HTTP, "web", "2" * 32, "", True, "local:1", Options(rewrite=Rewrite("http://local:1"))),
]


class OldWorker:
    """Hands over names and ports, and notes what is done with it."""

    def __init__(self, ports: int = 1) -> None:
        self.listeners = [native.create_server(("127.0.0.1", 0)) for _ in range(ports)]
        self.done: list[str] = []
        self.successor: Successor | None = None

    def pause(self) -> tuple[list[Record], dict[int, int]]:
        self.done.append("pause")
        return RECORDS, {sock.getsockname()[1]: sock.fileno() for sock in self.listeners}

    def resume(self) -> None:
        self.done.append("resume")

    def hand_over(self, successor: Successor) -> None:
        self.done.append("hand over")
        self.successor = successor


@pytest.fixture
def old(tmp_path: Path) -> Iterator[OldWorker]:
    worker = OldWorker()
    serving = Handover(tmp_path, MASTER, worker)
    serving.start()
    yield worker
    serving.stop()
    for sock in worker.listeners:
        sock.close()


def test_a_successor_gets_names_ports_and_visitors(old: OldWorker, tmp_path: Path) -> None:
    with deadline():
        predecessor = take_over(tmp_path, MASTER)
        assert predecessor is not None
        assert (predecessor.records, old.done) == (RECORDS, ["pause"])
        ((port, descriptor),) = predecessor.ports.items()
        with native.socket(fileno=descriptor) as listening:
            assert listening.getsockname() == old.listeners[0].getsockname()
            assert port == listening.getsockname()[1]
        predecessor.confirm()
        wait_until(lambda: old.successor is not None)
        assert old.done == ["pause", "hand over"]
        assert old.successor is not None

        here, there = native.socketpair()
        moved = [
            Moved(None, ("192.0.2.1", 5), 443, b"GET / HTTP/1.1\r\n\xff", fresh=True),
            Moved(30000, ("::1", 6), 30000, b""),
            Moved(None, ("192.0.2.1", 7), 443, b"", proto="https", last=True),
        ]
        for one in moved:
            assert old.successor.take(there, one)
        there.close()
        visitors = predecessor.visitors()
        for one in moved:
            sock, came = next(visitors)
            assert came == one
            sock.send(b"x")
            assert here.recv(1) == b"x"
            sock.close()
        assert here.recv(1) == b"", "no copy is left open"
        here.close()


def test_after_half_a_visitor_no_other_one_is_passed_on() -> None:
    """A successor that hangs gets what it was sent whole, and then the end: the others stay."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    successor, there = Successor(Channel(one, 0.05)), Channel(other, 5)
    here, visitor = native.socketpair()
    big = Moved(None, ("192.0.2.1", 5), 443, bytes(100_000))
    with here, visitor, deadline():
        passed = 0
        while successor.take(visitor, big):
            passed += 1
        received = gevent.spawn(lambda: [there.receive() for _ in range(passed)])
        assert not successor.take(visitor, Moved(None, ("192.0.2.1", 5), 443, b""))
        for message in received.get():
            assert message is not None
            os.close(message[1][0])
        with pytest.raises(OSError, match="within a message"):
            there.receive()
        there.close()


def test_more_ports_than_one_message_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "MOST_DESCRIPTORS", 2)
    worker = OldWorker(ports=5)
    serving = Handover(tmp_path, MASTER, worker)
    serving.start()
    with deadline():
        predecessor = take_over(tmp_path, MASTER)
        assert predecessor is not None
        assert set(predecessor.ports) == {sock.getsockname()[1] for sock in worker.listeners}
        for port, descriptor in predecessor.ports.items():
            with native.socket(fileno=descriptor) as sock:
                assert sock.getsockname()[1] == port
    serving.stop()
    for sock in worker.listeners:
        sock.close()


@pytest.mark.parametrize("step", ["before it asks", "before it serves"])
def test_if_the_successor_dies_the_old_one_goes_on(old: OldWorker, tmp_path: Path, step: str) -> None:
    with deadline():
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / FILE))
        channel = Channel(sock, 5)
        if step == "before it serves":
            channel.send({"wants": [handover.VERSION, MASTER]})
            wait_until(lambda: old.done == ["pause"])
        channel.close()
        if step == "before it serves":
            wait_until(lambda: old.done == ["pause", "resume"])
            old.done.clear()
        again = take_over(tmp_path, MASTER)
        assert again is not None
        again.confirm()
        wait_until(lambda: old.done == ["pause", "hand over"])
        for descriptor in again.ports.values():
            os.close(descriptor)


@pytest.mark.parametrize("wants", [[99, MASTER], [handover.VERSION, MASTER + 1], None, "x"])
def test_others_get_nothing(old: OldWorker, tmp_path: Path, wants: object) -> None:
    with deadline():
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / FILE))
        channel = Channel(sock, 5)
        channel.send({"wants": wants})
        assert channel.receive() is None
        channel.close()
        assert old.done == []
        assert take_over(tmp_path, MASTER + 1) is None


def test_a_file_that_a_killed_worker_left_means_nobody(tmp_path: Path) -> None:
    with deadline():
        assert take_over(tmp_path, MASTER) is None
        with native.socket(native.AF_UNIX) as sock:
            sock.bind(str(tmp_path / FILE))
        assert take_over(tmp_path, MASTER) is None
        serving = Handover(tmp_path, MASTER, OldWorker())
        serving.start()
        gevent.idle()
        predecessor = take_over(tmp_path, MASTER)
        assert predecessor is not None
        serving.stop()


def test_a_path_that_is_too_long_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / ("x" * 120)
    directory.mkdir()
    serving = Handover(directory, MASTER, OldWorker())
    serving.start()
    assert "a reload will interrupt visitors" in caplog.text
    serving.stop()


# -- a real server ------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with ServerProcess(environ=environment(TCP_PORTS="20000-32000")) as server:
        yield server.wait_serving()


def reload(server: ServerProcess, count: int = 2) -> None:
    """HUP, until the ``count``-th worker serves."""
    server.process.send_signal(signal.SIGHUP)
    server.wait_serving(count)


def test_no_visitor_notices_reloads(server: ServerProcess) -> None:
    """Some ask on kept connections, which are never closed; others on new ones, of both kinds of tunnel."""
    (port,) = free_tunnel_ports(1)
    stop = threading.Event()
    counts: list[int] = []

    def on_one_connection() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.proxy_port, timeout=DEADLINE)
        connection.connect()
        first, count = connection.sock, 0
        while not stop.is_set():
            connection.request("GET", "/", headers={"Host": "app.localhost"})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            assert connection.sock is first
            count += 1
        counts.append(count)

    def on_new_connections(to: int) -> None:
        count = 0
        while not stop.is_set():
            assert get(to, "app").status == 200
            count += 1
        counts.append(count)

    with (
        LocalService() as service,
        Tunnel(service.port, server=server.url, subdomain="app"),
        Tunnel(service.port, kind="tcp", port=port, server=server.url),
        ThreadPoolExecutor(6) as pool,
    ):
        tasks = [pool.submit(on_one_connection) for _ in range(2)]
        tasks += [pool.submit(on_new_connections, to) for to in (server.proxy_port, port)]
        try:
            for count in (2, 3):
                reload(server, count)
                server.wait_line("tunnel app opened", count)
        finally:
            stop.set()
        for task in tasks:
            task.result(DEADLINE)
        assert all(count > 10 for count in counts)
        wait_for(lambda: len(server.workers()) == 1, "end of the old workers")


def test_a_request_half_read_moves_with_its_visitor(server: ServerProcess) -> None:
    with (
        LocalService() as service,
        Tunnel(service.port, server=server.url, subdomain="app"),
        connect(server.proxy_port) as begun,
        connect(server.proxy_port) as silent,
    ):
        begun.sendall(b"GET / HTTP/1.1\r\nHost: app.loc")
        assert get(server.proxy_port, "app").status == 200
        first = server.worker()
        reload(server)
        wait_for(lambda: first not in server.workers(), "end of the old worker", 5)
        begun.sendall(b"alhost\r\nConnection: close\r\n\r\n")
        assert read_response(begun).status == 200
        silent.sendall(request("app"))
        assert read_response(silent).status == 200


def test_visitors_who_wait_for_a_client_wait_in_the_new_worker(server: ServerProcess) -> None:
    (port,) = free_tunnel_ports(1)
    web = RawClient(server, "app", resume=b"")
    tcp = RawClient(server, port=port, resume=b"")
    for client in (web, tcp):
        client.close()
    server.wait_line("lost, its name is kept", 2)
    with ThreadPoolExecutor(1) as pool, connect(port) as raw:
        asked = pool.submit(get, server.proxy_port, "app", "/x", method=b"POST", body=b"body")
        raw.sendall(b"hello")
        wait_for(lambda: connections(server) >= 2, "visitors in the old worker")
        first = server.worker()
        reload(server)
        wait_for(lambda: first not in server.workers(), "end of the old worker", 5)
        with (
            RawClient(server, "app", resume=web.token) as web,
            RawClient(server, port=port, resume=tcp.token) as tcp,
        ):
            stream_id, head = web.next_request()
            assert head.startswith(b"POST /x HTTP/1.1\r\n")
            web.send(stream_id, respond(b"at last"))
            assert asked.result(DEADLINE).body == b"at last"
            stream_id, data = tcp.next_request_data()
            tcp.send(stream_id, b"welcome, " + data, end=True)
            assert read_rest(raw) == b"welcome, hello"


def test_a_client_without_token_hears_of_a_reload_when_its_visitors_have_their_answers(
    server: ServerProcess,
) -> None:
    """The original's ends at once then, and with it everything that it carries."""
    with RawClient(server, "app") as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(get, server.proxy_port, "app")
        stream_id, _ = client.next_request()
        reload(server)
        assert not [event for event in client.seen() if isinstance(event, ConnectionTerminated)]
        client.send(stream_id, respond(b"as if nothing were"))
        assert asked.result(DEADLINE).body == b"as if nothing were"
        client.next(ConnectionTerminated)
        waiting = pool.submit(get, server.proxy_port, "app")
        with RawClient(server, "app") as again:
            stream_id, _ = again.next_request()
            again.send(stream_id, respond(b"here"))
            assert waiting.result(DEADLINE).body == b"here"


def connections(server: ServerProcess) -> int:
    """Visitors' connections that the worker has accepted."""
    import psutil

    process = psutil.Process(server.worker())
    return len([c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED])


def test_names_outlive_a_killed_worker_and_a_killed_server(server: ServerProcess) -> None:
    client = RawClient(server, "app", resume=b"")
    leases = server.state / "leases.json"
    wait_for(lambda: leases.exists() and b'"app"' in leases.read_bytes(), "lease file")
    os.kill(server.worker(), signal.SIGKILL)
    server.wait_serving(2)
    client.close()
    with connect(server.connection_port) as other:
        other.sendall(b"CONNECT a:1 HTTP/1.1\r\nx-tinytun-subdomain: app\r\n\r\n")
        assert read_response(other).status == 409
    with RawClient(server, "app", resume=client.token) as client:
        server.process.kill()
        server.wait()
    with ServerProcess(environ=environment(STATE_DIR=str(server.state))) as again:
        again.wait_serving()
        with connect(again.connection_port) as other:
            other.sendall(b"CONNECT a:1 HTTP/1.1\r\nx-tinytun-subdomain: app\r\n\r\n")
            assert read_response(other).status == 409
        with RawClient(again, "app", resume=client.token):
            pass
