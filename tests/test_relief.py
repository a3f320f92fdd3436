"""Small services behind a tunnel: resting streams do not keep fresh ones waiting.

That they would keep them for ever is part of each test: streams rest for an hour here.
"""

from __future__ import annotations

import http.server
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gevent
import pytest
from conftest import OpenTunnel, StartService
from support import DEADLINE, Peer, connect, eventually, get, read_response, request, respond
from test_pool import make_pool, turns

from tinytun_gevent import TunnelServer
from tinytun_gevent.server import pool as pool_module
from tinytun_gevent.server import starvation
from tinytun_gevent.wire.keep_alive import KeepAlive

HOUR = 3600.0


@pytest.fixture
def long_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "IDLE_LIFE", HOUR)
    monkeypatch.setattr(pool_module, "FRESH_LIFE", HOUR)


# -- by hand ---------------------------------------------------------------------------------------


def test_a_resting_stream_ends_for_a_fresh_one_that_waits(long_rest: None) -> None:
    pool, _ = make_pool(10)
    first, second = pool.acquire(), pool.acquire()
    first.answer(pool)
    pool.release(first)
    with gevent.Timeout(DEADLINE):
        while not first.local_ended:
            gevent.sleep(0.001)
    second.answer(pool)


def test_a_stream_that_is_given_back_while_another_waits_long_does_not_rest(
    long_rest: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starvation, "PATIENCE", 0.0)
    pool, _ = make_pool(10)
    used = [pool.acquire() for _ in range(3)]
    for stream in used:
        stream.answer(pool)
    pool.acquire(), pool.acquire()
    for stream in used:
        pool.release(stream)
    assert [stream.local_ended for stream in used] == [True, True, False], "two wait"


def test_one_that_has_waited_long_makes_no_later_one_wait(
    long_rest: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long poll, for which a stream has ended in vain."""
    monkeypatch.setattr(starvation, "REPEAT", HOUR)
    pool, _ = make_pool(10)
    first, second = pool.acquire(), pool.acquire()
    pool.acquire()
    for stream in (first, second):
        stream.answer(pool)
        pool.release(stream, owner=stream, shared=False)
    with gevent.Timeout(DEADLINE):
        while not first.local_ended:
            gevent.sleep(0.001)
    assert not second.local_ended
    pool.acquire()
    with gevent.Timeout(DEADLINE):
        while not second.local_ended:
            gevent.sleep(0.001)


def test_a_login_does_not_end_for_others(long_rest: None) -> None:
    pool, _ = make_pool(10)
    login, kept, fresh = (pool.acquire() for _ in range(3))
    for stream in (login, kept):
        stream.answer(pool)
    pool.acquire()
    pool.release(login, owner="ann", shared=False, login=True)
    pool.release(kept, owner="ben", shared=False)
    with gevent.Timeout(DEADLINE):
        while not kept.local_ended:
            gevent.sleep(0.001)
    assert not login.local_ended
    assert pool.acquire(reuse=True, owner="ann") is login
    fresh.reset()


@pytest.mark.parametrize(
    ("timeout", "life"), [(None, 4.0), (60, 4.0), (5, 4.0), (4, 3.0), (2, 1.0), (1, None), (0, None)]
)
def test_a_service_s_timeout_is_kept(timeout: int | None, life: float | None) -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream, promise=KeepAlive(timeout))
    if life is None:
        assert stream.local_ended
    else:
        assert stream.receiver.until - stream.receiver.since == pytest.approx(life)


def test_a_stream_beyond_its_time_is_not_used_again() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    pool.release(stream)
    turns()
    stream.receiver.until = 0.0
    assert pool.acquire(reuse=True) is not stream


@pytest.mark.parametrize(
    ("said", "uses"),
    [
        ([3, 2, 1, 0], 4),  # counted down, as Apache does
        ([2, 2, 2, 2], 3),  # as cpp-httplib does
        ([2, None, None, None], 3),
        ([None, 1, 9], 3),
        ([0], 1),
    ],
)
def test_a_service_s_number_of_requests_is_kept(said: list[int | None], uses: int) -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    used = 1
    for limit in said:
        pool.release(stream, promise=None if limit is None else KeepAlive(max=limit))
        turns()
        if pool.acquire(reuse=True) is not stream:
            break
        used += 1
    assert used == uses


# -- end to end ------------------------------------------------------------------------------------


class OneByOne(http.server.BaseHTTPRequestHandler):
    """Keeps its connection, and with it its thread, until the other side ends it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Pooled(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """A server with so many threads, as cpp-httplib is one."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads)
        super().__init__(("127.0.0.1", 0), OneByOne)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.threads.submit(self.process_request_thread, request, client_address)


@pytest.fixture(params=[1, 8])
def small_service(request: pytest.FixtureRequest) -> Iterator[int]:
    """The port of a service with one or eight threads."""
    with Pooled(request.param) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield service.server_address[1]
        service.shutdown()
        service.threads.shutdown(wait=False, cancel_futures=True)


def ask_at_once(port: int, requests: list[bytes]) -> list[int]:
    """The statuses of the answers to requests on connections of their own, which stay open until all came."""
    socks = [connect(port, timeout=6 * DEADLINE) for _ in requests]
    try:
        for sock, data in zip(socks, requests, strict=True):
            sock.sendall(data)
        return [read_response(sock).status for sock in socks]
    finally:
        for sock in socks:
            sock.close()


def test_many_at_once_are_answered_by_a_small_service(
    server: TunnelServer, open_tunnel: OpenTunnel, small_service: int, long_rest: None
) -> None:
    open_tunnel(small_service)
    for count in (6, 30):
        assert ask_at_once(server.proxy_port, [request()] * count) == [200] * count


def test_streams_that_are_kept_for_their_visitors_starve_nobody(
    server: TunnelServer, open_tunnel: OpenTunnel, small_service: int, long_rest: None
) -> None:
    """After a body they rest for one visitor, who keeps the connection and asks no more."""
    open_tunnel(small_service)
    posts = [request(method=b"POST", body=b"body")] * 20
    assert ask_at_once(server.proxy_port, posts) == [200] * 20


def test_a_post_takes_the_place_of_a_stream_that_rested_too_long(
    server: TunnelServer,
    open_tunnel: OpenTunnel,
    start_service: StartService,
    long_rest: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(starvation, "PATIENCE", HOUR)
    monkeypatch.setattr(pool_module, "FRESH_LIFE", 0.0)
    turn = threading.Lock()

    def script(peer: Peer) -> None:
        with turn:
            while peer.read_request() is not None:
                peer.sendall(respond())

    service = start_service(script)
    open_tunnel(service)
    for _ in range(3):
        assert get(server.proxy_port).status == 200
        assert get(server.proxy_port, method=b"POST", body=b"x").status == 200


def test_a_small_service_gets_no_resting_streams_for_a_while(
    server: TunnelServer,
    open_tunnel: OpenTunnel,
    start_service: StartService,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_LIFE", HOUR)
    monkeypatch.setattr(starvation, "CAUSE", HOUR)  # however slow the machine is
    turn = threading.Lock()

    def script(peer: Peer) -> None:
        with turn:
            while peer.read_request() is not None:
                peer.sendall(respond())

    service = start_service(script)
    open_tunnel(service)
    assert ask_at_once(server.proxy_port, [request()] * 6) == [200] * 6
    pool = server.registry.tunnels["demo"].pool
    eventually(lambda: pool.idle_count == 0)
    before = len(service.peers)
    for _ in range(3):
        assert get(server.proxy_port).status == 200
        assert pool.idle_count == 0
    assert len(service.peers) == before + 3
