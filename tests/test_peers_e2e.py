"""Three real servers that know each other: visitors of every kind, forwarded to where the tunnel is."""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import OpenTunnel, StartService
from free_ports import free_ports
from helpers import MIB
from server_process import ServerProcess, environment
from support import (
    DEADLINE,
    Peer,
    Request,
    Source,
    answering,
    eventually,
    read_head,
    read_response,
    request,
    reset,
    respond,
)

from tinytun_gevent import Tunnel
from tinytun_gevent.server.addresses import is_local
from tinytun_gevent.wire.proxyproto import build_v2

OUTSIDE = "127.0.0.2"
"""Where visitors and the load balancer are: all three servers are at 127.0.0.1, and so would be peers."""

pytestmark = pytest.mark.skipif(not is_local(OUTSIDE), reason=f"{OUTSIDE} is no address of this machine")


PATIENT = str(Path(__file__).parent / "patient")
"""Where there is a ``sitecustomize.py`` that makes a server more patient with its peers."""


class Cluster:
    """Three servers, each with the others for peers."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        ports = free_ports(12)
        self._quads = [ports[start : start + 4] for start in (0, 4, 8)]
        self.servers = [self._start(number) for number in range(3)]

    def _start(self, number: int) -> ServerProcess:
        peers = [f"127.0.0.1:{meta}:{http}:{tcp}" for meta, http, tcp, _ in self._quads]
        meta, http, tcp, connection = map(str, self._quads[number])
        return ServerProcess(
            environ=environment(
                METADATA_PORT=meta,
                PROXY_PORT=http,
                TCP_PROXY_PORT=tcp,
                CONNECTION_PORT=connection,
                PEERS=",".join(peers),
                TRUSTED_PROXIES=OUTSIDE,
                TCP_PORTS="20000-32000",
                TCP_LISTEN="off",
                PYTHONPATH=PATIENT,
            )
        )

    def __enter__(self) -> list[ServerProcess]:
        for attempt in range(3):  # another program may have taken a port meanwhile
            try:
                return [server.wait_serving() for server in self.servers]
            except AssertionError:
                self.__exit__()
                if attempt == 2 or not any("in use" in server.log() for server in self.servers):
                    raise
                self._begin()
        raise AssertionError

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            for pid in server.workers() if server.process.poll() is None else []:
                os.kill(pid, signal.SIGCONT)
            server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[ServerProcess]]:
    with Cluster() as servers:
        yield servers


def connect(port: int, timeout: float = DEADLINE) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout, source_address=(OUTSIDE, 0))


def get(server: ServerProcess, name: str, *fields: bytes, method: bytes = b"GET") -> tuple[int, bytes]:
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request(name, "/", *fields, method=method))
        answer = read_response(visitor, method)
        return answer.status, answer.body


def told(got: Request) -> bytes:
    """What the service was told, as JSON."""
    fields = {key.decode().lower(): value.decode() for key, value in got.fields}
    return respond(json.dumps({"start": got.start.decode(), "fields": fields}).encode())


# -- HTTP ---------------------------------------------------------------------


def test_one_connection_reaches_tunnels_at_all_three(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    names = ("one", "two", "three")
    for name, server in zip(names, cluster, strict=True):
        body = name.encode()
        open_tunnel(start_service(answering(lambda _, body=body: respond(body))), name, server=server)
    for server in cluster:
        with connect(server.proxy_port) as visitor:
            order = random.Random(5).choices(names, k=60)
            for start in range(0, 60, 10):  # ten pipelined requests at a time
                visitor.sendall(b"".join(request(name) for name in order[start : start + 10]))
                for name in order[start : start + 10]:
                    assert read_response(visitor).body == name.encode()


def test_the_service_is_told_of_the_visitor_and_not_of_the_hop(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(told)), server=cluster[0])
    for server in cluster:
        _, body = get(server, "demo", b"Accept-Language: de", b"Connection: keep-alive, X-Mine", b"X-Mine: 1")
        seen = json.loads(body)["fields"]
        assert seen["host"] == "demo.localhost"
        assert seen["x-forwarded-for"] == OUTSIDE
        assert seen["x-forwarded-host"] == "demo.localhost"
        assert seen["x-forwarded-port"] == str(server.proxy_port)
        assert seen["accept-language"] == "de"
        assert "x-mine" not in seen
        assert "x-tinytun-hop" not in seen


def test_a_hop_mark_of_a_visitor_means_nothing(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(), server=cluster[0])
    assert get(cluster[1], "demo", b"X-Tinytun-Hop: 1") == (200, b"ok")


def test_the_host_header_of_a_tunnel_is_set_by_the_server_that_has_it(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(told)), server=cluster[0], host_header="localhost:3000")
    for server in cluster:
        assert json.loads(get(server, "demo")[1])["fields"]["host"] == "localhost:3000"


def test_urls_are_rewritten_once_by_the_server_that_has_the_tunnel(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def answer(got: Request) -> bytes:
        return respond(told(got).partition(b"\r\n\r\n")[2], b"Location: http://localhost:3000/done")

    open_tunnel(start_service(answering(answer)), server=cluster[0], host_header="localhost:3000")
    for server in cluster:
        with connect(server.proxy_port) as visitor:
            own = b"Origin: https://demo.localhost", b"Referer: https://demo.localhost/form"
            forwarded = b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https"
            visitor.sendall(request("demo", "/", *own, *forwarded))
            got = read_response(visitor)
        fields = json.loads(got.body)["fields"]
        assert fields["origin"] == "http://localhost:3000"
        assert fields["referer"] == "http://localhost:3000/form"
        assert fields["x-forwarded-host"] == "demo.localhost"
        assert got.get(b"location") == b"https://demo.localhost/done"


def test_megabytes_both_ways_through_a_peer(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    block = random.Random(1).randbytes(16 * MIB)

    def serve(peer: Peer) -> None:
        head = peer.read_head()
        assert head is not None
        got = hashlib.sha256()
        left = len(block)
        while left:
            piece = peer.sock.recv(min(left, 65536))
            assert piece
            got.update(piece)
            left -= len(piece)
        peer.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n")
        for start in range(0, len(block), 100_000):
            piece = block[start : start + 100_000]
            peer.sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        peer.sendall(b"0\r\nx-sum: %b\r\n\r\n" % got.hexdigest().encode())

    open_tunnel(start_service(serve), server=cluster[0])
    with connect(cluster[2].proxy_port, timeout=60) as visitor:
        visitor.sendall(request("demo", "/", b"Content-Length: %d" % len(block), method=b"POST"))
        sender = threading.Thread(target=visitor.sendall, args=(block,))
        sender.start()
        answer = read_head(visitor)
        body = Source(visitor)
        sha = hashlib.sha256()
        while size := int(body.until(b"\r\n"), 16):
            sha.update(body.exactly(size))
            assert body.exactly(2) == b"\r\n"
        trailers = body.until(b"\r\n\r\n")
        sender.join()
    assert answer.status == 200
    assert sha.digest() == hashlib.sha256(block).digest()
    assert trailers == b"x-sum: %b\r\n\r\n" % hashlib.sha256(block).hexdigest().encode()


@pytest.mark.parametrize("method", [b"HEAD", b"DELETE"])
def test_answers_without_a_body_leave_the_connection_in_order(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel, method: bytes
) -> None:
    def answer(got: Request) -> bytes:
        if got.method == b"HEAD":
            return b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        return b"HTTP/1.1 204 No Content\r\n\r\n" if got.method == b"DELETE" else respond()

    open_tunnel(start_service(answering(answer)), server=cluster[0])
    with connect(cluster[1].proxy_port) as visitor:
        for _ in range(3):
            visitor.sendall(request(method=method) + request())
            assert read_response(visitor, method).status in (200, 204)
            assert read_response(visitor).body == b"ok"


def test_events_arrive_as_they_are_sent(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    seen = threading.Semaphore(0)

    def stream(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        for number in range(10):
            peer.sendall(b"data: %d\n\n" % number)
            assert seen.acquire(timeout=DEADLINE), "the event before was not seen"

    open_tunnel(start_service(stream), server=cluster[0])
    with connect(cluster[1].proxy_port) as visitor:
        visitor.sendall(request())
        read_head(visitor)
        source = Source(visitor)
        for number in range(10):
            assert b"data: %d" % number in source.until(b"\n\n")
            seen.release()


def test_an_upgraded_connection_goes_through(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def upgrade(peer: Peer) -> None:
        head = peer.read_head()
        assert head is not None
        assert head.get(b"upgrade") == b"echo"
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: upgrade\r\n\r\nhello")
        while data := peer.sock.recv(65536):
            peer.sock.sendall(data)

    open_tunnel(start_service(upgrade), server=cluster[0])
    with connect(cluster[1].proxy_port) as visitor:
        visitor.sendall(request("demo", "/", b"Upgrade: echo", b"Connection: upgrade"))
        assert read_head(visitor).status == 101
        source = Source(visitor)
        assert source.exactly(5) == b"hello"
        for piece in (b"x", b"y" * 100_000):
            visitor.sendall(piece)
            assert source.exactly(len(piece)) == piece
        visitor.shutdown(socket.SHUT_WR)
        assert source.rest() == b""


def test_a_visitor_who_leaves_is_noticed_at_the_far_end(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def pour(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            peer.sendall(bytes(65536))

    service = start_service(pour)
    open_tunnel(service, server=cluster[0])
    visitor = connect(cluster[1].proxy_port)
    visitor.sendall(request())
    read_head(visitor)
    reset(visitor)
    assert service.wait_peer().ended.wait(DEADLINE)


def test_failures_behind_a_peer_are_answers(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service, server=cluster[0])
    service.stop_listening()
    assert get(cluster[1], "demo")[0] == 502
    assert get(cluster[1], "nobody")[0] == 404


# -- TCP ----------------------------------------------------------------------


def echo(peer: Peer) -> None:
    while data := peer.sock.recv(65536):
        peer.sock.sendall(data)


def header(tunnel: Tunnel) -> bytes:
    port = int(tunnel.url.rpartition(":")[2])
    return build_v2(("203.0.113.7", 4711), ("198.51.100.1", port))


def test_tcp_goes_to_the_peer_that_has_the_port(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    tunnel = open_tunnel(start_service(echo), server=cluster[0], kind="tcp")
    payload = random.Random(2).randbytes(4 * MIB)
    for server in cluster:
        with connect(server.tcp_proxy_port, timeout=60) as balancer:
            balancer.sendall(header(tunnel) + b"early")
            source = Source(balancer)
            assert source.exactly(5) == b"early"
            sender = threading.Thread(target=balancer.sendall, args=(payload,))
            sender.start()
            assert source.exactly(len(payload)) == payload
            sender.join()
            balancer.shutdown(socket.SHUT_WR)
            assert source.rest() == b""


def test_tcp_services_that_speak_first_half_close_and_resets_travel_through_a_peer(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    clean: list[bool] = []

    def script(peer: Peer) -> None:
        peer.sendall(b"220 ready\r\n")
        order = peer.until(b"\n")
        if order == b"sum\n":
            peer.sendall(hashlib.sha256(peer.rest()).digest())
        elif order == b"reset\n":
            peer.reset()
        else:
            listening.set()
            clean.append(peer.wait_end())

    listening = threading.Event()
    tunnel = open_tunnel(start_service(script), server=cluster[0], kind="tcp")
    port = cluster[1].tcp_proxy_port
    with connect(port) as balancer:
        balancer.sendall(header(tunnel))
        source = Source(balancer)
        assert source.until(b"\r\n") == b"220 ready\r\n"
        balancer.sendall(b"sum\nall of it")
        balancer.shutdown(socket.SHUT_WR)
        assert source.rest() == hashlib.sha256(b"all of it").digest()
    with connect(port) as balancer:
        balancer.sendall(header(tunnel) + b"reset\n")
        with pytest.raises(ConnectionResetError):
            Source(balancer).rest()
    balancer = connect(port)
    balancer.sendall(header(tunnel))
    Source(balancer).until(b"\r\n")
    balancer.sendall(b"listen\n")
    assert listening.wait(DEADLINE)
    reset(balancer)
    eventually(lambda: clean == [False])


def test_a_port_that_nobody_has_is_a_reset(cluster: list[ServerProcess]) -> None:
    for server in cluster:
        with connect(server.tcp_proxy_port) as balancer:
            balancer.sendall(build_v2(("203.0.113.7", 4711), ("198.51.100.1", 20001)))
            with pytest.raises(ConnectionResetError):
                Source(balancer).rest()


def test_what_a_peer_sends_is_not_sent_on(
    cluster: list[ServerProcess], start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """So two servers that each believe the other to have a tunnel send nobody in circles."""
    tcp = open_tunnel(start_service(echo), server=cluster[0], kind="tcp")
    open_tunnel(start_service(), server=cluster[0])
    for server in cluster[1:]:
        assert get(server, "demo") == (200, b"ok")
        with socket.create_connection(("127.0.0.1", server.tcp_proxy_port), DEADLINE) as peer:
            peer.sendall(header(tcp))
            with pytest.raises(ConnectionResetError):
                Source(peer).rest()
        with socket.create_connection(("127.0.0.1", server.proxy_port), DEADLINE) as peer:
            peer.sendall(request("demo", "/", b"X-Tinytun-Hop: 1"))
            assert read_response(peer).status == 404


# -- peers that fail ----------------------------------------------------------


def test_a_silent_peer_and_a_dead_one_hide_nobody(
    start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """The third server is stopped, then killed; what the others have is served all the time.

    How soon is measured by ``benchmarks/faults``.
    """
    with Cluster() as servers:
        first, second, third = servers
        open_tunnel(start_service(), "one", server=first)
        tcp = open_tunnel(start_service(echo), server=first, kind="tcp")
        os.kill(third.worker(), signal.SIGSTOP)
        visit_all(first, second, tcp)
        worker = third.worker()
        os.kill(third.process.pid, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        visit_all(first, second, tcp)


def test_a_peer_that_freezes_after_it_was_asked_is_given_up(
    start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """What is remembered of it is still fresh, so the request is on its way to it."""
    with Cluster() as servers:
        first, _, third = servers
        open_tunnel(start_service(), "one", server=third)
        slow = open_slow(start_service, open_tunnel, third)
        assert get(first, "one") == (200, b"ok")
        assert get(first, "slow") == (200, b"late")  # its server says that it lives
        slow.set()
        os.kill(third.worker(), signal.SIGSTOP)
        try:
            assert get(first, "one")[0] == 503  # long before the 300 s that an answer may take
        finally:
            os.kill(third.worker(), signal.SIGCONT)


def open_slow(start_service: StartService, open_tunnel: OpenTunnel, server: ServerProcess) -> threading.Event:
    """A service that takes longer than a peer has for a sign of life, until the event is set."""
    hurry = threading.Event()

    def late(peer: Peer) -> None:
        peer.until(b"\r\n\r\n")
        hurry.wait(1.5)
        peer.sendall(respond(b"late"))

    open_tunnel(start_service(late), "slow", server=server)
    return hurry


def visit_all(first: ServerProcess, second: ServerProcess, tcp: Tunnel) -> None:
    """Some answers, some from a cache and some not; four visitors at once."""

    def visit(number: int) -> None:
        for _ in range(5):
            if number == 0:
                assert get(second, "one") == (200, b"ok")
            elif number == 1:
                assert get(first, "one") == (200, b"ok")
            elif number == 2:
                assert get(second, f"nobody-{secrets.token_hex(4)}")[0] == 404
            else:
                with connect(second.tcp_proxy_port) as balancer:
                    balancer.sendall(header(tcp) + b"hi")
                    assert Source(balancer).exactly(2) == b"hi"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(visit, range(4)))


def test_a_peer_that_comes_back_is_found_again(start_service: StartService, open_tunnel: OpenTunnel) -> None:
    with Cluster() as servers:
        open_tunnel(start_service(), server=servers[2])
        assert get(servers[0], "demo") == (200, b"ok")
        worker = servers[2].worker()
        os.kill(worker, signal.SIGKILL)  # the master starts another, the client comes back to it
        eventually(lambda: get(servers[0], "demo") == (200, b"ok"), what="the tunnel at the new worker")
        assert get(servers[1], "demo") == (200, b"ok")
