"""The framing corpus through the real edge: two tunnels, services that log every byte.

Nothing invalid is forwarded, nothing crosses from one tunnel or visitor to another, and a
response that makes no sense is 502 or a reset. What reaches a service is checked by rules of
this file's own, not by the parser under test.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from framing_corpus import (
    INVALID_REQUESTS,
    INVALID_RESPONSES,
    UNTIL_CLOSE,
    VALID_REQUESTS,
    VALID_RESPONSES,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Peer, Service, connect, eventually, read_response, request, respond

from tinytun_gevent import Tunnel, TunnelServer
from tinytun_gevent.server.edge import Edge

REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ (/[\x21-\x7e]*|\*) HTTP/1\.[01]")
FIELD_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: ?[\t\x20-\x7e\x80-\xff]*")
CHUNK_LINE = re.compile(rb"(0|[1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")


# -- the world -------------------------------------------------------------------------------------


@dataclass
class World:
    """A server, two tunnels and their services; what each service got since :meth:`mark`."""

    server: TunnelServer
    demo: Service
    other: Service
    #: What ``demo`` answers to everything but a canary; None: a normal answer.
    answer: bytes | None = None
    #: Whether it closes the connection behind that.
    then_close: bool = False
    _marks: dict[Peer, int] = field(default_factory=dict)
    _canary: int = 0

    def mark(self) -> None:
        self._marks = {peer: len(peer.received) for peer in (*self.demo.peers, *self.other.peers)}

    def got(self, service: Service) -> list[bytes]:
        """What came on each connection of a service since the mark, where anything came."""
        fresh = (bytes(peer.received[self._marks.get(peer, 0) :]) for peer in service.peers)
        return [data for data in fresh if data]

    def settle(self) -> None:
        """Waits until the services have read all that was sent to them, also of aborted requests."""
        for service, name in ((self.demo, "demo"), (self.other, "other")):
            tunnel = self.server.registry.tunnels[name]
            eventually(
                lambda service=service, tunnel=tunnel: sum(not peer.ended.is_set() for peer in service.peers)
                == sum(session.stream_count for session in tunnel.sessions),
                what="a connection to the service for each stream, and no other",
            )

    def canaries(self) -> None:
        """Both tunnels still answer new visitors with what is meant for them, and nothing else."""
        for name in ("demo", "other"):
            self._canary += 1
            target = f"/canary/{self._canary}"
            with connect(self.server.proxy_port) as sock:
                sock.sendall(request(name, target, b"Connection: close"))
                response = read_response(sock)
                assert (response.status, response.body) == (200, f"{name} {target}".encode())
                assert sock.recv(1) == b""


def script_of(name: bytes, world: list[World]) -> Any:
    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            special = world[0].answer if world and name == b"demo" else None
            if special is None or got.target.startswith(b"/canary/"):
                answer = respond(name + b" " + got.target)
                peer.sendall(answer[: answer.index(b"\r\n\r\n") + 4] if got.method == b"HEAD" else answer)
                continue
            peer.sendall(special)
            if world[0].then_close:
                return

    return script


@pytest.fixture(scope="module")
def shared() -> Iterator[World]:
    ports = dict.fromkeys(("connection_port", "proxy_port", "tcp_proxy_port", "metadata_port"), 0)
    holder: list[World] = []
    with (
        TunnelServer(bind="127.0.0.1", base_domains="localhost", **ports) as server,
        Service(script_of(b"demo", holder)) as demo,
        Service(script_of(b"other", holder)) as other,
        Tunnel(demo.target, server=server.url, proxy="", subdomain="demo"),
        Tunnel(other.target, server=server.url, proxy="", subdomain="other"),
    ):
        holder.append(World(server, demo, other))
        yield holder[0]
        edge = next(front for front in server.core.fronts if isinstance(front, Edge))
        eventually(lambda: edge.visitors == 0, what="no visitor of the corpus is left behind")
        for tunnel in server.registry.tunnels.values():
            eventually(
                lambda tunnel=tunnel: tunnel.pool.idle_count == sum(s.stream_count for s in tunnel.sessions),
                what="no stream is open that nobody can use",
            )


@pytest.fixture
def world(shared: World) -> World:
    shared.answer, shared.then_close = None, False
    shared.mark()
    return shared


def check_forwarded(data: bytes, host: bytes = b"demo.localhost") -> int:
    """Checks that ``data`` is a sequence of well-formed requests for ``host``, the last one perhaps
    cut short; returns how many are whole.
    """
    whole = 0
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"a head came in part: {head!r}"
        lines = head.split(b"\r\n")
        assert REQUEST_LINE.fullmatch(lines[0]), lines[0]
        for line in lines[1:]:
            assert FIELD_LINE.fullmatch(line), line
        names = [line.split(b":")[0].lower().replace(b"_", b"-") for line in lines[1:]]
        assert names.count(b"host") == 1
        value = next(line for line in lines[1:] if line.lower().startswith(b"host:"))
        assert value.lower()[5:].strip(b" \t").partition(b":")[0].rstrip(b".") == host
        framing = [name for name in names if name in (b"content-length", b"transfer-encoding")]
        assert len(framing) <= 1
        assert not {b"te", b"trailer", b"keep-alive", b"proxy-connection", b"http2-settings"} & set(names)
        rest = after_body(data, lines[1 + names.index(framing[0])] if framing else b"")
        if rest is None:
            return whole
        data = rest
        whole += 1
    return whole


def after_body(data: bytes, framing: bytes) -> bytes | None:
    """What follows a request's body; None if the body is cut short. Fails on malformed chunks."""
    if not framing:
        return data
    value = framing.partition(b":")[2].strip()
    if value != b"chunked":
        assert value.isdigit()
        return data[int(value) :] if len(data) >= int(value) else None
    while b"\r\n" in data:
        line = CHUNK_LINE.match(data)
        assert line, data[:100]
        data = data[line.end() :]
        size = int(line[1], 16)
        if not size:
            assert b"\r\n".startswith(data[:2]), "a trailer"
            return data[2:] if len(data) > 1 else None
        if len(data) < size + 2:
            return None
        assert data[size : size + 2] == b"\r\n"
        data = data[size + 2 :]
    return None


# -- requests --------------------------------------------------------------------------------------


def ids(cases: list[Any]) -> list[str]:
    return [case[0] for case in cases]


def answers(sock: socket.socket, data: bytes, drops: int) -> tuple[list[int], bool]:
    """Sends ``data``; the statuses of all answers until the connection ends, and whether by a reset."""
    statuses: list[int] = []
    try:
        if drops:
            for start in range(0, len(data), drops):
                sock.sendall(data[start : start + drops])
        else:
            sock.sendall(data)
    except ConnectionError:
        pass  # refused before its end
    try:
        while sock.recv(1, socket.MSG_PEEK):
            statuses.append(read_response(sock).status)
    except ConnectionError:
        return statuses, True
    return statuses, False


@pytest.mark.parametrize(("name", "data", "status"), INVALID_REQUESTS, ids=ids(INVALID_REQUESTS))
def test_an_invalid_request_is_refused_and_not_forwarded(
    world: World, name: str, data: bytes, status: int
) -> None:
    with connect(world.server.proxy_port) as sock:
        statuses, _ = answers(sock, data + request("other", "/smuggled"), 0)
    assert statuses == [status]
    assert world.got(world.demo) == []
    assert world.got(world.other) == []
    world.canaries()


BROKEN_BODIES = [case for case in INVALID_REQUESTS if case[0].startswith("body/")]


@pytest.mark.parametrize(("name", "data", "status"), BROKEN_BODIES, ids=ids(BROKEN_BODIES))
def test_a_body_that_breaks_late_is_cut_off(world: World, name: str, data: bytes, status: int) -> None:
    """Its valid beginning has been forwarded; the service must see it end without a whole message."""
    head = data.index(b"\r\n\r\n") + 4
    with connect(world.server.proxy_port) as sock:
        sock.sendall(data[:head])
        eventually(lambda: world.got(world.demo))
        rest = data[head:] + request("other", "/smuggled")
        statuses, was_reset = answers(sock, rest, 1 if len(data) < 500 else 0)
    assert statuses == [status] or (statuses == [] and was_reset)
    (got,) = world.got(world.demo)
    assert check_forwarded(got) == 0
    assert world.got(world.other) == []
    assert b"/smuggled" not in got
    world.canaries()


@pytest.mark.parametrize("drops", [0, 7], ids=["whole", "drops"])
@pytest.mark.parametrize(("name", "data"), VALID_REQUESTS, ids=ids(VALID_REQUESTS))
def test_a_valid_request_is_answered_once(world: World, name: str, data: bytes, drops: int) -> None:
    """A request for the other tunnel behind it is told from its body, however the bytes are cut."""
    behind = request("other", "/behind", b"Connection: close")
    with connect(world.server.proxy_port) as sock:
        statuses, was_reset = answers(sock, data + behind, drops if len(data) < 1000 else 4096)
    assert not was_reset
    line = data.lstrip(b"\r\n").split(b"\r\n")[0]
    ends = line.endswith(b"HTTP/1.0") or b"connection: close" in data.lower() or b", close" in data
    assert statuses == ([200] if ends else [200, 200])
    (got,) = world.got(world.demo)
    assert check_forwarded(got) == 1
    others = world.got(world.other)
    assert len(others) == (0 if ends else 1)
    if others:
        assert others[0].startswith(b"GET /behind HTTP/1.1\r\n")
        assert check_forwarded(others[0], b"other.localhost") == 1


# -- responses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method", "data"), INVALID_RESPONSES, ids=ids(INVALID_RESPONSES))
def test_an_invalid_response_is_502_or_a_reset(world: World, name: str, method: bytes, data: bytes) -> None:
    world.answer = data
    with connect(world.server.proxy_port) as sock:
        sock.sendall(request("demo", "/", method=method))
        try:
            response = read_response(sock, method)
            if response.status < 200:
                response = read_response(sock, method)
            status = response.status
        except (ConnectionResetError, EOFError):
            status = 0
    assert status in (0, 502)
    if not name.startswith("body/"):
        assert status == 502, "nothing had been sent yet, so the reason could have been told"
    world.canaries()


@pytest.mark.parametrize(("name", "method", "data", "length"), VALID_RESPONSES, ids=ids(VALID_RESPONSES))
def test_a_valid_response_is_delivered_alone(
    world: World, name: str, method: bytes, data: bytes, length: int
) -> None:
    world.answer, world.then_close = data, length == UNTIL_CLOSE
    with connect(world.server.proxy_port) as sock:
        sock.sendall(request("demo", "/", method=method))
        response = read_response(sock, method)
        while response.status < 200:
            assert response.get(b"content-length") is None
            assert response.get(b"transfer-encoding") is None
            response = read_response(sock, method)
        assert response.start[8:].rstrip() in data  # status and reason, in our own version
        body = re.split(rb"\n\r?\n", data)[-1] if length == UNTIL_CLOSE else b"hello"
        assert response.body == (body if length else b"")
        if length == UNTIL_CLOSE:
            assert sock.recv(1) == b""
        else:
            sock.sendall(request("demo", "/canary/same"))
            again = read_response(sock)
            assert (again.status, again.body) == (200, b"demo /canary/same")
    world.canaries()


# -- anything --------------------------------------------------------------------------------------

SMALL_VALID = [data for _, data in VALID_REQUESTS if len(data) < 400]
NASTY = [b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b"\0", b",", b";", b"0\r\n\r\n", b"Content-Length: 3\r\n"]
NASTY += [b"Transfer-Encoding: chunked\r\n", b"Host: demo.localhost\r\n", b"5\r\n", b" HTTP/1.1", b"\x0b"]


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A valid request, or two, with a few edits."""
    data = b"".join(draw(st.lists(st.sampled_from(SMALL_VALID), min_size=1, max_size=2)))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 4)))
        data = data[:start] + draw(st.sampled_from([b"", *NASTY])) + data[end:]
    return data


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=mangled(), drops=st.sampled_from([0, 0, 5]))
def test_whatever_is_sent_only_well_formed_requests_are_forwarded(
    world: World, data: bytes, drops: int
) -> None:
    world.mark()
    with connect(world.server.proxy_port) as sock:
        try:
            for start in range(0, len(data), drops or len(data) or 1):
                sock.sendall(data[start : start + (drops or len(data))])
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        statuses, _ = answers(sock, b"", 0)
    world.settle()
    assert all(status in (200, 400, 404, 414, 417, 421, 431, 501, 505) for status in statuses), statuses
    for service, host in ((world.demo, b"demo.localhost"), (world.other, b"other.localhost")):
        for got in world.got(service):
            check_forwarded(got, host)
