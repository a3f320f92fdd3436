"""A scripted server that speaks the real wire protocol, in the test's own hub, and an agent for it."""

from __future__ import annotations

import secrets
import socket as native
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gevent
import gevent.event
import gevent.queue
from gevent import socket
from gevent.server import StreamServer

from tinytun_gevent.client.agent import Agent
from tinytun_gevent.client.config import make_config
from tinytun_gevent.client.events import Listener, State
from tinytun_gevent.client.observe import Exchange
from tinytun_gevent.errors import SessionError
from tinytun_gevent.session import Session
from tinytun_gevent.stream import Stream
from tinytun_gevent.wire.handshake import (
    Kind,
    OpenReply,
    OpenRequest,
    build_refusal,
    build_reply,
    head_end,
    parse_request,
)

DEADLINE = 60.0


class FakeServer:
    """Answers each CONNECT with what the test put into ``script``, then grants everything."""

    def __init__(self) -> None:
        self.requests: gevent.queue.Queue[OpenRequest] = gevent.queue.Queue()
        self.sessions: gevent.queue.Queue[Session] = gevent.queue.Queue()
        self.script: list[Callable[[OpenRequest], bytes]] = []
        self.grant: Callable[[OpenRequest], OpenReply | bytes] = lambda request: default_reply(request)
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._server.start()
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.all: list[Session] = []

    def _serve(self, sock: socket.socket, _: Any) -> None:
        received = b""
        while head_end(received) < 0:
            chunk = sock.recv(4096)
            if not chunk:
                return
            received += chunk
        request = parse_request(received[: head_end(received)])
        assert isinstance(request, OpenRequest)
        self.requests.put(request)
        if self.script:
            sock.sendall(self.script.pop(0)(request))
            sock.close()
            return
        answer = self.grant(request)
        if isinstance(answer, bytes):
            sock.sendall(answer)
            sock.close()
            return
        sock.sendall(build_reply(answer))
        session = Session(sock, opener=True)
        self.all.append(session)
        session.start()
        self.sessions.put(session)
        session.closed.wait()

    def close(self) -> None:
        self._server.stop()
        for session in self.all:
            session.close()


def default_reply(request: OpenRequest) -> OpenReply:
    if request.kind is Kind.HTTP:
        name = request.subdomain or "brave-otter"
        options = request.options.names if request.options is not None else ()
        return OpenReply("0" * 32, domain=f"{name}.test", subdomain=name, host_header=True, options=options)
    return OpenReply("0" * 32, port=request.port or 20007)


def refuse(status: int, reason: str, retry_after: int | None = None) -> Callable[[OpenRequest], bytes]:
    return lambda _: build_refusal(status, reason, retry_after)


class Owners:
    """Grants names as a real server does: one that somebody has goes to nobody but who shows its token."""

    def __init__(self, server: FakeServer) -> None:
        self._server = server
        self._tokens: dict[str, str] = {}
        server.grant = self.grant

    def grant(self, request: OpenRequest) -> OpenReply | bytes:
        granted = default_reply(request)
        name = granted.subdomain or str(granted.port)
        token = self._tokens.get(name)
        if token is not None and request.resume != token:
            return build_refusal(409, "Subdomain not available")
        if request.resume is None:
            return granted
        self._tokens[name] = token or secrets.token_hex(32)
        return replace(granted, resume=self._tokens[name])

    def take(self, name: str) -> None:
        """Somebody else has it from now on."""
        self._tokens[name] = secrets.token_hex(32)

    def free(self, name: str) -> None:
        """Nobody has it any more."""
        del self._tokens[name]


class Recorder(Listener):
    """Remembers everything that the agent reports."""

    wants_exchanges = True

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.states: gevent.queue.Queue[tuple[State, str]] = gevent.queue.Queue()
        self.warnings: list[str] = []
        self.local: list[str] = []
        self.exchanges: gevent.queue.Queue[Exchange] = gevent.queue.Queue()

    def url(self, url: str) -> None:
        self.urls.append(url)

    def state(self, state: State, reason: str) -> None:
        self.states.put((state, reason))

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def local_down(self, problem: str) -> None:
        self.local.append(problem)

    def local_up(self) -> None:
        self.local.append("up")

    def exchange(self, exchange: Exchange) -> None:
        self.exchanges.put(exchange)

    def wait_for(self, state: State) -> str:
        with gevent.Timeout(DEADLINE):
            while True:
                seen, reason = self.states.get()
                if seen is state:
                    return reason


class Collector:
    """A receiver for the opener's end of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.data_so_far = bytearray()
        self.arrived = gevent.event.Event()
        self.ended = gevent.event.Event()
        self.error: SessionError | None = None
        self._stream = stream
        stream.receiver = self

    def data(self, view: memoryview) -> None:
        self.data_so_far += view
        self._stream.consumed(len(view))
        self.arrived.set()

    def eof(self) -> None:
        self.ended.set()

    def aborted(self, error: SessionError) -> None:
        self.error = error
        self.ended.set()

    def whole(self) -> bytes:
        assert self.ended.wait(DEADLINE)
        return bytes(self.data_so_far)


@contextmanager
def running(server: FakeServer, target: str = "1", **options: Any) -> Iterator[tuple[Agent, Recorder]]:
    events = Recorder()
    options.setdefault("environ", {})
    agent = Agent(make_config(target, server=server.url, **options), events)
    agent.start()
    try:
        yield agent, events
    finally:
        agent.stop(grace=0)


@contextmanager
def local_service(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """A service on 127.0.0.1; yields the target that names it."""

    def serve(sock: socket.socket, _: Any) -> None:
        handle(sock)

    service = StreamServer(("127.0.0.1", 0), serve)
    service.start()
    try:
        yield f"127.0.0.1:{service.server_port}"
    finally:
        service.stop()


def echo(sock: socket.socket) -> None:
    try:
        while data := sock.recv(65536):
            sock.sendall(data)
        sock.shutdown(native.SHUT_WR)
    except OSError:
        pass  # the visitor was cut off


def visit(server: FakeServer) -> tuple[Stream, Collector]:
    session = server.sessions.get(timeout=DEADLINE)
    server.sessions.put(session)
    stream = session.open()
    return stream, Collector(stream)
