"""Answers that visitors could not be given: codes on the wire, words and rows for the service's owner."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable

import pytest
from conftest import OpenTunnel, StartServer, StartService
from h2.events import RequestReceived, StreamReset
from raw_client import RawClient
from support import DEADLINE, Peer, Source, connect, eventually, get, read_rest, request, respond

from tinytun_gevent import TunnelServer
from tinytun_gevent.client.events import Listener
from tinytun_gevent.client.faults import TEXTS, fault_of
from tinytun_gevent.client.observe import Exchange
from tinytun_gevent.client.target import parse_target
from tinytun_gevent.errors import SessionClosedError, StreamResetError
from tinytun_gevent.stream import CANCEL
from tinytun_gevent.wire.answer_codes import AnswerCode

HEAD = b"HTTP/1.1 200 OK\r\n"


class Owner(Listener):
    """Notes what the owner of the service is told."""

    def __init__(self, watches: bool = True) -> None:
        self.wants_exchanges = watches
        self.problems: queue.Queue[str] = queue.Queue()
        self.rows: list[Exchange] = []

    def bad_answer(self, problem: str) -> None:
        self.problems.put(problem)

    def exchange(self, exchange: Exchange) -> None:
        self.rows.append(exchange)


def saying(data: bytes, *, after: bool = True, closes: bool = False) -> Callable[[Peer], None]:
    """A service that sends ``data`` when it has read a request, or at once, and then waits or closes."""

    def script(peer: Peer) -> None:
        if after:
            peer.read_head()
        peer.sendall(data)
        if not closes:
            with contextlib.suppress(ConnectionError):
                peer.rest()

    return script


def resetting(peer: Peer) -> None:
    peer.read_head()
    peer.reset()


CASES: dict[str, tuple[Callable[[Peer], None], int, str]] = {
    "a banner": (saying(b"SSH-2.0-OpenSSH_9.2\r\n", after=False), 502, "try `tinytun tcp {port}`"),
    "an error line": (saying(b"-ERR unknown command 'GET'\r\n"), 502, "does not speak HTTP"),
    "an alert of TLS": (
        saying(b"\x15\x03\x01\x00\x02\x02\x46"),
        502,
        "speaks TLS; try `tinytun http https://127.0.0.1:{port}`",
    ),
    "a malformed head": (saying(HEAD + b"no colon\r\n\r\n"), 502, "sent a malformed response head"),
    "a close": (saying(b"", closes=True), 502, "closed the connection before its answer was complete"),
    "a reset": (resetting, 502, "reset the connection before"),
    "half a head": (saying(HEAD, closes=True), 502, "closed the connection before its answer was complete"),
}


@pytest.mark.parametrize("watches", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_visitor_is_told_at_once_and_the_owner_why(
    start_service: StartService, open_tunnel: OpenTunnel, server: TunnelServer, name: str, watches: bool
) -> None:
    script, status, text = CASES[name]
    service, owner = start_service(script), Owner(watches)
    open_tunnel(service, events=owner)
    answer = get(server.proxy_port, "demo", "/page?secret=1", method=b"POST")
    assert answer.status == status
    assert b"local service" in answer.body
    problem = owner.problems.get(timeout=DEADLINE)
    assert problem.startswith(f"127.0.0.1:{service.port} ")
    assert text.format(port=service.port) in problem
    if watches:
        eventually(lambda: owner.rows and owner.rows[-1].problem)
        row = owner.rows[-1]
        assert (row.method, row.path, row.status, row.problem) == ("POST", "/page", status, problem)
    else:
        assert not owner.rows


@pytest.mark.parametrize(
    ("body", "rest", "text"),
    [
        (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"no size\r\n", "chunks are malformed"),
        (b"Content-Length: 9\r\n\r\nabc", b"", "before its answer was complete"),
    ],
)
def test_an_answer_that_breaks_off_is_told_as_well(
    start_service: StartService,
    open_tunnel: OpenTunnel,
    server: TunnelServer,
    body: bytes,
    rest: bytes,
    text: str,
) -> None:
    owner, begun = Owner(), threading.Event()

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(HEAD + body)
        assert begun.wait(DEADLINE)
        peer.sendall(rest)

    open_tunnel(start_service(script), events=owner)
    with connect(server.proxy_port) as visitor:
        visitor.sendall(request())
        assert Source(visitor).until(b"abc").endswith(b"abc")
        begun.set()
        with pytest.raises(ConnectionError):
            read_rest(visitor)
    assert text in owner.problems.get(timeout=DEADLINE)
    eventually(lambda: [row.status for row in owner.rows] == [200, 502])


def test_a_service_that_is_too_slow(
    start_service: StartService, open_tunnel: OpenTunnel, start_server: StartServer
) -> None:
    owner, slow = Owner(), start_server(answer_timeout=1)
    open_tunnel(start_service(saying(b"")), server=slow, events=owner)
    assert get(slow.proxy_port).status == 504
    assert "did not answer in the server's time" in owner.problems.get(timeout=DEADLINE)
    eventually(lambda: [row.status for row in owner.rows] == [504])


def test_good_answers_and_visitors_that_leave_are_no_faults(
    start_service: StartService, open_tunnel: OpenTunnel, server: TunnelServer
) -> None:
    port: int = server.proxy_port

    def script(peer: Peer) -> None:
        while (got := peer.read_head()) is not None:
            if got.target == b"/wait":
                peer.rest()
                return
            peer.sendall(respond())

    owner, service = Owner(), start_service(script)
    open_tunnel(service, events=owner)
    assert get(port).status == 200
    with connect(port) as visitor:
        visitor.sendall(request("demo", "/wait"))
        eventually(lambda: any(got.target == b"/wait" for got in service.requests))
    eventually(lambda: all(peer.ended.is_set() for peer in service.peers if peer.requests[-1:] != []))
    assert get(port).status == 200
    assert owner.problems.empty()


@pytest.mark.parametrize("announces", [True, False])
def test_only_clients_that_know_the_codes_get_them(server: TunnelServer, announces: bool) -> None:
    with RawClient(server, announces=announces) as client, connect(server.proxy_port) as visitor:
        visitor.sendall(request())
        stream = client.next(RequestReceived).stream_id
        client.accept(stream)
        client.send(stream, b"220 mail.example ESMTP\r\n")
        assert client.next(StreamReset).error_code == (AnswerCode.NOT_HTTP if announces else CANCEL)


# -- words -------------------------------------------------------------------------------------------


def test_every_code_has_its_words() -> None:
    assert set(TEXTS) == set(AnswerCode)
    for code in AnswerCode:
        fault = fault_of(StreamResetError(code, remote=True), parse_target("22"), awaiting=True)
        assert fault is not None
        assert fault[1].startswith("localhost:22 ")
        assert "{" not in fault[1]


@pytest.mark.parametrize(
    "error",
    [
        None,
        SessionClosedError("gone"),
        StreamResetError(CANCEL, remote=True),
        StreamResetError(AnswerCode.NOT_HTTP, remote=False),
        StreamResetError(0x7474_FFFF, remote=True),
    ],
)
def test_other_ends_of_a_stream_are_nobodys_fault(error: StreamResetError | None) -> None:
    assert fault_of(error, parse_target("22"), awaiting=False) is None


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("22", "tinytun tcp 22`"),
        ("10.0.0.7:22", "tinytun tcp 10.0.0.7:22`"),
        ("[fd00::7]:22", "tinytun tcp [fd00::7]:22`"),
        ("unix:/run/x.sock", "tinytun tcp unix:/run/x.sock`"),
    ],
)
def test_the_hint_is_a_command_that_works(target: str, hint: str) -> None:
    fault = fault_of(StreamResetError(AnswerCode.NOT_HTTP, remote=True), parse_target(target), awaiting=True)
    assert fault is not None
    assert fault[1].endswith(hint)
