"""The streams of a tunnel: reuse, age, the queue at the concurrency limit; by hand and end to end."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import gevent
import pytest
from conftest import OpenTunnel, StartServer, StartService
from h2.events import RequestReceived
from raw_client import RawClient
from support import (
    DEADLINE,
    Peer,
    Request,
    answering,
    connect,
    eventually,
    get,
    read_response,
    request,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.errors import SessionClosedError, StreamLimitError
from tinytun_gevent.server import pool as pool_module
from tinytun_gevent.server import resting as resting_module
from tinytun_gevent.server import starvation
from tinytun_gevent.server.pool import StreamPool


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream ends for another one that waits for its answer: that is ``test_relief``'s."""
    monkeypatch.setattr(starvation, "PATIENCE", 3600.0)


class FakeStream:
    """A stream whose other end is the test."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.receiver: Any = None
        self.local_ended = self.remote_ended = self.was_reset = False
        self.rests = 0
        self.credited = 0
        self.received = 0
        self.requests_left: int | None = None

    @property
    def closed(self) -> bool:
        return self.was_reset or (self.local_ended and self.remote_ended)

    def rest(self) -> None:
        self.rests += 1

    def consumed(self, count: int) -> None:
        self.credited += count

    def shutdown(self) -> None:
        self.local_ended = True
        self._over()

    def answer(self, pool: StreamPool) -> None:
        """The first byte of an answer comes."""
        self.received += 1
        pool.answered(cast(Any, self))

    def reset(self, code: int = 8) -> None:
        self.was_reset = True
        if self.receiver is not None:
            self.receiver.aborted(SessionClosedError("reset"))
        self._over()

    def end(self) -> None:
        """The service half-closes."""
        self.remote_ended = True
        if self.receiver is not None:
            self.receiver.eof()
        self._over()

    def _over(self) -> None:
        if self.closed and self in self.session.streams:
            self.session.streams.remove(self)
            if self.session.on_room is not None:
                self.session.on_room(self.session)


class FakeSession:
    """A session with room for ``limit`` streams."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.streams: list[FakeStream] = []
        self.goaway_received = False
        self.round_trip = 0.0
        self.behind = False
        self.on_room: Callable[[FakeSession], None] | None = None

    @property
    def takes_visitors(self) -> bool:
        return not self.goaway_received

    @property
    def has_room(self) -> bool:
        return self.takes_visitors and len(self.streams) < self.limit

    @property
    def stream_count(self) -> int:
        return len(self.streams)

    @property
    def peer_max_streams(self) -> int:
        return self.limit

    def open(self, visitor: str | None = None) -> FakeStream:
        assert self.has_room
        self.streams.append(FakeStream(self))
        return self.streams[-1]


def make_pool(*limits: int, wait: float = DEADLINE) -> tuple[Any, list[FakeSession]]:
    """A pool, typed loosely because its streams are fakes, over sessions with these limits."""
    pool = StreamPool(wait)
    sessions = [FakeSession(limit) for limit in limits]
    for session in sessions:
        pool.add(cast(Any, session))
    return pool, sessions


def give_back(pool: Any, *streams: Any, **options: Any) -> None:
    """Gives streams back after their answers, and waits until they are settled: others may use them."""
    for stream in streams:
        stream.answer(pool)
        pool.release(stream, **options)
    turns()
    while pool._resting.worth_a_turn():
        gevent.sleep(0.001)


def turns() -> None:
    """Lets the event loop go round as often as anything here needs."""
    for _ in range(3):
        gevent.sleep(0.001)


class Queue:
    """Greenlets that ask a pool for streams; ``got`` says who got one, in order."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool
        self.got: list[tuple[object, Any]] = []

    def ask(self, who: object, **options: Any) -> None:
        """Asks in a greenlet of its own, which is in the queue when this returns."""
        before = self.pool.waiting_count
        gevent.spawn(self._ask, who, options)
        gevent.idle()
        assert self.pool.waiting_count == before + 1 or self.got

    def _ask(self, who: object, options: dict[str, Any]) -> None:
        try:
            self.got.append((who, self.pool.acquire(**options)))
        except Exception as error:
            self.got.append((who, error))

    @property
    def served(self) -> list[object]:
        return [who for who, _ in self.got]

    def wait(self, count: int) -> None:
        with gevent.Timeout(DEADLINE):
            while len(self.got) < count:
                gevent.sleep(0.001)


# -- by hand: reuse --------------------------------------------------------------------------------


def test_the_stream_used_last_is_used_first() -> None:
    pool, _ = make_pool(10)
    streams = [pool.acquire() for _ in range(3)]
    give_back(pool, *streams)
    assert pool.idle_count == 3
    assert [pool.acquire(reuse=True) for _ in range(3)] == streams[::-1]


def test_a_new_stream_is_opened_where_none_may_be_reused() -> None:
    pool, [session] = make_pool(10)
    stream = pool.acquire()
    give_back(pool, stream)
    assert pool.acquire(reuse=False) is not stream
    assert pool.acquire(reuse=True) is stream
    assert session.stream_count == 2


def test_a_resting_stream_gives_its_window_back() -> None:
    pool, _ = make_pool(10)
    stream = pool.acquire()
    give_back(pool, stream)
    assert stream.rests == 1


@pytest.mark.parametrize("how", ["ended", "reset", "goaway"])
def test_a_stream_that_is_over_is_not_kept(how: str) -> None:
    pool, [session] = make_pool(10)
    stream = pool.acquire()
    if how == "ended":
        stream.end()
    elif how == "reset":
        stream.reset()
    else:
        session.goaway_received = True
    give_back(pool, stream)
    assert pool.idle_count == 0
    assert stream.local_ended or stream.was_reset


@pytest.mark.parametrize("how", ["end", "reset", "data"])
def test_an_idle_stream_on_which_something_happens_is_dropped(how: str) -> None:
    pool, [session] = make_pool(10)
    stream = pool.acquire()
    give_back(pool, stream)
    if how == "data":
        stream.receiver.data(memoryview(b"unasked"))
    else:
        getattr(stream, how)()
    assert pool.idle_count == 0
    assert session.streams == []
    assert pool.acquire(reuse=True) is not stream


def test_what_must_not_be_repeated_gets_a_stream_used_within_the_last_second() -> None:
    pool, _ = make_pool(10)
    old, young = pool.acquire(), pool.acquire()
    give_back(pool, old)
    give_back(pool, young)
    old.receiver.since -= 2 * pool_module.FRESH_LIFE
    assert pool.acquire(reuse=True, retriable=False) is young
    third = pool.acquire()
    give_back(pool, third)
    third.receiver.since -= 2 * pool_module.FRESH_LIFE
    assert pool.acquire(reuse=True, retriable=True) is third


def test_what_can_use_no_resting_stream_takes_the_place_of_one() -> None:
    """A service with few threads has none for both."""
    pool, [session] = make_pool(10)
    old, older = pool.acquire(), pool.acquire()
    give_back(pool, older)
    give_back(pool, old)
    for stream in (old, older):
        stream.receiver.since -= 2 * pool_module.FRESH_LIFE
    fresh = pool.acquire(reuse=True, retriable=False)
    assert fresh not in (old, older)
    assert older.local_ended
    assert not old.local_ended
    older.end()
    assert session.stream_count == 2


def test_idle_streams_are_ended_by_age_and_then_reset() -> None:
    pool, [session] = make_pool(10)
    old, young = pool.acquire(), pool.acquire()
    give_back(pool, old)
    give_back(pool, young)
    now = time.monotonic()
    old.receiver.until = now
    pool.tick(now)
    assert old.local_ended
    assert not old.was_reset, "the service gets a clean end"
    assert not young.local_ended
    assert pool.idle_count == 1
    old.receiver.data(memoryview(b"late"))
    assert old.credited == 4
    pool.tick(now + resting_module.LAST_GOODBYE + 1)
    assert old.was_reset, "a service that does not close must not hold the place"
    assert old not in session.streams


def test_draining_ends_idle_streams_at_once() -> None:
    pool, [session] = make_pool(10)
    streams = [pool.acquire() for _ in range(3)]
    give_back(pool, *streams)
    pool.end_idle()
    assert pool.idle_count == 0
    assert all(stream.local_ended for stream in streams)
    for stream in streams:
        stream.end()
    assert session.streams == []


def test_a_new_stream_goes_to_the_least_loaded_session() -> None:
    pool, [one, two] = make_pool(2, 10)
    for _ in range(6):
        pool.acquire()
    assert (one.stream_count, two.stream_count) == (2, 4)


def test_idle_streams_do_not_pin_visitors_to_the_first_session() -> None:
    pool, [one, two] = make_pool(100, 100)
    for _ in range(3):
        held = [pool.acquire(reuse=True) for _ in range(8)]
        assert [sum(stream.session is session for stream in held) for session in (one, two)] == [4, 4]
        give_back(pool, *held)
    assert (one.stream_count, two.stream_count) == (4, 4), "a second burst opens nothing new"


def test_a_busy_session_s_idle_streams_wait_while_another_is_less_busy() -> None:
    pool, [one, two] = make_pool(100, 100)
    pool.remove(two)
    held = [pool.acquire() for _ in range(4)]
    give_back(pool, held.pop())
    pool.add(two)
    assert [pool.acquire(reuse=True).session for _ in range(4)] == [two, two, two, one]


def test_one_visitor_after_the_other_stays_on_one_stream() -> None:
    pool, sessions = make_pool(100, 100, 100)
    streams = set()
    for _ in range(10):
        stream = pool.acquire(reuse=True)
        streams.add(stream)
        give_back(pool, stream)
    assert len(streams) == sum(session.stream_count for session in sessions) == 1


def test_what_must_not_be_repeated_gets_a_new_stream_of_the_least_busy_session() -> None:
    pool, [one, two] = make_pool(100, 100)
    old = pool.acquire(reuse=True)
    give_back(pool, old)
    old.receiver.since -= 2 * pool_module.FRESH_LIFE
    fresh = pool.acquire(reuse=True, retriable=False)
    assert fresh is not old
    assert fresh.session is one
    assert pool.acquire(reuse=True, retriable=False).session is two


def test_the_client_s_limit_is_for_all_sessions_together() -> None:
    pool, sessions = make_pool(5, 5, 5)
    held = [pool.acquire() for _ in range(5)]
    queue = Queue(pool)
    queue.ask("sixth")
    assert sum(session.stream_count for session in sessions) == 5
    held[0].reset()
    queue.wait(1)
    assert queue.served == ["sixth"]
    assert sum(session.stream_count for session in sessions) == 5


def test_at_the_limit_the_oldest_idle_stream_of_any_session_makes_room() -> None:
    pool, sessions = make_pool(4, 4)
    held = [pool.acquire() for _ in range(4)]
    give_back(pool, held[1])
    give_back(pool, held[0], held[2])
    pool.acquire(reuse=False)
    assert [stream.was_reset for stream in held] == [False, True, False, False]
    assert sum(session.stream_count for session in sessions) == 4


def test_idle_streams_of_every_session_age() -> None:
    pool, _ = make_pool(100, 100)
    held = [pool.acquire() for _ in range(4)]
    give_back(pool, *held)
    for stream in held:
        stream.receiver.until = 0
    pool.tick(time.monotonic())
    assert pool.idle_count == 0
    assert all(stream.local_ended for stream in held)


def test_a_session_that_is_left_gets_no_visitors_and_only_its_idle_streams_end() -> None:
    pool, [one, two] = make_pool(100, 100)
    held = [pool.acquire() for _ in range(4)]
    give_back(pool, *held)
    one.goaway_received = True
    pool.end_idle(one)
    assert {stream.session for stream in held if stream.local_ended} == {one}
    assert {pool.acquire(reuse=True).session for _ in range(5)} == {two}


def test_a_session_that_is_gone_costs_only_its_streams() -> None:
    pool, [one, two] = make_pool(100, 100)
    held = [pool.acquire() for _ in range(4)]
    give_back(pool, *held)
    one.goaway_received = True
    for stream in list(one.streams):
        stream.reset()
    pool.remove(one)
    assert pool.idle_count == two.stream_count == 2
    assert {pool.acquire(reuse=True).session for _ in range(5)} == {two}
    late = held[0]
    give_back(pool, late)
    assert pool.idle_count == 0


def test_who_waits_is_served_when_a_session_that_held_the_places_is_gone() -> None:
    pool, [one, _two] = make_pool(2, 2)
    pool.acquire(), pool.acquire()
    queue = Queue(pool)
    queue.ask(1)
    for stream in list(one.streams):
        stream.reset()
    pool.remove(one)
    queue.wait(1)
    assert not isinstance(queue.got[0][1], Exception)


# -- by hand: the queue ----------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    pool, _ = make_pool(2)
    held = [pool.acquire(), pool.acquire()]
    queue = Queue(pool)
    for who in range(5):
        queue.ask(who, reuse=True)
    assert pool.waiting_count == 5
    give_back(pool, held.pop())
    queue.wait(1)
    give_back(pool, held.pop())
    queue.wait(2)
    queue.got[0][1].reset()
    queue.wait(3)
    assert queue.served == [0, 1, 2]
    assert pool.waiting_count == 2


def test_nobody_overtakes_those_who_wait() -> None:
    """A stream that is idle for a moment belongs to who waits, not to who comes by."""
    pool, _ = make_pool(1)
    held = pool.acquire()
    queue = Queue(pool)
    queue.ask("waiting", reuse=True)
    gevent.spawn(queue._ask, "passing", {"reuse": True})  # runs before the one that is woken now
    give_back(pool, held)
    queue.wait(1)
    assert queue.served == ["waiting"]
    give_back(pool, queue.got[0][1])
    queue.wait(2)


def test_a_refused_visitor_is_the_next_one() -> None:
    pool, _ = make_pool(1)
    held = pool.acquire()
    queue = Queue(pool)
    queue.ask("second")
    queue.ask("refused", first=True)
    for count in (1, 2):
        held.reset()
        queue.wait(count)
        held = queue.got[-1][1]
    assert queue.served == ["refused", "second"]


def test_waiting_has_an_end() -> None:
    pool, _ = make_pool(1, wait=0.05)
    held = pool.acquire()
    with pytest.raises(StreamLimitError):
        pool.acquire(reuse=True)
    assert pool.waiting_count == 0
    give_back(pool, held)
    assert pool.acquire(reuse=True) is held


def test_who_waits_is_told_when_the_client_leaves() -> None:
    pool, [session] = make_pool(1)
    pool.acquire()
    queue = Queue(pool)
    queue.ask(1)
    queue.ask(2)
    pool.remove(session)
    queue.wait(2)
    assert all(isinstance(result, SessionClosedError) for _, result in queue.got)
    with pytest.raises(SessionClosedError):
        pool.acquire()


def test_another_session_serves_those_who_wait() -> None:
    pool, _ = make_pool(1)
    pool.acquire()
    queue = Queue(pool)
    queue.ask(1)
    pool.add(FakeSession(2))
    queue.wait(1)
    assert queue.served == [1]


def test_an_idle_stream_makes_room_for_one_that_must_be_new() -> None:
    pool, [session] = make_pool(2)
    old, young = pool.acquire(), pool.acquire()
    give_back(pool, old)
    give_back(pool, young)
    fresh = pool.acquire(reuse=False)
    assert fresh not in (old, young)
    assert old.was_reset
    assert not young.was_reset
    assert session.stream_count == 2


def test_streams_that_have_left_already_do_not_hide_one_that_can_make_room() -> None:
    pool, _ = make_pool(2)
    gone, idle = pool.acquire(), pool.acquire()
    give_back(pool, gone)
    gone.receiver.until = 0
    pool.tick(time.monotonic())  # ended for age …
    gone.end()  # … and the service has closed too
    pool.acquire()
    give_back(pool, idle)
    with gevent.Timeout(pool_module.LOOK_AGAIN / 2):  # found at the first look
        assert pool.acquire(reuse=False) is not idle
    assert idle.was_reset


# -- end to end ------------------------------------------------------------------------------------


def test_visitors_share_the_service_s_connections(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service)
    for _ in range(20):
        assert get(server.proxy_port).body == b"ok"
    assert len(service.peers) == 1


def test_an_http_1_0_visitor_s_stream_is_as_good_as_any(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """The service is asked in HTTP/1.1 always (RFC 9112 §2.3), so its connection goes on."""
    service = start_service()
    open_tunnel(service)
    assert get(server.proxy_port).status == 200
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", minor=0))
        assert read_response(sock).status == 200
    assert get(server.proxy_port).status == 200
    assert len(service.peers) == 1
    assert [got.start for got in service.requests] == [b"GET / HTTP/1.1"] * 3
    assert service.requests[1].get(b"connection") is None



def test_a_connection_that_rests_too_long_is_ended_cleanly(
    start_server: StartServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    fast_clock: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool_module, "IDLE_LIFE", 0.3)
    clean: list[bool] = []

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(respond())
        clean.append(peer.wait_end())

    server = start_server()
    service = start_service(script)
    open_tunnel(service, server=server)
    assert get(server.proxy_port).status == 200
    assert service.peers[0].ended.wait(DEADLINE)
    assert clean == [True]
    eventually(lambda: server.registry.tunnels["demo"].sessions[0].stream_count == 0)


def test_a_connection_that_the_service_closes_while_it_rests_is_not_used_again(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(respond(b"%d" % peer.number))

    service = start_service(script)
    open_tunnel(service)
    for number in range(5):
        assert get(server.proxy_port, method=b"POST", body=b"x").body == b"%d" % number
        eventually(lambda: server.registry.tunnels["demo"].sessions[0].stream_count == 0)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nConnection: close", b"HTTP/1.0 200 OK"])
def test_a_service_that_announces_the_end_is_taken_at_its_word(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, head: bytes
) -> None:
    """Even if it leaves the connection open: it would not answer another request there."""

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(head + b"\r\nContent-Length: 2\r\n\r\nok")
        peer.wait_end()

    service = start_service(script)
    open_tunnel(service)
    for number in range(3):
        assert get(server.proxy_port, method=b"POST", body=b"x").body == b"ok"
        assert len(service.peers) == number + 1


class Gate:
    """A service that answers each request when the test says so."""

    def __init__(self) -> None:
        self.arrived: list[bytes] = []
        self.most = 0
        self._now = 0
        self._go = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __call__(self, got: Request) -> bytes:
        with self._lock:
            self.arrived.append(got.target)
            self._now += 1
            self.most = max(self.most, self._now)
        assert self._go.acquire(timeout=2 * DEADLINE)
        with self._lock:
            self._now -= 1
        return respond(got.target)

    def open(self, count: int = 1) -> None:
        self._go.release(count)


def ask_all(server: TunnelServer, gate: Gate, count: int) -> list[socket.socket]:
    """That many visitors ask one after the other, each arrived (or queued) before the next."""
    pool = server.registry.tunnels["demo"].pool
    before = len(gate.arrived)
    socks = []
    for number in range(count):
        sock = connect(server.proxy_port)
        sock.sendall(request("demo", f"/{number}"))
        socks.append(sock)
        eventually(lambda: len(gate.arrived) - before + pool.waiting_count == len(socks))
    return socks


def test_the_limit_is_kept_and_visitors_are_served_in_order(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    gate = Gate()
    open_tunnel(start_service(answering(gate)), concurrency=3)
    socks = ask_all(server, gate, 10)
    for number in range(3, 10):  # whoever of the three is answered, the next in line comes in
        gate.open()
        eventually(lambda number=number: len(gate.arrived) == number + 1)
    gate.open(3)
    for number, sock in enumerate(socks):
        assert read_response(sock).body == b"/%d" % number
        sock.close()
    assert gate.arrived[3:] == [b"/%d" % number for number in range(3, 10)]
    assert gate.most == 3


def test_who_waits_too_long_gets_503_with_retry_after(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    gate = Gate()
    server = start_server(queue_timeout=0.4)
    open_tunnel(start_service(answering(gate)), server=server, concurrency=1)
    with connect(server.proxy_port) as first, connect(server.proxy_port) as second:
        first.sendall(request("demo", "/first"))
        eventually(lambda: gate.arrived)
        begun = time.monotonic()
        second.sendall(request("demo", "/second"))
        response = read_response(second)
        took = time.monotonic() - begun
        assert response.status == 503
        assert int(response.get(b"retry-after") or b"") > 0
        assert took > 0.39
        assert response.get(b"connection") is None, "he may try again on the same connection"
        gate.open(2)
        assert read_response(first).body == b"/first"
        second.sendall(request("demo", "/again"))
        assert read_response(second).body == b"/again"
    assert gate.arrived == [b"/first", b"/again"]


def test_an_idle_connection_s_place_is_given_away_at_the_limit(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What must not be sent twice needs a new one, and all places are taken by pooled ones."""
    monkeypatch.setattr("tinytun_gevent.server.pool.FRESH_LIFE", 0.0)
    service = start_service()
    open_tunnel(service, concurrency=1)
    for method in (b"GET", b"POST", b"GET", b"POST"):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", method=method))
            assert read_response(sock).body == b"ok"
    assert len(service.peers) == 3, "a POST cannot use the stream that rests, what follows it can"


def test_a_limit_of_one_serves_many_visitors(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    gate = Gate()
    gate.open(200)
    open_tunnel(start_service(answering(gate)), concurrency=1)
    failed: list[object] = []

    def visit(visitor: int) -> None:
        with connect(server.proxy_port) as sock:
            for number in range(20):
                sock.sendall(request("demo", f"/{visitor}/{number}"))
                response = read_response(sock)
                if response.body != f"/{visitor}/{number}".encode():
                    failed.append(response)

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failed == []
    assert gate.most == 1


def test_a_refused_stream_goes_before_those_who_wait(server: TunnelServer) -> None:
    with RawClient(server, max_streams=1) as client:
        first, second = connect(server.proxy_port), connect(server.proxy_port)
        with first, second:
            first.sendall(request("demo", "/first"))
            refused = client.next(RequestReceived).stream_id or 0
            assert b"/first" in client.next_head()
            second.sendall(request("demo", "/second"))
            pool = server.registry.tunnels["demo"].pool
            eventually(lambda: pool.waiting_count == 1)
            client.reset(refused, 7)
            for sock, target in ((first, b"/first"), (second, b"/second")):
                stream_id, head = client.next_request()
                assert head.startswith(b"GET %b HTTP/1.1" % target)
                client.send(stream_id, respond(target, b"Connection: close"), end=True)
                assert read_response(sock).body == target


def test_of_those_who_wait_for_a_stream_only_so_many_wait_for_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the client is lost, the last ones in a queue that is longer than that give up."""
    monkeypatch.setattr(pool_module, "LOOK_AGAIN", 0.02)
    pool: Any = StreamPool(DEADLINE, park=DEADLINE, places=2)
    session = FakeSession(1)
    pool.add(session)
    pool.acquire()
    queue = Queue(pool)
    for who in range(4):
        queue.ask(who)
    pool.remove(session)
    pool.expect()
    queue.wait(2)
    assert sorted(cast(Any, queue.served)) == [2, 3]
    assert all(isinstance(result, SessionClosedError) for _, result in queue.got)
    pool.add(FakeSession(2))
    queue.wait(4)
    assert queue.served[2:] == [0, 1]


# -- places that others give up --------------------------------------------------------------------


def test_no_more_places_are_claimed_than_are_waited_for() -> None:
    pool, _ = make_pool(1)
    queue = Queue(pool)
    stream = pool.acquire()
    assert not pool.claim(1.0)
    queue.ask("a")
    queue.ask("b")
    assert [pool.claim(2.0) for _ in range(3)] == [True, True, False]
    assert [pool.claim(3.0) for _ in range(3)] == [True, True, False]
    pool.release(stream)
    queue.wait(1)
    assert [pool.claim(4.0) for _ in range(2)] == [True, False]
    pool.close()


def test_no_place_is_claimed_for_those_who_wait_for_a_session() -> None:
    pool, [session] = make_pool(1)
    pool.remove(session)
    pool.expect()
    Queue(pool).ask("a")
    assert not pool.claim(1.0)
    pool.close()


def test_a_visitor_that_has_left_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "LOOK_AGAIN", 0.01)
    pool, [session] = make_pool(1)
    queue, gone = Queue(pool), threading.Event()
    stream = pool.acquire()
    queue.ask("leaves", gone=gone.is_set)
    queue.ask("stays", gone=lambda: False)
    gone.set()
    queue.wait(1)
    who, error = queue.got[0]
    assert who == "leaves"
    assert isinstance(error, SessionClosedError)
    pool.release(stream)
    queue.wait(2)
    assert queue.served == ["leaves", "stays"]
    assert session.stream_count <= 1
