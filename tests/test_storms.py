"""Visitors who abort by the thousand, who sit there, who come slowly: what is left, what others notice.

The numbers are small here; `benchmarks/faults` has the full ones, by the same functions, and how long others
wait.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from helpers import Process, fd_count, greenlet_count
from server_process import ServerProcess
from storms import abort_many, drip, idle, ordinary, slow_heads
from support import Peer, Service, answering, connect, eventually, get, request, reset, respond

from tinytun_gevent.server import pool
from tinytun_gevent.server.edge import Edge
from tinytun_gevent.session import Session
from tinytun_gevent.stream import Stream

ABORTS = 1200
LIMIT = 20
"""The tunnel's concurrency: fewer streams than a storm could use."""


@contextmanager
def in_thread(function: object, *args: object) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=function, args=args)  # type: ignore[arg-type]
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


def page(peer: Peer) -> None:
    """Answers every whole request; a visitor may leave inside one."""
    while (head := peer.until(b"\r\n\r\n")).endswith(b"\r\n\r\n"):
        if head.startswith(b"POST"):
            peer.exactly(1000)
        peer.sendall(respond(b"x" * 10_000))


def test_aborted_visitors_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
) -> None:
    monkeypatch.setattr(pool, "IDLE_LIFE", 0.2)
    most = 0
    add = Session.add

    def counting(session: Session, *args: object) -> Stream:
        nonlocal most
        stream = add(session, *args)  # type: ignore[arg-type]
        most = max(most, session.stream_count)
        return stream

    monkeypatch.setattr(Session, "add", counting)
    server, service = start_server(), start_service(page)
    tunnels = [
        open_tunnel(service, server=server, concurrency=LIMIT),
        open_tunnel(service, server=server, kind="tcp", concurrency=LIMIT),
    ]
    ports = [server.proxy_port, int(tunnels[1].url.rpartition(":")[2])]
    front = next(front for front in server.core.fronts if isinstance(front, Edge))

    def quiet() -> bool:
        streams = sum(s.stream_count for t in server.registry.listed() for s in t.sessions)
        return not (server.core.busy or front.visitors or streams)

    abort_many(ports, 60)
    eventually(quiet)
    service.peers.clear()
    sessions = [s for t in server.registry.listed() for s in t.sessions]
    fds, greenlets = fd_count(), greenlet_count()
    abort_many(ports, ABORTS)
    assert get(server.proxy_port).status == 200
    eventually(quiet)
    service.peers.clear()
    eventually(lambda: fd_count() <= fds + 5, what="descriptors")
    eventually(lambda: greenlet_count() <= greenlets, what="greenlets")
    assert sessions == [s for t in server.registry.listed() for s in t.sessions]
    assert not any(session.closing for session in sessions)
    assert 0 < most <= LIMIT


def test_a_visitor_who_has_left_opens_no_stream(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Not when his turn comes either: the service does not hear of him, and nothing is reset for him."""
    go_on = threading.Event()

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            if got.target == b"/slow":
                go_on.wait(60)
            peer.sendall(respond(got.target))

    server, service = start_server(), start_service(script)
    open_tunnel(service, server=server, concurrency=1)
    (tunnel,) = server.registry.listed()
    (session,) = tunnel.sessions
    with in_thread(get, server.proxy_port, "demo", "/slow"):
        eventually(lambda: service.peers and service.peers[0].requests)
        visitors = [connect(server.proxy_port) for _ in range(30)]
        for visitor in visitors:
            visitor.sendall(request("demo", "/gone"))
        eventually(lambda: tunnel.pool.waiting_count == len(visitors))
        for visitor in visitors:
            reset(visitor)
        go_on.set()
    assert get(server.proxy_port, target="/next").body == b"/next"
    eventually(lambda: not server.core.busy)
    assert [got.target for got in service.requests] == [b"/slow", b"/next"]
    assert session.streams_opened == 1


def test_an_ordinary_visitor_is_served_beside_a_storm() -> None:
    with ServerProcess().wait_serving() as server, Service(page) as service:
        process = Process("tinytun", "http", service.target, "-s", "demo", "--server", server.url)
        try:
            process.wait_line("http://demo\\.", stderr=False)
            ordinary(server.proxy_port, 20)
            with (
                idle(server.proxy_port, 50) as sitting,
                slow_heads(server.proxy_port, 75) as slow,
                in_thread(abort_many, [server.proxy_port], 750) as storm,
            ):
                ordinary(server.proxy_port, 10)
                while storm.is_alive():
                    ordinary(server.proxy_port, 10)
                    drip(slow)
                assert sitting.still_open() == 50
        finally:
            process.kill()


def test_idle_visitors_cost_little() -> None:
    """In both processes together."""
    count = 600
    with ServerProcess().wait_serving() as server, Service(answering(lambda _: respond())) as service:
        process = Process("tinytun", "http", service.target, "-s", "demo", "--server", server.url)
        try:
            process.wait_line("http://demo\\.", stderr=False)
            with idle(server.proxy_port, 100):  # everything that is made once is made
                pass
            programs = [psutil.Process(process.pid), psutil.Process(server.worker())]
            before = sum(program.memory_info().rss for program in programs)
            with idle(server.proxy_port, count) as crowd:
                grown = sum(program.memory_info().rss for program in programs) - before
                ordinary(server.proxy_port, 10)
                assert crowd.still_open() == count
            assert grown / count < 20 * 1024
        finally:
            process.kill()


def test_slow_heads_and_idle_visitors_are_let_go(
    fast_clock: FastClock, start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server()
    open_tunnel(start_service(), server=server)
    front = next(front for front in server.core.fronts if isinstance(front, Edge))
    with idle(server.proxy_port, 20) as sitting, slow_heads(server.proxy_port, 20) as slow:
        for _ in range(100):
            drip(slow)
            fast_clock.forward(1)
        eventually(lambda: not slow.still_open() and not sitting.still_open())
        for sock in slow.sockets:
            assert sock.recv(12) == b"HTTP/1.1 408"
        assert {sock.recv(1) for sock in sitting.sockets} == {b""}
    eventually(lambda: not front.visitors)
