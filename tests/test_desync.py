"""A service that breaks every rule, visitors who share its streams: each gets what is his own, or an error.

Every request has a mark of its own, which is in each byte sequence that the service sends because of it.
All that a visitor reads is looked through for marks: none of another visitor's, none of a request that he
has not sent on that connection, none out of order. What the service got is looked through as well.
"""

from __future__ import annotations

import errno
import random
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import OpenTunnel, StartService
from support import Peer, Request, connect, get, request, respond

from tinytun_gevent import TunnelServer

VISITORS = 6
ROUNDS = 50
MARK = re.compile(rb"<(\d+)-(\d+)>")

Misdeed = Callable[[Peer, Request, bytes], bool]
"""Answers a request in the wrong way, with its mark; whether the connection goes on."""


def hinted(mark: bytes, *fields: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 103 Early Hints", b"X-Mark: " + mark, *fields, b"", b""])


def sending(answer: Callable[[bytes], bytes], *, goes_on: bool = True) -> Misdeed:
    def misdeed(peer: Peer, got: Request, mark: bytes) -> bool:
        peer.sendall(answer(mark))
        return goes_on

    return misdeed


def cut_by_reset(peer: Peer, got: Request, mark: bytes) -> bool:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + mark * 10)
    peer.reset()
    return False


def early(peer: Peer, got: Request, mark: bytes) -> bool:
    """Final before the body has been read, and closed: what is left of the body is nobody's request."""
    peer.sendall(respond(mark, status=b"413 Content Too Large"))
    return False


def switched(peer: Peer, got: Request, mark: bytes) -> bool:
    """An upgrade, asked for or not, with bytes of the new protocol right behind it."""
    peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n" + mark)
    return False


EVIL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-Evil: "
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

MISDEEDS: dict[str, Misdeed] = {
    "good": sending(lambda mark: respond(mark * 3)),
    "chunked": sending(lambda mark: CHUNKED + b"%x\r\n%b\r\n0\r\nX-T: %b\r\n\r\n" % (len(mark), mark, mark)),
    "closed": sending(lambda mark: respond(mark, b"Connection: close"), goes_on=False),
    "closed-unsaid": sending(respond, goes_on=False),
    "until-close": sending(lambda mark: b"HTTP/1.0 200 OK\r\n\r\n" + mark * 5, goes_on=False),
    "cut": sending(lambda mark: b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + mark, goes_on=False),
    "cut-chunked": sending(lambda mark: CHUNKED + b"fff\r\n" + mark, goes_on=False),
    "cut-head": sending(lambda mark: b"HTTP/1.1 200 OK\r\nX: " + mark, goes_on=False),
    "cut-reset": cut_by_reset,
    "silent": lambda peer, got, mark: False,
    "excess": sending(lambda mark: respond(mark) + EVIL + mark + b"\r\n\r\nevil"),
    "excess-bytes": sending(lambda mark: respond(mark) + mark),
    "excess-chunked": sending(lambda mark: CHUNKED + b"0\r\n\r\n" + EVIL + mark + b"\r\n\r\nevil"),
    "excess-204": sending(lambda mark: b"HTTP/1.1 204 No Content\r\n\r\n" + mark),
    "excess-304": sending(lambda mark: b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n" + mark),
    "head-body": sending(lambda mark: respond(mark * 2)),
    "early": early,
    "hints": sending(lambda mark: hinted(mark) * 3 + respond(mark)),
    "hints-length": sending(lambda mark: hinted(mark, b"Content-Length: 5") + respond(mark)),
    "hints-flood": sending(lambda mark: hinted(mark) * 200 + respond(mark)),
    "hints-only": sending(hinted, goes_on=False),
    "continued": sending(lambda mark: b"HTTP/1.1 100 Continue\r\n\r\n" * 2 + respond(mark)),
    "switched": switched,
    "two-lengths": sending(lambda mark: respond(mark, b"Content-Length: 1")),
    "length-and-chunks": sending(lambda mark: respond(mark, b"Transfer-Encoding: chunked")),
    "bare-lf": sending(lambda mark: b"HTTP/1.1 200 OK\nContent-Length: 1\n\n" + mark),
    "folded": sending(lambda mark: b"HTTP/1.1 200 OK\r\nX: a\r\n " + mark + b"\r\nContent-Length: 0\r\n\r\n"),
    "garbage": sending(lambda mark: mark + b"\r\n\r\n" + respond(mark)),
    "chunk-garbage": sending(lambda mark: CHUNKED + b"zz\r\n" + mark),
    "chunk-late": sending(lambda mark: CHUNKED + b"1\r\nab\r\n" + mark),
}


def misbehaving(peer: Peer) -> None:
    """Does what the target of each request says: ``/misdeed/<mark>``."""
    while (head := peer.read_head()) is not None:
        _, misdeed, _ = head.target.decode().split("/")
        (found,) = MARK.finditer(head.head.replace(b"%3C", b"<").replace(b"%3E", b">"))
        if misdeed != "early":
            peer.body_of(head)
            assert not head.body.replace(found[0], b""), "another's body came with this head"
        if not MISDEEDS[misdeed](peer, head, found[0]):
            return


# -- visitors --------------------------------------------------------------------------------------


class Visitor:
    """One who asks for misdeeds, on one connection after another."""

    def __init__(self, port: int, number: int) -> None:
        self.port = port
        self.number = number
        self.random = random.Random(number)
        self.asked = 0
        self.answered = 0

    def ask(self, misdeed: str) -> tuple[bytes, int]:
        """A request and the number in its mark."""
        self.asked += 1
        mark = b"<%d-%d>" % (self.number, self.asked)
        target = f"/{misdeed}/%3C{self.number}-{self.asked}%3E"
        method = b"HEAD" if misdeed == "head-body" else self.random.choice([b"GET", b"GET", b"POST", b"PUT"])
        fields = [b"Connection: Upgrade", b"Upgrade: x"] if self.random.random() < 0.2 else []
        body = mark * self.random.choice([1, 100, 20_000]) if method in (b"POST", b"PUT") else b""
        return request("demo", target, *fields, method=method, body=body), self.asked

    def run(self) -> list[str]:
        """What went wrong."""
        wrong: list[str] = []
        for _ in range(ROUNDS):
            asked = [self.ask(self.random.choice(list(MISDEEDS))) for _ in range(self.random.randint(1, 3))]
            got = self.talk(b"".join(data for data, _ in asked))
            wrong += self.foreign(got, [number for _, number in asked])
            self.answered += got.count(b"HTTP/1.1 200 OK")
        return wrong

    def talk(self, data: bytes) -> bytes:
        """Every byte that came on a connection on which ``data`` was sent and then ended."""
        got = bytearray()
        with connect(self.port) as sock:
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while piece := sock.recv(65536):
                    got += piece
            except OSError as error:  # a reset; before the half-close it is "not connected"
                if not isinstance(error, ConnectionError) and error.errno != errno.ENOTCONN:
                    raise
        return bytes(got)

    def foreign(self, got: bytes, numbers: list[int]) -> list[str]:
        marks = [(int(found[1]), int(found[2])) for found in MARK.finditer(got)]
        wrong = [
            f"visitor {self.number} got {mark} for {numbers}"
            for mark in marks
            if mark[0] != self.number or mark[1] not in numbers
        ]
        if marks != sorted(marks):
            wrong.append(f"visitor {self.number} got his answers out of order: {marks}")
        if b"X-Evil" in got or b"evil" in got:
            wrong.append(f"visitor {self.number} got what came behind an answer")
        return wrong


def test_nothing_of_one_visitor_reaches_another(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(misbehaving)
    open_tunnel(service)
    visitors = [Visitor(server.proxy_port, number) for number in range(VISITORS)]
    with ThreadPoolExecutor(VISITORS) as pool:
        wrong = [line for found in pool.map(Visitor.run, visitors) for line in found]
    assert wrong == []
    assert sum(visitor.answered for visitor in visitors) > VISITORS * ROUNDS / 4, "hardly anything was tried"
    reused = sum(len(peer.requests) > 1 for peer in service.peers)
    assert reused > 20, "hardly any stream was used again"


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_the_next_visitor_is_served_whatever_happened_to_the_one_before(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, misdeed: str
) -> None:
    """Their requests come at the same time, the one's in drops; the other's answer is exact."""
    open_tunnel(start_service(misbehaving))
    one, other = Visitor(server.proxy_port, 1), Visitor(server.proxy_port, 2)
    for _ in range(3):
        data, number = one.ask(misdeed)
        got: list[bytes] = []
        talk = threading.Thread(target=lambda data=data, got=got: got.append(one.talk(data)))
        talk.start()
        between = get(server.proxy_port, target="/good/%3C2-1%3E")
        talk.join()
        after = get(server.proxy_port, target="/good/%3C2-2%3E")
        assert (between.status, between.body) == (200, b"<2-1>" * 3)
        assert (after.status, after.body) == (200, b"<2-2>" * 3)
        assert one.foreign(got[0], [number]) == []
        assert other.foreign(after.head + after.body, [2]) == []


def test_connect_is_refused_at_the_public_port(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Also what a tunnel's client would say, and behind a request; the service hears of none."""
    service = start_service(misbehaving)
    open_tunnel(service)
    opening = b"CONNECT demo.localhost:80 HTTP/1.1\r\nHost: demo.localhost\r\n\r\n"
    tunnel = b"CONNECT /tunnel HTTP/1.1\r\nHost: demo.localhost\r\nx-tinytun-subdomain: a\r\n\r\n"
    good = request("demo", "/good/%3C0-1%3E")
    for data, before in ((opening, 0), (tunnel, 0), (good + opening + good, 1)):
        with connect(server.proxy_port) as sock:
            sock.sendall(data)
            got = bytearray()
            while piece := sock.recv(65536):
                got += piece
        assert got.count(b"HTTP/1.1 200 OK") == before
        assert got.count(b"HTTP/1.1 501 ") == 1
    assert b"CONNECT" not in service.log
    assert len(service.requests) == 1
