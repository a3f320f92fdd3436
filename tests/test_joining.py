"""Several sessions for one tunnel: the client against a scripted server, then against the real one."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import pytest
from conftest import OpenTunnel, StartService
from fake_server import (
    DEADLINE,
    Collector,
    FakeServer,
    Recorder,
    default_reply,
    echo,
    local_service,
    refuse,
    running,
)
from support import Peer, connect, eventually, get, read_head, read_response, request, respond

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.client import dial, growth, joining
from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.backoff import Backoff
from tinytun_gevent.client.events import State
from tinytun_gevent.errors import StreamResetError
from tinytun_gevent.session import Session
from tinytun_gevent.stream import REFUSED_STREAM, Stream
from tinytun_gevent.wire.handshake import Join, Kind, OpenReply, OpenRequest

KEY = "0123456789abcdef" * 2


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A scripted server that offers to be joined."""
    fake = FakeServer()
    fake.grant = offer
    with gevent.Timeout(120):
        yield fake
    fake.close()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever moves or does not, one connection is not enough."""
    monkeypatch.setattr(growth, "LONG_PATH", 0)
    monkeypatch.setattr(growth, "IN_FLIGHT", 0)
    monkeypatch.setattr(joining, "LOOK", 0.005)
    monkeypatch.setattr(joining, "QUIET_LOOK", 0.005)
    monkeypatch.setattr(joining, "IDLE_LOOK", 0.005)


def offer(asked: OpenRequest) -> OpenReply:
    granted = default_reply(asked)
    return OpenReply(granted.connection_id, granted.domain, granted.subdomain, granted.port, join_key=KEY)


def sessions(server: FakeServer, count: int) -> list[Session]:
    """The server's end of the next ``count`` sessions, as they begin."""
    return [server.sessions.get(timeout=DEADLINE) for _ in range(count)]


def open_on(session: Session, data: bytes = b"hello") -> tuple[Stream, Collector]:
    """A visitor on that session, who has said something."""
    stream = session.open()
    collector = Collector(stream)
    stream.sendall(data)
    return stream, collector


def until(predicate: Any) -> None:
    """Waits in the test's own hub."""
    with gevent.Timeout(DEADLINE):
        while not predicate():
            gevent.sleep(0.002)


@contextmanager
def grown(server: FakeServer, count: int, **options: Any) -> Iterator[tuple[Agent, Recorder, list[Session]]]:
    """An agent with an echo service behind it, and its ``count`` sessions; a visitor is on the first."""
    with local_service(echo) as target, running(server, target, sessions=count, **options) as (agent, events):
        agent.wait_connected(DEADLINE)
        events.wait_for(State.CONNECTED)
        (first,) = sessions(server, 1)
        open_on(first)
        added = sessions(server, count - 1)
        until(lambda: len(agent._sessions) == count)
        yield agent, events, [first, *added]


# -- growing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.HTTP, Kind.TCP])
def test_a_tunnel_that_one_connection_limits_gets_all_that_it_may_have(
    server: FakeServer, eager: None, kind: Kind
) -> None:
    with grown(server, 4, kind=kind) as (agent, events, ends):
        asked = [server.requests.get(timeout=DEADLINE) for _ in range(4)]
        assert [one.join for one in asked] == [None] + [Join("0" * 32, KEY)] * 3
        assert {one.kind for one in asked} == {kind}
        assert {(one.subdomain, one.port) for one in asked[1:]} == {(None, None)}
        for session in ends:
            stream, collector = open_on(session, b"to each")
            stream.shutdown()
            assert collector.whole() == b"to each"
        assert agent.counters.total == 5
        assert events.states.empty(), "the tunnel is connected, and nothing else is said"
        assert events.warnings == []
        assert len(events.urls) == 1
        assert server.requests.empty()


def test_sessions_are_added_at_the_server_that_has_the_tunnel(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name may have another address by now, or several of them."""
    with local_service(echo) as target, running(server, target, sessions=2) as (agent, _):
        agent.wait_connected(DEADLINE)
        (first,) = sessions(server, 1)
        monkeypatch.setattr(dial, "resolve", lambda host, port: [])
        open_on(first)
        sessions(server, 1)


def test_a_tunnel_with_little_traffic_stays_on_one_connection(server: FakeServer) -> None:
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        (first,) = sessions(server, 1)
        stream, collector = open_on(first, b"x" * 10_000_000)
        stream.shutdown()
        assert len(collector.whole()) == 10_000_000
        assert agent._team is not None
        assert agent._team._watcher is not None
        assert not agent._team._joining
        assert len(agent._sessions) == 1


def test_one_session_is_never_joined(server: FakeServer, eager: None) -> None:
    with grown(server, 1) as (agent, _, _ends):
        assert agent._team is not None
        assert agent._team._watcher is None, "nobody looks"


def test_a_server_that_does_not_offer_it_is_never_asked(server: FakeServer, eager: None) -> None:
    server.grant = default_reply
    with grown(server, 1) as (first_agent, _, _ends):
        del first_agent
    with running(server, sessions=4) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert agent._team is not None
        assert agent._team._watcher is None


@pytest.mark.parametrize("status", [404, 429, 503, 400, 500])
def test_a_refusal_disturbs_nothing_and_is_tried_again_later(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(growth, "FIRST_PAUSE", 0.01)
    with local_service(echo) as target, running(server, target, sessions=2) as (agent, events):
        agent.wait_connected(DEADLINE)
        events.wait_for(State.CONNECTED)
        (first,) = sessions(server, 1)
        server.script = [refuse(status, "Not now")] * 3
        stream, collector = open_on(first)
        (added,) = sessions(server, 1)
        assert server.script == []
        stream.shutdown()
        assert collector.whole() == b"hello"
        assert added.takes_visitors
        assert events.states.empty()
        assert events.warnings == []


def test_a_failed_attempt_is_followed_by_a_pause(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[float | None] = []
    monkeypatch.setattr(growth.Pauses, "failed", lambda _, now, asked: failed.append(asked) or 5.0)
    monkeypatch.setattr(growth.Pauses, "is_over", lambda _, now: not failed)
    with local_service(echo) as target, running(server, target, sessions=2) as (agent, _):
        agent.wait_connected(DEADLINE)
        (first,) = sessions(server, 1)
        server.script = [refuse(429, "Enough", 7)]
        open_on(first)
        until(lambda: failed)
        assert failed == [7.0]


def test_a_session_of_another_tunnel_is_not_taken(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "FIRST_PAUSE", 0.01)
    others = ["f" * 32]

    def grant(asked: OpenRequest) -> OpenReply:
        connection_id = others.pop() if asked.join and others else "0" * 32
        return OpenReply(connection_id, "x.test", "x", join_key=KEY)

    server.grant = grant
    with grown(server, 2) as (agent, _, [first, wrong]):
        (right,) = sessions(server, 1)
        assert wrong.closed.wait(DEADLINE)
        assert not first.closed.is_set()
        until(lambda: len(agent._sessions) == 2)
        assert right.takes_visitors


def test_the_limit_of_visitors_is_for_all_sessions_together(server: FakeServer, eager: None) -> None:
    with grown(server, 2, concurrency=3) as (agent, _, [first, second]):
        assert first.peer_max_streams == second.peer_max_streams == 3
        open_on(first)
        open_on(second)
        until(lambda: agent.counters.visitors == 3)
        _, collector = open_on(second)
        collector.whole()
        assert isinstance(collector.error, StreamResetError)
        assert collector.error.code == REFUSED_STREAM
        assert agent.counters.total == 3


# -- losing ----------------------------------------------------------------------------------------


def cut(session: Session) -> None:
    """The connection ends without a word."""
    session.end.sock.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("end", [cut, Session.close])
@pytest.mark.parametrize("dies", [0, 1])
def test_the_death_of_one_costs_only_its_visitors(
    server: FakeServer, eager: None, dies: int, end: Callable[[Session], None]
) -> None:
    with grown(server, 2) as (agent, events, ends):
        kept, kept_collector = open_on(ends[1 - dies])
        _, lost_collector = open_on(ends[dies])
        assert kept_collector.arrived.wait(DEADLINE)
        end(ends[dies])
        lost_collector.whole()
        assert lost_collector.error is not None
        assert agent.connected.is_set()
        (again,) = sessions(server, 1)
        kept.sendall(b" again")
        kept.shutdown()
        assert kept_collector.whole() == b"hello again"
        assert [server.requests.get(timeout=DEADLINE).join is None for _ in range(3)] == [True, False, False]
        stream, collector = open_on(again)
        stream.shutdown()
        assert collector.whole() == b"hello"
        assert events.states.empty()


def test_a_session_that_the_server_wants_gone_counts_until_it_is(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server had as many connections and visitors of a client as it likes."""
    with grown(server, 2, concurrency=3) as (agent, _, [first, second]):
        _, collector = open_on(first)
        assert collector.arrived.wait(DEADLINE)
        assert agent._team is not None
        first.goaway()
        until(lambda: agent._team is not None and len(agent._team.sessions) == 1)
        open_on(second)
        until(lambda: agent.counters.visitors == 3)
        _, refused = open_on(second)
        refused.whole()
        assert isinstance(refused.error, StreamResetError)
        assert refused.error.code == REFUSED_STREAM
        looks: list[object] = []
        look = joining.Team._look
        monkeypatch.setattr(joining.Team, "_look", lambda *a: (looks.append(a), look(*a)))
        until(lambda: len(looks) > 5)
        assert not agent._team._joining
        assert len(agent._sessions) == 2
        for running_stream in list(first.streams.values()):
            running_stream.reset()
        assert first.closed.wait(DEADLINE)
        sessions(server, 1)


def test_only_the_death_of_the_last_makes_it_reconnect(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)
    monkeypatch.setattr(growth, "FIRST_PAUSE", 600.0)
    with grown(server, 2) as (agent, events, [first, second]):
        server.script = [refuse(404, "There is no such tunnel")]
        open_on(second)
        cut(first)
        until(lambda: not server.script)
        assert agent.connected.is_set()
        server.grant = lambda asked: OpenReply("e" * 32, "brave-otter.test", "brave-otter", join_key="k" * 32)
        cut(second)
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        (again,) = sessions(server, 1)
        asked = [server.requests.get(timeout=DEADLINE) for _ in range(4)]
        assert asked[3].join is None
        assert asked[3].subdomain == "brave-otter"
        open_on(again)
        sessions(server, 1)
        assert server.requests.get(timeout=DEADLINE).join == Join("e" * 32, "k" * 32), (
            "those of the new tunnel"
        )


def test_a_stopping_server_is_left_on_every_session_and_visitors_finish(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)
    with grown(server, 2, kind="tcp") as (agent, events, ends):
        stream, collector = open_on(ends[1])
        assert collector.arrived.wait(DEADLINE)
        for session in ends:
            session.goaway()
        assert events.wait_for(State.RECONNECTING) == "the server is stopping"
        events.wait_for(State.CONNECTED)
        stream.sendall(b" to the end")
        stream.shutdown()
        assert collector.whole() == b"hello to the end"
        assert ends[1].closed.wait(DEADLINE)
        assert ends[1].error is None
        assert not ends[0].closed.is_set(), "a visitor is still there"
        assert agent.state is State.CONNECTED


def test_a_server_that_wants_one_session_gone_keeps_the_tunnel(server: FakeServer, eager: None) -> None:
    with local_service(echo) as target, running(server, target, sessions=2) as (agent, events):
        agent.wait_connected(DEADLINE)
        events.wait_for(State.CONNECTED)
        (first,) = sessions(server, 1)
        stream, collector = open_on(first)
        (second,) = sessions(server, 1)
        until(lambda: len(agent._sessions) == 2)
        assert collector.arrived.wait(DEADLINE)
        first.goaway()
        until(lambda: agent._team is not None and len(agent._team.sessions) == 1)
        stream.shutdown()
        assert collector.whole() == b"hello"
        assert first.closed.wait(DEADLINE)
        stream, collector = open_on(second)
        stream.shutdown()
        assert collector.whole() == b"hello"
        assert events.states.empty()


def test_a_tunnel_without_visitors_goes_back_to_one_connection(
    server: FakeServer, eager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_service(echo) as target, running(server, target, sessions=3) as (agent, events):
        agent.wait_connected(DEADLINE)
        events.wait_for(State.CONNECTED)
        (first,) = sessions(server, 1)
        stream, collector = open_on(first)
        added = sessions(server, 2)
        until(lambda: len(agent._sessions) == 3)
        monkeypatch.setattr(growth, "IN_FLIGHT", growth.LONGEST_PAUSE * 1e9)
        monkeypatch.setattr(growth, "IDLE", 0.05)
        stream.shutdown()
        assert collector.whole() == b"hello"
        for session in added:
            assert session.closed.wait(DEADLINE)
            assert session.goaway_received
            assert session.error is None
        until(lambda: len(agent._sessions) == 1)
        assert not first.closed.is_set()
        assert not first.goaway_received
        stream, collector = open_on(first)
        stream.shutdown()
        assert collector.whole() == b"hello"
        assert events.states.empty()


def test_stop_says_goodbye_on_every_session(server: FakeServer, eager: None) -> None:
    with grown(server, 3) as (agent, _, ends):
        agent.stop(grace=0.1)
        for session in ends:
            assert session.closed.wait(DEADLINE)
            assert session.goaway_received
        assert agent.state is State.CLOSED


def test_stop_gives_up_a_session_that_is_on_its_way(server: FakeServer, eager: None) -> None:
    asked = gevent.event.Event()

    def silent(_: OpenRequest) -> bytes:
        asked.set()
        gevent.sleep(2 * DEADLINE)
        return b""

    with local_service(echo) as target, running(server, target, sessions=2) as (agent, _):
        agent.wait_connected(DEADLINE)
        (first,) = sessions(server, 1)
        server.script = [silent]
        open_on(first)
        assert asked.wait(DEADLINE)
        with gevent.Timeout(DEADLINE):
            agent.stop(grace=0)
        assert agent._team is not None
        assert not agent._team._joining


def test_stop_leaves_no_session_that_began_while_visitors_finished(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)
    asked, stopped = gevent.event.Event(), gevent.event.Event()

    def grant(request: OpenRequest) -> OpenReply:
        if server.all:
            asked.set()
            stopped.wait(DEADLINE)
        return offer(request)

    server.grant = grant
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        (first,) = sessions(server, 1)
        stream, collector = open_on(first)
        assert collector.arrived.wait(DEADLINE)
        first.goaway()
        assert asked.wait(DEADLINE)
        stopping = gevent.spawn(agent.stop, grace=DEADLINE)
        until(lambda: agent._stopping)
        stopped.set()
        until(lambda: len(server.all) == 2)
        second = server.all[1]
        until(lambda: second.keep_alive.first_answer.is_set() or second.closed.is_set())
        stream.shutdown()
        collector.whole()
        stopping.get()
        assert not agent.connected.is_set()
        until(lambda: all(session.closed.is_set() for session in server.all))


# -- with the real server --------------------------------------------------------------------------


@pytest.fixture
def real_server(start_server: Any) -> TunnelServer:
    return start_server()  # type: ignore[no-any-return]


def count(server: TunnelServer) -> int:
    return len(server.registry.tunnels["demo"].sessions)


def test_visitors_are_spread_and_a_goodbye_frees_the_name(
    real_server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, eager: None
) -> None:
    gate = threading.Event()
    gate.set()

    def wait(peer: Peer) -> None:
        while peer.read_request() is not None:
            gate.wait(DEADLINE)
            peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    tunnel = open_tunnel(start_service(wait), server=real_server, sessions=3)
    assert get(real_server.proxy_port).body == b"ok"
    eventually(lambda: count(real_server) == 3)
    gate.clear()  # the stream of that visitor may serve one of the next
    socks = [connect(real_server.proxy_port) for _ in range(9)]
    for sock in socks:
        sock.sendall(request("demo", "/slow"))
    ends = real_server.registry.tunnels["demo"].sessions
    eventually(lambda: [session.stream_count for session in ends] == [3, 3, 3])
    gate.set()
    for sock in socks:
        assert read_response(sock).body == b"ok"
        sock.close()
    tunnel.close()
    assert not real_server.registry.tunnels


def test_the_limit_holds_for_many_visitors_on_several_sessions(
    real_server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, eager: None
) -> None:
    lock = threading.Lock()
    running: list[int] = []
    most: list[int] = []

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            with lock:
                running.append(peer.number)
                most.append(len(running))
            peer.sendall(respond(got.target))
            with lock:
                running.remove(peer.number)

    open_tunnel(start_service(script), server=real_server, sessions=3, concurrency=3)
    assert get(real_server.proxy_port).status == 200
    eventually(lambda: count(real_server) == 3)
    failed: list[object] = []

    def visit(visitor: int) -> None:
        for number in range(20):
            target = f"/{visitor}/{number}"
            with connect(real_server.proxy_port) as sock:
                # HTTP/1.0 gets a stream of its own each time, and its place is given away at once.
                sock.sendall(request("demo", target, minor=visitor % 2))
                if (answer := read_response(sock)).body != target.encode():
                    failed.append(answer)

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failed == []
    assert max(most) <= 3


@contextmanager
def long_path(port: int, delay: float, window: int = 0) -> Iterator[int]:
    """A relay to ``port`` that hands every byte on ``delay`` seconds late; yields its own port.

    At most ``window`` bytes, if it is not 0, are under way of each connection each way.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    socks: list[socket.socket] = [listener]
    if window:  # what is held up waits in its sender's kernel, and not in ours
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)

    def carry(source: socket.socket, target: socket.socket) -> None:
        chunk = 8192 if window else 1 << 20
        waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(window // chunk)

        def hand_on() -> None:
            data = b"the first"
            while data:
                due, data = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                try:
                    target.sendall(data) if data else target.shutdown(socket.SHUT_WR)
                except OSError:
                    return

        threading.Thread(target=hand_on, daemon=True).start()
        data = b"the first"
        while data:
            try:
                data = source.recv(chunk)
            except OSError:
                data = b""
            waiting.put((time.monotonic() + delay, data))

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", port))
            socks.extend((near, far))
            for pair in ((near, far), (far, near)):
                pair[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=carry, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        for sock in socks:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()


@pytest.mark.parametrize("window", [0, 64 * 1024], ids=["much in flight", "held up"])
def test_a_download_over_a_long_path_makes_the_tunnel_grow_by_itself(
    real_server: TunnelServer, start_service: StartService, window: int
) -> None:
    def pour(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while True:
            peer.sendall(bytes(1 << 20))

    service = start_service(pour)
    with long_path(real_server.connection_port, 0.025, window) as port:
        url = f"http://127.0.0.1:{port}"
        with Tunnel(service.target, server=url, subdomain="demo", proxy=""):
            with connect(real_server.proxy_port) as sock:
                sock.sendall(request("demo", "/endless"))
                assert read_head(sock).status == 200
                until_then = time.monotonic() + 3 * DEADLINE
                while count(real_server) < 4:
                    assert sock.recv(1 << 20)
                    assert time.monotonic() < until_then
            with connect(real_server.proxy_port) as next_one:
                next_one.sendall(request("demo", "/next"))
                assert read_head(next_one).status == 200
    assert not real_server.registry.tunnels
