"""Sessions of several tunnels at a time: a server is reloaded, or says goodbye all the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from fake_server import DEADLINE, Collector, FakeServer, echo, local_service, running

from tinytun_gevent import session as session_module
from tinytun_gevent.client import sessions as sessions_module
from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.backoff import Backoff
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.sessions import Sessions
from tinytun_gevent.errors import StreamResetError
from tinytun_gevent.session import Session
from tinytun_gevent.stream import REFUSED_STREAM, Stream


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)
    fake = FakeServer()
    with gevent.Timeout(120):
        yield fake
    fake.close()


def until(predicate: Any) -> None:
    with gevent.Timeout(DEADLINE):
        while not predicate():
            gevent.sleep(0.002)


def next_session(server: FakeServer, agent: Agent) -> Session:
    """The server's end of the next one, once the agent serves on it."""
    session = server.sessions.get(timeout=DEADLINE)
    assert agent.connected.wait(DEADLINE)
    return session


def visit_on(session: Session) -> tuple[Stream, Collector]:
    """A visitor who has been answered and stays."""
    stream = session.open()
    collector = Collector(stream)
    stream.sendall(b"hello")
    assert collector.arrived.wait(DEADLINE)
    return stream, collector


def reload(server: FakeServer, agent: Agent, old: Session) -> Session:
    """The server says goodbye; the session that the agent opens next."""
    old.goaway()
    return next_session(server, agent)


def test_visitors_of_a_reloaded_server_finish_beside_the_new_ones(server: FakeServer) -> None:
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, events):
        old = next_session(server, agent)
        stream, collector = visit_on(old)
        new = reload(server, agent, old)
        other, other_collector = visit_on(new)
        assert not old.closed.is_set()
        assert agent.counters.visitors == agent.counters.total == 2
        for one, answer in ((other, other_collector), (stream, collector)):
            one.sendall(b" and more")
            one.shutdown()
            assert answer.whole() == b"hello and more"
            assert answer.error is None
        assert old.closed.wait(DEADLINE)
        assert old.error is None
        until(lambda: not agent.counters.visitors)
        assert agent.counters.bytes_in == agent.counters.bytes_out == 2 * len(b"hello and more")
        until(lambda: len(agent._sessions) == 1)
        assert events.warnings == []
        assert len(events.urls) == 1


def test_the_limit_of_visitors_holds_for_old_sessions_too(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "REFUSAL", 0.01)
    with (
        local_service(echo) as target,
        running(server, target, kind="tcp", concurrency=3) as (agent, _),
    ):
        old = next_session(server, agent)
        staying, _collector = visit_on(old)
        visit_on(old)
        new = reload(server, agent, old)
        visit_on(new)
        stream = new.open()
        refused = Collector(stream)
        stream.sendall(b"one too many")
        refused.whole()
        assert isinstance(refused.error, StreamResetError)
        assert refused.error.code == REFUSED_STREAM
        assert agent.counters.total == 3
        staying.reset()
        until(lambda: agent.counters.visitors == 2 and new.has_room)
        visit_on(new)


def test_the_limit_holds_for_who_comes_before_his_session_is_counted(server: FakeServer) -> None:
    sessions = Sessions(make_config("1", server="http://x", concurrency=2, environ={}))

    class Carrying:
        def __init__(self, count: int) -> None:
            self.stream_count = count
            self.closed = gevent.event.Event()
            self.on_close: list[Any] = []

    def visitor(session: Any) -> Any:
        return type("Visitor", (), {"session": session})

    old, new = Carrying(2), Carrying(1)
    sessions.add(old)  # type: ignore[arg-type]
    assert sessions.has_room_for(visitor(old))
    assert not sessions.has_room_for(visitor(new))
    old.stream_count = 1
    assert sessions.has_room_for(visitor(new))


def test_a_server_that_says_goodbye_all_the_time_collects_no_sessions(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions_module, "MOST_LEAVING", 3)
    with local_service(echo) as target, running(server, target, kind="tcp", sessions=1) as (agent, _):
        ends = [next_session(server, agent)]
        collectors = [visit_on(ends[0])[1]]
        for _ in range(5):
            ends.append(reload(server, agent, ends[-1]))
            collectors.append(visit_on(ends[-1])[1])
        for end, collector in zip(ends[:2], collectors[:2], strict=True):
            assert end.closed.wait(DEADLINE), "the oldest ones"
            collector.whole()
            assert collector.error is not None
        assert len(agent._sessions) == 4
        assert not any(end.closed.is_set() for end in ends[2:])
        assert agent.counters.visitors == 4


def test_a_tunnel_of_many_sessions_may_be_left_twice(server: FakeServer) -> None:
    for count, most in ((1, 8), (4, 8), (16, 32)):
        config = make_config("1", server="http://x", sessions=count, environ={})
        assert Sessions(config)._most_leaving == most


def test_stop_ends_old_sessions_as_well(server: FakeServer) -> None:
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        old = next_session(server, agent)
        visit_on(old)
        new = reload(server, agent, old)
        agent.stop(grace=0)
        assert old.closed.wait(DEADLINE)
        assert new.closed.wait(DEADLINE)
        assert len(agent._sessions) == 0
