"""For how long a server that does not answer is tried."""

from __future__ import annotations

import socket as native
import time
from collections.abc import Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import gevent
import gevent.queue
import pytest
from fake_server import DEADLINE, FakeServer, Recorder, running
from free_ports import free_ports
from gevent.server import StreamServer

from tinytun_gevent.client import patience as module
from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.backoff import Backoff
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.events import State
from tinytun_gevent.client.patience import FIRST_START, Patience
from tinytun_gevent.errors import TryLaterError, UnreachableError

UNREACHABLE = UnreachableError("refused")


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    with gevent.Timeout(DEADLINE):
        yield


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def patience(**options: Any) -> Patience:
    return Patience(make_config("1", server="http://x:5", environ={}, **options))


def test_a_first_start_has_thirty_seconds(clock: SimpleNamespace) -> None:
    rule = patience()
    assert rule.left() is None
    rule.begin()
    clock.now += 6
    rule.begin()
    rule.failed(UNREACHABLE)
    assert rule.left() == FIRST_START - 6 == 24
    rule.check("refused")
    clock.now += 25
    with pytest.raises(UnreachableError, match=r"^no tunnel through x:5 within 30 s: refused \(--wait "):
        rule.check("refused")


def test_a_server_that_says_no_for_now_is_there(clock: SimpleNamespace) -> None:
    rule = patience()
    rule.begin()
    rule.failed(TryLaterError("full"))
    clock.now += 1000
    assert rule.left() is None
    rule.begin()
    assert rule.left() == FIRST_START


def test_what_was_up_once_is_tried_for_ever(clock: SimpleNamespace) -> None:
    rule = patience()
    rule.begin()
    rule.connected()
    rule.lost()
    rule.begin()
    clock.now += 10_000
    rule.failed(UNREACHABLE)
    assert rule.left() is None
    rule.check("refused")


def test_a_service_waits_for_ever(clock: SimpleNamespace) -> None:
    rule = patience(wait=True)
    rule.begin()
    clock.now += 10_000
    rule.failed(UNREACHABLE)
    assert rule.left() is None


@pytest.mark.parametrize("wait", [False, True])
def test_a_connect_timeout_wins_and_holds_after_each_loss(clock: SimpleNamespace, wait: bool) -> None:
    rule = patience(wait=wait, connect_timeout=5)
    rule.begin()
    clock.now += 2
    rule.failed(TryLaterError("full"))
    assert rule.left() == 3
    rule.connected()
    clock.now += 1000
    rule.lost()
    assert rule.left() == 5
    clock.now += 5
    with pytest.raises(UnreachableError, match=r"within 5 s: gone$"):
        rule.check("gone")


# -- in an agent ----------------------------------------------------------------


def test_an_agent_gives_up_at_the_first_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_START", 0.3)
    events = Recorder()
    config = make_config("1", server=f"http://127.0.0.1:{free_ports(1)[0]}", environ={})
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"within 0\.3 s: cannot connect.*refused.*--wait") as caught:
        Agent(config, events).run()
    assert time.monotonic() - began >= 0.3
    assert caught.value.exit_code == 5


def test_a_silent_server_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_START", 0.3)
    with native.create_server(("127.0.0.1", 0)) as listener:
        config = make_config("1", server=f"http://127.0.0.1:{listener.getsockname()[1]}", environ={})
        with pytest.raises(UnreachableError, match=r"within 0\.3 s"):
            Agent(config).run()


def test_an_agent_that_waits_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_START", 1e-6)
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)
    tried: gevent.queue.Queue[None] = gevent.queue.Queue()
    server = StreamServer(("127.0.0.1", 0), lambda sock, _: tried.put(sock.close()))
    server.start()
    config = make_config("1", server=f"http://127.0.0.1:{server.server_port}", wait=True, environ={})
    agent = Agent(config)
    agent.start()
    try:
        for _ in range(3):
            tried.get(timeout=DEADLINE)
        assert agent.error is None
        assert agent.tries_for is None
    finally:
        agent.stop(grace=0)
        server.stop()


def test_an_agent_that_was_connected_goes_on() -> None:
    server = FakeServer()
    with closing(server), running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        assert agent.tries_for is None
        session = server.sessions.get(timeout=DEADLINE)
        server.close()
        session.close()
        events.wait_for(State.RECONNECTING)
        assert agent.tries_for is None
