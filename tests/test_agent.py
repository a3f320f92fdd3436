"""The agent against a scripted server that speaks the real wire protocol."""

from __future__ import annotations

import gc
import json
import random
import socket as native
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gevent
import gevent.event
import gevent.queue
import greenlet
import pytest
from certificates import trust_file
from fake_server import (
    DEADLINE,
    Collector,
    FakeServer,
    Owners,
    Recorder,
    default_reply,
    echo,
    local_service,
    refuse,
    running,
    visit,
)
from free_ports import free_ports
from gevent import socket
from gevent.server import StreamServer

from tinytun_gevent.client import agent as agent_module
from tinytun_gevent.client import backoff as backoff_module
from tinytun_gevent.client import confirming, link
from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.backoff import Backoff
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.dial import dial_server
from tinytun_gevent.client.events import State
from tinytun_gevent.client.observe import Exchange, Observer
from tinytun_gevent.client.opening import is_final, tidy_url
from tinytun_gevent.control import Control
from tinytun_gevent.errors import (
    NameTakenError,
    RefusedError,
    SessionClosedError,
    TunnelError,
    UnreachableError,
    UsageError,
)
from tinytun_gevent.session import Session
from tinytun_gevent.stream import CANCEL
from tinytun_gevent.wire.goodbye import INADEQUATE_SECURITY, NO_ACCESS, NOT_ALLOWED
from tinytun_gevent.wire.handshake import (
    Kind,
    OpenReply,
    OpenRequest,
    build_refusal,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    yield fake
    fake.close()


@pytest.fixture(autouse=True)
def _no_test_hangs() -> Iterator[None]:
    with gevent.Timeout(120):
        yield


def cut(session: Session) -> None:
    """The connection ends without a word."""
    session.end.sock.shutdown(native.SHUT_RDWR)


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnects at once: the waits are tested by themselves."""
    monkeypatch.setattr(Backoff, "next", lambda self: 0.001)


# -- connecting -----------------------------------------------------------------


def test_it_connects_and_says_where(server: FakeServer) -> None:
    with running(server, subdomain="app", host_header="rewrite") as (agent, events):
        agent.wait_connected(DEADLINE)
        request = server.requests.get()
        assert (request.kind, request.subdomain, request.host_header) == (Kind.HTTP, "app", "localhost:1")
        assert request.authority == f"127.0.0.1:{server.port}"
        assert events.urls == ["http://app.test"]
        assert agent.url == "http://app.test"
        assert agent.state is State.CONNECTED
        assert events.warnings == []


def test_the_servers_own_url_is_shown_without_what_is_superfluous(server: FakeServer) -> None:
    server.grant = lambda _: OpenReply("0" * 32, domain="x.test", subdomain="x", url="https://x.test:443/")
    with running(server) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert agent.url == "https://x.test"


def test_a_tcp_tunnel_is_at_the_servers_host(server: FakeServer) -> None:
    with running(server, kind="tcp", port=30001) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert server.requests.get().port == 30001
        assert agent.url == "tcp://127.0.0.1:30001"


def test_a_server_that_does_not_know_host_headers_is_warned_about(server: FakeServer) -> None:
    server.grant = lambda _: OpenReply("0" * 32, domain="x.test", subdomain="x")
    with running(server, host_header="rewrite") as (agent, events):
        agent.wait_connected(DEADLINE)
        assert len(events.warnings) == 1
        assert "--host-header" in events.warnings[0]


def test_options_are_asked_for_and_a_server_that_does_not_know_them_is_warned_about(
    server: FakeServer,
) -> None:
    options = {"host_header": "rewrite", "forwarded_host": "off"}
    with running(server, **options) as (agent, events):
        agent.wait_connected(DEADLINE)
        assert server.requests.get().options == agent.config.options
        assert events.warnings == []
    server.grant = lambda _: OpenReply("0" * 32, domain="x.test", subdomain="x", host_header=True)
    with running(server, **options) as (agent, events):
        agent.wait_connected(DEADLINE)
        assert [text.split(":")[0] for text in events.warnings] == [
            "this server does not rewrite Origin and links",
            "this server does not know --forwarded-host",
        ]


def test_an_option_that_must_hold_ends_the_agent_if_it_is_not_confirmed(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(confirming.WARNINGS, "forwarded_host")
    server.grant = lambda _: OpenReply("0" * 32, domain="x.test", subdomain="x")
    with running(server, forwarded_host="off") as (agent, events):
        with pytest.raises(RefusedError, match="forwarded_host") as caught:
            agent.wait_connected(DEADLINE)
        assert caught.value.exit_code == 3
        assert events.urls == []


def test_the_concurrency_is_announced(server: FakeServer) -> None:
    with running(server, concurrency=7) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert server.sessions.get(timeout=DEADLINE).peer_max_streams == 7


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [(400, RefusedError, 3), (401, RefusedError, 3), (403, RefusedError, 3), (409, NameTakenError, 4)],
)
def test_a_refusal_that_will_not_heal_ends_it_at_once(
    server: FakeServer, status: int, error: type[TunnelError], code: int
) -> None:
    server.script = [refuse(status, "Because of this")]
    with running(server, subdomain="app") as (agent, events):
        with pytest.raises(error) as caught:
            agent.wait()
        assert caught.value.exit_code == code
        assert "subdomain 'app'" in str(caught.value)
        assert "Because of this" in str(caught.value)
        assert agent.state is State.CLOSED
        assert events.urls == []


def test_a_taken_port_is_named(server: FakeServer) -> None:
    server.script = [refuse(409, "Port not available")]
    with (
        running(server, kind="tcp", port=30000) as (agent, _),
        pytest.raises(NameTakenError, match="port 30000: Port not available"),
    ):
        agent.wait()


@pytest.mark.parametrize("status", [429, 503, 502])
def test_a_busy_server_is_waited_for(
    server: FakeServer, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    server.script = [refuse(status, "Later"), refuse(status, "Later still")]
    with running(server) as (agent, events):
        assert "Later" in events.wait_for(State.CONNECTING)
        agent.wait_connected(DEADLINE)
        assert server.requests.qsize() == 3


def test_retry_after_is_honored_within_bounds() -> None:
    delay_after = Agent(make_config("1", server="http://x", environ={}))._delay_after
    assert delay_after(agent_module.TryLaterError("x", 503, retry_after=7)) >= 7
    assert delay_after(agent_module.TryLaterError("x", 503, retry_after=86400)) <= 300
    assert delay_after(agent_module.TryLaterError("x", 429, retry_after=300)) >= 300  # a penalty's longest
    assert delay_after(agent_module.TryLaterError("x", 503, retry_after=0)) < 3


@pytest.mark.parametrize(
    ("answer", "error", "code"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", RefusedError, 3),
        (b"SSH-2.0-x\r\n\r\n", UnreachableError, 5),
        (b"HTTP/1.1 404 Not Found\r\n\r\n", RefusedError, 3),
    ],
)
def test_something_else_in_the_servers_place_ends_the_first_attempt(
    server: FakeServer, answer: bytes, error: type[TunnelError], code: int
) -> None:
    server.script = [lambda _: answer]
    with running(server) as (agent, _):
        with pytest.raises(error, match="server") as caught:
            agent.wait()
        assert caught.value.exit_code == code


def test_a_reason_that_differs_by_an_id_is_told_once() -> None:
    events = Recorder()
    agent = Agent(make_config("1", server="http://x", environ={}), events)
    for text in ("Full (request 4bf92f3577b34da6)", "Full (request 00f067aa0ba902b7)", "Down"):
        agent._enter(State.RECONNECTING, text)
    assert [events.states.get_nowait()[1] for _ in range(events.states.qsize())] == [
        "Full (request 4bf92f3577b34da6)",
        "Down",
    ]


def test_what_the_server_says_is_made_printable(server: FakeServer) -> None:
    server.script = [refuse(403, "no\x1b]0;title\x07 entry")]
    with running(server) as (agent, _):
        with pytest.raises(RefusedError) as caught:
            agent.wait()
        assert str(caught.value).isprintable()


def test_it_gives_up_after_the_connect_timeout(server: FakeServer) -> None:
    server.close()
    start = time.monotonic()
    with running(server, connect_timeout=0.7) as (agent, _):
        with pytest.raises(UnreachableError, match=r"within 0\.7 s: cannot connect.*refused") as caught:
            agent.wait()
        assert caught.value.exit_code == 5
    assert time.monotonic() - start > 0.6


def test_a_silent_server_counts_towards_the_connect_timeout() -> None:
    listener = native.create_server(("127.0.0.1", 0))
    config = make_config(
        "1", server=f"http://127.0.0.1:{listener.getsockname()[1]}", connect_timeout=0.3, environ={}
    )
    agent = Agent(config)
    with listener, pytest.raises(UnreachableError, match=r"within 0\.3 s"):
        agent.run()


# -- reconnecting ---------------------------------------------------------------


def test_a_random_name_is_asked_for_again(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        assert server.requests.get().subdomain is None
        server.sessions.get(timeout=DEADLINE).close()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert server.requests.get().subdomain == "brave-otter"
        assert events.urls == ["http://brave-otter.test"]


def test_a_random_port_is_asked_for_again(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    with running(server, kind="tcp") as (agent, events):
        agent.wait_connected(DEADLINE)
        server.sessions.get(timeout=DEADLINE).close()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert [server.requests.get().port, server.requests.get().port] == [None, 20007]


def test_a_taken_name_is_waited_for_when_reconnecting(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    with running(server, subdomain="app") as (agent, events):
        agent.wait_connected(DEADLINE)
        server.script = [refuse(409, "Subdomain not available")] * 5
        lost = time.monotonic()
        server.sessions.get(timeout=DEADLINE).close()
        reason = events.wait_for(State.RECONNECTING)
        while "not available" not in reason:
            reason = events.wait_for(State.RECONNECTING)
        assert agent.since >= lost, "the absence began with the loss"
        events.wait_for(State.CONNECTED)
        assert events.urls == ["http://app.test"]


def test_a_random_name_that_stays_taken_is_given_up(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(agent_module, "RANDOM_NAME_PATIENCE", 0.2)
    names = iter(["first", "second"])
    server.grant = lambda request: default_reply(
        request if request.subdomain else OpenRequest(Kind.HTTP, request.authority, subdomain=next(names))
    )
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)

        def taken(request: OpenRequest) -> bytes:
            assert request.subdomain == "first"
            server.script.append(taken_or_granted)
            return build_refusal(409, "Subdomain not available")

        def taken_or_granted(request: OpenRequest) -> bytes:
            if request.subdomain is None:
                return b""
            return taken(request)

        server.script = [taken]
        server.sessions.get(timeout=DEADLINE).close()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert events.urls == ["http://first.test", "http://second.test"]


def test_a_long_absence_does_not_cost_the_random_name(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    patience = 0.3
    monkeypatch.setattr(agent_module, "RANDOM_NAME_PATIENCE", patience)
    names = iter(["first", "second"])
    server.grant = lambda request: default_reply(
        request if request.subdomain else OpenRequest(Kind.HTTP, request.authority, subdomain=next(names))
    )
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        lost = time.monotonic()

        def away(_: OpenRequest) -> bytes:
            over = time.monotonic() - lost > 2 * patience
            server.script.append(taken if over else away)
            return build_refusal(503, "not now")

        def taken(_: OpenRequest) -> bytes:
            return build_refusal(409, "Subdomain not available")

        server.script = [away]
        server.sessions.get(timeout=DEADLINE).close()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert not server.script
        assert events.urls == ["http://first.test"]


def test_a_refused_user_is_not_tried_again_later(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    with running(server, subdomain="app") as (agent, _):
        agent.wait_connected(DEADLINE)
        server.script = [refuse(403, "Not you")]
        server.sessions.get(timeout=DEADLINE).close()
        with pytest.raises(RefusedError, match="Not you"):
            agent.wait()


def test_a_token_that_is_refused_right_after_a_loss_is_shown_again(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may have read a file of tokens that was being rewritten."""
    fast(monkeypatch)
    with running(server, subdomain="app") as (agent, events):
        agent.wait_connected(DEADLINE)
        server.script = [refuse(401, "The token is not valid here")] * 3
        cut(server.sessions.get(timeout=DEADLINE))
        assert events.wait_for(State.RECONNECTING)
        assert "not valid here" in events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert server.requests.qsize() == 5


def test_a_token_that_is_refused_for_a_minute_is_not_shown_for_ever(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(agent_module, "TOKEN_PATIENCE", 0.3)
    with running(server, subdomain="app") as (agent, _):
        agent.wait_connected(DEADLINE)
        server.grant = lambda _: build_refusal(401, "The token is not valid here")
        cut(server.sessions.get(timeout=DEADLINE))
        with pytest.raises(RefusedError, match="not valid here"):
            agent.wait()
        assert server.requests.qsize() > 2


def test_a_token_that_never_opened_anything_is_shown_once(server: FakeServer) -> None:
    server.script = [refuse(401, "The token is not valid here")]
    with running(server) as (agent, _), pytest.raises(RefusedError, match="not valid here"):
        agent.wait()


def test_a_goodbye_that_names_revocation_is_believed(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    with running(server, subdomain="app") as (agent, _):
        agent.wait_connected(DEADLINE)
        server.script = [refuse(401, "The token is not valid here")]
        session = server.sessions.get(timeout=DEADLINE)
        session.close(SessionClosedError(NO_ACCESS), INADEQUATE_SECURITY)
        with pytest.raises(RefusedError, match="not valid here"):
            agent.wait()
        assert server.requests.qsize() == 2


def test_a_goodbye_that_names_the_name_alone_says_nothing_of_the_token(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    with running(server, subdomain="app") as (agent, events):
        agent.wait_connected(DEADLINE)
        server.script = [refuse(401, "The token is not valid here")]
        session = server.sessions.get(timeout=DEADLINE)
        session.close(SessionClosedError(NOT_ALLOWED), INADEQUATE_SECURITY)
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)


def test_tries_with_a_refused_token_are_few() -> None:
    """A server that has forgotten the token counts them as guesses."""
    agent = Agent(make_config("1", server="http://x", environ={}))
    agent._team = cast(Any, SimpleNamespace(access_ended=False))
    refused, others = RefusedError("x", 401), (RefusedError("x", 403), UnreachableError("x"))
    now = time.monotonic()
    assert 4 <= agent._pause_after(refused, now - 4) < 5
    assert agent._pause_after(refused, now - 50) == agent_module.TOKEN_PAUSE
    assert [agent._pause_after(error, now - 4) for error in others] == [0, 0]
    assert agent._pause_after(refused, now - agent_module.TOKEN_PATIENCE) == 0


def test_a_file_of_trusted_certificates_that_is_being_replaced_ends_no_tunnel(tmp_path: Path) -> None:
    config = make_config("1", server="https://x", ca=trust_file(tmp_path / "ca.pem"), environ={})
    (tmp_path / "ca.pem").write_bytes(b"")
    with pytest.raises(UsageError, match="not a PEM file") as caught:
        dial_server(config)
    assert is_final(caught.value, first=True)
    assert not is_final(caught.value, first=False)


def test_a_stopping_server_is_left_at_once_but_its_visitors_finish(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, events):
        agent.wait_connected(DEADLINE)
        old = server.sessions.get(timeout=DEADLINE)
        stream = old.open()
        collector = Collector(stream)
        stream.sendall(b"first ")
        assert collector.arrived.wait(DEADLINE)
        old.goaway()
        assert events.wait_for(State.RECONNECTING) == "the server is stopping"
        events.wait_for(State.CONNECTED)
        assert not old.closed.is_set()
        other, other_collector = visit(server)
        other.sendall(b"second")
        other.shutdown()
        assert other_collector.whole() == b"second"
        stream.sendall(b"last")
        stream.shutdown()
        assert collector.whole() == b"first last"
        assert old.closed.wait(DEADLINE)
        assert old.error is None
        assert agent.state is State.CONNECTED
        while len(agent._sessions) > 1:
            gevent.sleep(0.01)


def test_a_reloading_server_is_reached_at_once_unless_it_reloads_all_the_time(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    monkeypatch.setattr(Backoff, "next", lambda _: waits.append("next") or 0.001)
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        server.sessions.get(timeout=DEADLINE).goaway()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert waits == []
        for count in (1, 2):
            server.sessions.get(timeout=DEADLINE).goaway()
            events.wait_for(State.RECONNECTING)
            events.wait_for(State.CONNECTED)
            assert len(waits) == count
        monkeypatch.setattr(backoff_module, "LASTING", 0.0)
        server.sessions.get(timeout=DEADLINE).goaway()
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert len(waits) == 2


def test_a_goodbye_with_a_fault_is_no_reload(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(Backoff, "hand_over", lambda _: pytest.fail("at once"))
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        server.sessions.get(timeout=DEADLINE).close(SessionClosedError("broken"), 2)
        assert events.wait_for(State.RECONNECTING) == "the server says: broken"
        events.wait_for(State.CONNECTED)


# -- bad servers, whose connections last for a second by a clock that only they and the waits move ----------


class Waits:
    """All waits of an agent between two attempts, over at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(Backoff.__init__, "__defaults__", (lambda: self.now, lambda low, high: high))
        wait, hand_over, served = Backoff.next, Backoff.hand_over, Backoff.served

        def skip(waits: Callable[[Backoff], float], backoff: Backoff) -> float:
            seconds = waits(backoff)  # 0 where it has asked the other one
            self.now += seconds
            return 0.0

        monkeypatch.setattr(Backoff, "next", lambda backoff: skip(wait, backoff))
        monkeypatch.setattr(Backoff, "hand_over", lambda backoff: skip(hand_over, backoff))
        monkeypatch.setattr(Backoff, "served", lambda backoff, _: served(backoff, 1.0))


def answers_and_dies(agent: Agent, session: Session) -> None:
    assert session.keep_alive.first_answer.wait(DEADLINE)
    assert agent.connected.wait(DEADLINE)
    cut(session)


def answers_and_says_goodbye(agent: Agent, session: Session) -> None:
    assert agent.connected.wait(DEADLINE)
    session.goaway()


def never_answers(agent: Agent, session: Session) -> None:
    assert agent.connected.wait(DEADLINE)
    cut(session)


@pytest.mark.parametrize("behave", [answers_and_dies, answers_and_says_goodbye, never_answers])
def test_a_bad_server_is_not_hammered(
    server: FakeServer, behave: Callable[[Agent, Session], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits(monkeypatch)
    start = waits.now
    if behave is never_answers:  # to PINGs
        monkeypatch.setattr(Control, "_on_ping_answer", lambda *_: None)
        monkeypatch.setattr(link, "SETTLE", 0.001)

    def misbehave() -> None:
        while True:
            behave(agent, server.sessions.get())
            waits.now += 1.0

    with running(server) as (agent, _):
        bad = gevent.spawn(misbehave)
        while waits.now < start + 50:
            gevent.sleep(0.001)
        bad.kill()
        assert 3 < server.requests.qsize() < 30, "16 in the first 30 s, then fewer and fewer"


# -- the name stays ours ------------------------------------------------------------


def kept_files(tmp_path: Path) -> list[str]:
    return [file.read_text() for file in (tmp_path / "state").glob("*")]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {"TINYTUN_STATE_DIR": str(tmp_path / "state")}


@pytest.mark.parametrize(
    "options", [{}, {"subdomain": "app"}, {"kind": "tcp", "port": 30001}, {"kind": "tcp"}]
)
def test_a_token_is_asked_for_and_shown_when_the_connection_was_lost(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    fast(monkeypatch)
    Owners(server)
    with running(server, **options) as (agent, events):
        agent.wait_connected(DEADLINE)
        assert server.requests.get().resume == ""
        for _ in range(2):
            cut(server.sessions.get(timeout=DEADLINE))
            events.wait_for(State.RECONNECTING)
            events.wait_for(State.CONNECTED)
            assert len(server.requests.get().resume or "") == 64
        assert len(events.urls) == 1
        assert server.requests.empty()


def test_a_client_that_was_killed_has_left_its_token(
    server: FakeServer, environ: dict[str, str], tmp_path: Path
) -> None:
    Owners(server)
    with running(server, subdomain="app", environ=environ) as (agent, _):
        agent.wait_connected(DEADLINE)
        (content,) = kept_files(tmp_path)
        with running(server, subdomain="app", environ=environ) as (second, _), pytest.raises(NameTakenError):
            second.wait()
        with running(server, subdomain="other", environ=environ) as (other, _):
            other.wait_connected(DEADLINE)
        assert kept_files(tmp_path) == [content]
        agent._claim.release(freed=False)  # what the kernel does at the end of a process
        with running(server, subdomain="app", environ=environ) as (next_one, _):
            next_one.wait_connected(DEADLINE)
            shown = [server.requests.get().resume for _ in range(4)]
            assert shown == ["", "", "", content.strip()]


def test_a_clean_stop_leaves_nothing(server: FakeServer, environ: dict[str, str], tmp_path: Path) -> None:
    Owners(server)
    with running(server, subdomain="app", environ=environ) as (agent, _):
        agent.wait_connected(DEADLINE)
        assert len(kept_files(tmp_path)) == 1
        agent.stop()
        assert kept_files(tmp_path) == []


@pytest.mark.parametrize("deaf", ["away", "silent"])
def test_the_token_is_kept_when_the_server_has_not_heard_the_goodbye(
    server: FakeServer, environ: dict[str, str], tmp_path: Path, deaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the name for us, and whoever asks without the token finds it taken."""
    Owners(server)
    monkeypatch.setattr(link, "FAREWELL", 0.05)
    with running(server, subdomain="app", environ=environ) as (agent, events):
        agent.wait_connected(DEADLINE)
        if deaf == "away":
            server.close()
            events.wait_for(State.RECONNECTING)
        else:
            (session,) = agent._sessions
            monkeypatch.setattr(session, "goaway", lambda: None)  # lost on the way, as
            monkeypatch.setattr(session, "finish_writing", lambda: None)  # the end is
        agent.stop()
        assert len(kept_files(tmp_path)) == 1


def test_who_is_replaced_does_not_show_the_token_again(
    server: FakeServer, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    owners = Owners(server)
    with running(server, subdomain="app", environ=environ) as (agent, events):
        agent.wait_connected(DEADLINE)
        owners.take("app")
        server.sessions.get(timeout=DEADLINE).close(SessionClosedError("replaced"), CANCEL)
        assert "another client" in events.wait_for(State.RECONNECTING)
        while "not available" not in events.wait_for(State.RECONNECTING):
            pass
        assert kept_files(tmp_path) == [""]
        assert len(events.warnings) == 1
        owners.free("app")
        events.wait_for(State.CONNECTED)
        seen = [server.requests.get().resume for _ in range(server.requests.qsize())]
        assert len(seen) > 2
        assert set(seen) == {""}
        assert kept_files(tmp_path) == [f"{owners._tokens['app']}\n"], "the new one is ours alone"


def test_an_old_session_that_we_replaced_ourselves_says_nothing_about_the_token(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    Owners(server)
    with local_service(echo) as target, running(server, target, subdomain="app") as (agent, events):
        agent.wait_connected(DEADLINE)
        old = server.sessions.get(timeout=DEADLINE)
        collector = Collector(stream := old.open())
        stream.sendall(b"x")
        assert collector.arrived.wait(DEADLINE)
        old.goaway()
        events.wait_for(State.CONNECTED)
        events.wait_for(State.CONNECTED)
        (left, _) = agent._sessions
        old.close(SessionClosedError("replaced"), CANCEL)
        assert left.closed.wait(DEADLINE)
        cut(server.sessions.get(timeout=DEADLINE))
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        shown = [server.requests.get().resume for _ in range(3)]
        assert shown[0] == ""
        assert shown[1] == shown[2] != ""
        assert events.warnings == []


def test_a_server_that_gives_no_tokens_is_no_fault(
    server: FakeServer, environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    with running(server, subdomain="app", environ=environ) as (agent, events):
        agent.wait_connected(DEADLINE)
        cut(server.sessions.get(timeout=DEADLINE))
        events.wait_for(State.RECONNECTING)
        events.wait_for(State.CONNECTED)
        assert [server.requests.get().resume for _ in range(2)] == ["", ""]
    assert not (tmp_path / "state").exists()


def test_the_token_of_a_random_name_that_is_given_up_is_forgotten(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast(monkeypatch)
    monkeypatch.setattr(agent_module, "RANDOM_NAME_PATIENCE", 0.0)
    owners = Owners(server)
    with running(server) as (agent, events):
        agent.wait_connected(DEADLINE)
        owners.take("brave-otter")
        cut(server.sessions.get(timeout=DEADLINE))
        while "not available" not in events.wait_for(State.RECONNECTING):
            pass
        owners.free("brave-otter")
        events.wait_for(State.CONNECTED)
        asked = [server.requests.get() for _ in range(server.requests.qsize())]
        assert asked[1].resume
        assert {(one.subdomain, one.resume) for one in asked[2:]} == {(None, "")}


# -- visitors -------------------------------------------------------------------


def test_bytes_pass_both_ways_and_half_close_travels(server: FakeServer) -> None:
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        payload = random.Random(1).randbytes(3_000_000)
        stream.sendall(payload)
        stream.shutdown()
        assert collector.whole() == payload
        assert collector.error is None
        assert agent.counters.total == 1
        assert agent.counters.bytes_in == agent.counters.bytes_out == len(payload)


def alive() -> int:
    """Greenlets of all kinds that have begun and not ended."""
    gc.collect()
    return sum(isinstance(item, greenlet.greenlet) and bool(item) for item in gc.get_objects())


def test_visitors_one_after_the_other_leave_no_greenlets_behind(server: FakeServer) -> None:
    counts = []
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        for number in range(10):
            stream, collector = visit(server)
            stream.sendall(b"hello")
            stream.shutdown()
            assert collector.whole() == b"hello"
            while agent.counters.visitors:
                gevent.sleep(0)
            assert agent.counters.total == number + 1
            counts.append(alive())
    assert max(counts[2:]) <= counts[1], counts


def test_data_that_arrives_before_the_service_is_connected_is_kept(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local_service(echo) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        gate = gevent.event.Event()
        dial = agent._crowd.dialer.dial
        monkeypatch.setattr(agent._crowd.dialer, "dial", lambda: (gate.wait(), dial())[1])
        stream, collector = visit(server)
        stream.sendall(b"early ")
        stream.sendall(b"words")
        stream.shutdown()
        while agent.counters.bytes_in < len(b"early words"):
            gevent.sleep(0.01)
        gate.set()
        assert collector.whole() == b"early words"


def test_the_service_may_speak_first(server: FakeServer) -> None:
    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 ready\r\n")
        echo(sock)

    with local_service(greet) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.session.flush()
        assert collector.arrived.wait(DEADLINE)
        assert collector.data_so_far == b"220 ready\r\n"
        stream.shutdown()
        collector.whole()


def test_a_service_that_resets_resets_the_visitor(server: FakeServer) -> None:
    def slam(sock: socket.socket) -> None:
        sock.recv(1)
        sock.setsockopt(native.SOL_SOCKET, native.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()

    with local_service(slam) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"x")
        collector.whole()
        assert collector.error is not None
        assert getattr(collector.error, "code", None) == CANCEL


def test_a_visitor_who_aborts_resets_the_service(server: FakeServer) -> None:
    seen: gevent.queue.Queue[object] = gevent.queue.Queue()

    def watch(sock: socket.socket) -> None:
        try:
            while data := sock.recv(10):
                seen.put(data)
            seen.put("clean end")
        except ConnectionResetError:
            seen.put("reset")

    with local_service(watch) as target, running(server, target, kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, _collector = visit(server)
        stream.sendall(b"x")
        assert seen.get(timeout=DEADLINE) == b"x"
        stream.reset(CANCEL)
        assert seen.get(timeout=DEADLINE) == "reset"


def test_a_refused_http_visitor_gets_a_page_that_says_so(server: FakeServer) -> None:
    port = free_ports(1)[0]
    with running(server, str(port)) as (agent, events):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n")
        page = collector.whole()
        head, _, body = page.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert b"Connection: close" in head
        assert f"Content-Length: {len(body)}".encode() in head
        assert f"localhost:{port}: connection refused".encode() in body
        assert collector.error is None
        exchange = events.exchanges.get(timeout=DEADLINE)
        assert (exchange.method, exchange.path, exchange.status) == ("GET", "/x", 502)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (b"Accept: text/html,application/xhtml+xml,*/*;q=0.8", b"text/html; charset=utf-8"),
        (b"ACCEPT: application/json", b"application/json"),
        (b"Accept: */*", b"application/json"),
    ],
)
def test_a_page_for_browsers_and_json_for_programs(server: FakeServer, accept: bytes, kind: bytes) -> None:
    port = free_ports(1)[0]
    with running(server, str(port)) as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"POST / HTTP/1.1\r\nHost: a\r\n")  # the rest comes when the service has refused
        assert not collector.arrived.wait(0.1)
        stream.sendall(accept + b"\r\nContent-Length: 17\r\n\r\nAccept: text/html")
        head, _, body = collector.whole().partition(b"\r\n\r\n")
        assert b"\r\nContent-Type: " + kind + b"\r\n" in head
        request_id = head.partition(b"X-Request-Id: ")[2].partition(b"\r\n")[0]
        assert len(request_id) == 12
        assert request_id in body
        if kind == b"application/json":
            answer = json.loads(body)
            assert answer["status"] == 502
            assert f"localhost:{port}: connection refused" in answer["reason"]


def test_an_upload_to_a_refused_service_is_taken_until_the_page_is_read(server: FakeServer) -> None:
    with running(server, str(free_ports(1)[0])) as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000000\r\n\r\n")
        stream.sendall(bytes(3_000_000))
        stream.shutdown()
        assert collector.whole().startswith(b"HTTP/1.1 502 ")
        assert collector.error is None


def test_a_refused_tcp_visitor_is_reset(server: FakeServer) -> None:
    with running(server, str(free_ports(1)[0]), kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.session.flush()
        collector.whole()
        assert getattr(collector.error, "code", None) == CANCEL


def test_the_service_is_reported_once_when_it_goes_and_once_when_it_is_back(server: FakeServer) -> None:
    port = free_ports(1)[0]
    with running(server, f"127.0.0.1:{port}") as (agent, events):
        agent.wait_connected(DEADLINE)
        for _ in range(3):
            stream, collector = visit(server)
            stream.session.flush()
            collector.whole()
        assert events.local == [f"127.0.0.1:{port}: connection refused"]
        assert agent.local.problem is not None
        service = StreamServer(("127.0.0.1", port), lambda sock, _: echo(sock))
        service.start()
        for _ in range(2):
            stream, collector = visit(server)
            stream.sendall(b"x")
            stream.shutdown()
            assert collector.whole() == b"x"
        service.stop()
        assert events.local == [f"127.0.0.1:{port}: connection refused", "up"]


def test_localhost_is_found_on_either_address_and_remembered(server: FakeServer) -> None:
    with local_service(echo) as target:
        port = int(target.rpartition(":")[2])
        with running(server, str(port), kind="tcp") as (agent, _):
            agent.wait_connected(DEADLINE)
            assert agent._crowd.dialer._addresses[0][1][0] == "::1"
            for _ in range(2):
                stream, collector = visit(server)
                stream.sendall(b"x")
                stream.shutdown()
                assert collector.whole() == b"x"
                assert agent._crowd.dialer._addresses[0][1][0] == "127.0.0.1"


def test_a_unix_socket_as_target(server: FakeServer, tmp_path: Any) -> None:
    path = str(tmp_path / "app.sock")
    listener = socket.socket(native.AF_UNIX, native.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    service = StreamServer(listener, lambda sock, _: echo(sock))
    service.start()
    with running(server, f"unix:{path}", kind="tcp") as (agent, _):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"x")
        stream.shutdown()
        assert collector.whole() == b"x"
    service.stop()


def test_exchanges_are_reported_one_by_one(server: FakeServer) -> None:
    def http(sock: socket.socket) -> None:
        for answer in (b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\n"):
            request = b""
            while b"\r\n\r\n" not in request:
                request += sock.recv(4096)
            sock.sendall(answer + b"Content-Length: 0\r\n\r\n")

    with local_service(http) as target, running(server, target) as (agent, events):
        agent.wait_connected(DEADLINE)
        stream, _ = visit(server)
        for line in (b"GET /a?secret=1 HTTP/1.1\r\n", b"POST /b\x1b[1m HTTP/1.1\r\n"):
            stream.sendall(line + b"Host: a\r\n\r\n")
            exchange = events.exchanges.get(timeout=DEADLINE)
            assert 0 <= exchange.seconds < DEADLINE
            assert "secret" not in exchange.path
            if exchange.method == "GET":
                assert (exchange.path, exchange.status) == ("/a", 200)
            else:
                assert (exchange.path, exchange.status) == ("/b?[1m", 404)


def test_an_observer_is_not_fooled_by_bodies() -> None:
    seen: list[Exchange] = []
    observer = Observer(seen.append, clock=lambda: 0.0)
    observer.to_service(b"PUT /file HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    observer.to_service(b"GET /inside HTTP/1.1\r\n")
    observer.to_visitor(b"HTTP/1.1 201 Created\r\n\r\n")
    observer.to_visitor(b"HTTP/1.1 500 in a body\r\n")
    observer.to_service(b"plain body bytes")
    observer.to_visitor(b"HTTP/1.1 500 in a body\r\n")
    assert seen == [Exchange("PUT", "/file", 201, 0.0)]


def test_an_observer_understands_what_the_server_does() -> None:
    seen: list[Exchange] = []
    observer = Observer(seen.append, clock=lambda: 0.0)
    for answer in (b"HTTP/1.1 100 X\n\nHTTP/1.1 103 X\r\n\nHTTP/1.1 999\n", b"HTTP/1.1 600\n\n"):
        observer.to_service(b"GET /a HTTP/1.1\r\n")
        observer.to_visitor(memoryview(answer))
    assert [exchange.status for exchange in seen] == [999, 600]


def test_an_observer_takes_no_time_over_hostile_bytes() -> None:
    observer = Observer(lambda _: None)
    start = time.thread_time()
    observer.to_service(b"GET " + b"a" * 1_000_000 + b" ")
    observer.to_service(b"GET " + b"a?" * 500_000 + b" HTTP/1.1 \r\n")
    assert time.thread_time() - start < 1  # of a processor; what is quadratic would take minutes
    assert not observer.awaiting


# -- stopping -------------------------------------------------------------------


def test_stop_lets_a_running_exchange_finish(server: FakeServer) -> None:
    go_on = gevent.event.Event()

    def slow(sock: socket.socket) -> None:
        sock.recv(10)
        go_on.wait(DEADLINE)
        sock.sendall(b"answer")

    with local_service(slow) as target, running(server, target, kind="tcp") as (agent, events):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.sendall(b"question")
        stream.shutdown()
        while not agent.counters.bytes_in:
            gevent.sleep(0.01)
        stopping = gevent.spawn(agent.stop)
        events.wait_for(State.CLOSING)
        go_on.set()
        assert collector.whole() == b"answer"
        assert collector.error is None
        stopping.get(timeout=DEADLINE)
        assert agent.state is State.CLOSED
        assert stream.session.goaway_received


def test_stop_does_not_wait_longer_than_it_may(server: FakeServer) -> None:
    with (
        local_service(lambda sock: sock.recv(10) and None) as target,
        running(server, target, kind="tcp") as (agent, _),
    ):
        agent.wait_connected(DEADLINE)
        stream, collector = visit(server)
        stream.session.flush()
        while not agent.counters.visitors:
            gevent.sleep(0.01)
        agent.stop(grace=0.2)  # and the visitor never ends by himself
        collector.whole()
        assert agent.counters.visitors == 0


def test_a_second_stop_cuts_the_first_short(server: FakeServer) -> None:
    with (
        local_service(lambda sock: sock.recv(10) and None) as target,
        running(server, target, kind="tcp") as (agent, _),
    ):
        agent.wait_connected(DEADLINE)
        stream, _collector = visit(server)
        stream.session.flush()
        while not agent.counters.visitors:
            gevent.sleep(0.01)
        first = gevent.spawn(agent.stop, 30.0)
        gevent.sleep(0)
        agent.stop(grace=0)
        first.get(timeout=DEADLINE)


def test_stop_ends_an_agent_that_is_still_trying(server: FakeServer) -> None:
    server.close()
    events = Recorder()
    agent = Agent(make_config("1", server=server.url, environ={}), events)
    runner = gevent.spawn(agent.run)
    events.wait_for(State.CONNECTING)
    agent.stop()
    assert runner.get(timeout=DEADLINE) is None
    assert agent.state is State.CLOSED


@pytest.mark.parametrize(
    ("url", "tidy"),
    [
        ("http://a.b", "http://a.b"),
        ("http://a.b/", "http://a.b"),
        ("http://a.b:80/", "http://a.b"),
        ("https://a.b:443", "https://a.b"),
        ("http://a.b:443", "http://a.b:443"),
        ("https://a.b:8443/", "https://a.b:8443"),
        ("http://[::1]:80", "http://[::1]"),
        ("http://a.b:99999", "http://a.b:99999"),
    ],
)
def test_tidy_urls(url: str, tidy: str) -> None:
    assert tidy_url(url) == tidy
