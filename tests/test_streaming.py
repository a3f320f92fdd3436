"""Bodies and interim answers as they flow: nothing waits for more, nothing is held, nothing changes."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

import psutil
import pytest
from conftest import OpenTunnel, StartService
from support import (
    DEADLINE,
    Peer,
    Request,
    Source,
    answering,
    connect,
    eventually,
    get,
    read_head,
    read_response,
    read_rest,
    request,
    respond,
)

from tinytun_gevent import TunnelServer

KIB, MIB = 1 << 10, 1 << 20
SOON = 0.2
"""Seconds within which a byte must have passed."""


def receive(sock: socket.socket, expected: bytes) -> None:
    """Reads exactly that."""
    assert Source(sock).exactly(len(expected)) == expected


# -- bytes leave as they arrive --------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "until close", "length"])
def test_events_are_seen_as_they_are_sent(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, framing: str
) -> None:
    """Server-sent events: each is waited for by the visitor before the next one is sent."""
    go_on = threading.Semaphore(0)
    events = [b"data: %d\n\n" % number for number in range(20)]
    fields = {
        "chunked": [b"Transfer-Encoding: chunked"],
        "until close": [],
        "length": [b"Content-Length: %d" % sum(map(len, events))],
    }[framing]

    def script(peer: Peer) -> None:
        peer.read_request()
        head = [b"HTTP/1.1 200 OK", b"Content-Type: text/event-stream", *fields]
        peer.sendall(b"\r\n".join([*head, b"", b""]))
        for event in events:
            assert go_on.acquire(timeout=DEADLINE)
            peer.sendall(b"%x\r\n%b\r\n" % (len(event), event) if framing == "chunked" else event)
        if framing == "chunked":
            peer.sendall(b"0\r\n\r\n")

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/events", b"Accept: text/event-stream"))
        head = read_head(sock)  # comes before the first event
        assert head.get(b"content-type") == b"text/event-stream"
        for event in events:
            go_on.release()
            receive(sock, b"%x\r\n%b\r\n" % (len(event), event) if framing == "chunked" else event)
        if framing == "chunked":
            receive(sock, b"0\r\n\r\n")
        if framing == "until close":
            assert read_rest(sock) == b""


@pytest.mark.parametrize("chunked", [True, False])
def test_a_request_s_body_arrives_as_it_is_sent(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, chunked: bool
) -> None:
    service = start_service()
    open_tunnel(service)
    pieces = [b"piece %d" % number for number in range(10)]
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % sum(map(len, pieces))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", framing, method=b"POST"))
        peer = service.wait_peer()
        for piece in pieces:
            data = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
            sock.sendall(data)
            eventually(lambda data=data: peer.received.endswith(data))
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        assert read_response(sock).body == b"ok"
    assert peer.requests[0].body == b"".join(pieces)


def test_both_directions_at_once(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """A service that echoes each piece before the visitor sends the next one."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n")
        for _ in range(10):
            peer.sendall(peer.exactly(5))

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Content-Length: 50", method=b"POST"))
        assert read_head(sock).get(b"connection") == b"close"  # the answer has begun before the body's end
        for number in range(10):
            piece = b"%05d" % number
            sock.sendall(piece)
            receive(sock, piece)
        assert read_rest(sock) == b""


# -- framing is kept -------------------------------------------------------------------------------


CHUNKS = b'5;ext="a;b"\r\nhello\r\n000A\r\n0123456789\r\n1\r\n!\r\n'
ANEW = b"5\r\nhello\r\nA\r\n0123456789\r\n1\r\n!\r\n"


@pytest.mark.parametrize("trailers", [b"", b"X-Checksum: abc\r\nServer-Timing: a, b\r\n"])
def test_chunks_are_written_anew_both_ways_with_an_answer_s_trailers(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, trailers: bytes
) -> None:
    body = CHUNKS + b"0\r\n" + trailers + b"\r\n"
    answer = b"HTTP/1.1 200 OK\r\nTrailer: X-Checksum\r\nTransfer-Encoding: chunked\r\n\r\n" + body
    service = start_service(answering(lambda _: answer))
    open_tunnel(service)
    fields = (b"Trailer: X-Checksum", b"Transfer-Encoding: chunked")
    with connect(server.proxy_port) as sock:
        for _ in range(2):
            sock.sendall(request("demo", "/", *fields, method=b"POST") + body)
            response = read_response(sock)
            assert response.raw_body == ANEW + b"0\r\n" + trailers + b"\r\n"
            assert response.get(b"trailer") == b"X-Checksum"
            assert response.get(b"transfer-encoding") == b"chunked"
    for got in service.requests:
        assert got.raw_body == ANEW + b"0\r\n\r\n"
        assert got.get(b"trailer") is None
    assert len(service.peers) == 1, "a chunked exchange is as good as any for another one"


def test_an_answer_s_trailers_pass_the_filter_of_its_fields(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """What belongs to one connection, frames a message, or is named by Connection (RFC 9110 §7.6.1)."""
    trailers = b"Connection: close\r\nX-Fine: a\r\ncontent-LENGTH: 3\r\nX-Hop: b\r\nTransfer-Encoding: x\r\n"
    trailers += b"Keep-Alive: 5\r\nUpgrade: h2c\r\nX-Fine: c\r\nTE: x\r\n"
    head = b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    open_tunnel(start_service(answering(lambda _: head + b"1\r\n!\r\n0\r\n" + trailers + b"\r\n")))
    with connect(server.proxy_port) as sock:
        for _ in range(2):
            sock.sendall(request())
            response = read_response(sock)
            assert response.get(b"x-hop") is None
            assert (response.body, response.trailers) == (b"!", [(b"X-Fine", b"a"), (b"X-Fine", b"c")])


@pytest.mark.parametrize("cut", range(0, len(CHUNKS) + 5, 3))
def test_a_chunked_body_cut_anywhere(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, cut: int
) -> None:
    body = CHUNKS + b"0\r\n\r\n"
    service = start_service(answering(lambda got: respond(got.body)))
    open_tunnel(service)
    data = request("demo", "/", b"Transfer-Encoding: chunked", method=b"POST") + body + request()
    split = len(data) - len(request()) - len(body) + cut
    with connect(server.proxy_port) as sock:
        sock.sendall(data[:split])
        eventually(lambda: service.log)
        sock.sendall(data[split:])
        assert read_response(sock).body == b"hello0123456789!"
        assert read_response(sock).body == b""


def test_a_request_s_framing_fields_are_the_only_ones(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service)
    get(server.proxy_port)
    get(server.proxy_port, method=b"POST", body=b"hello")
    get(server.proxy_port, "demo", "/", b"Content-Length: 0", method=b"POST")
    bare, full, empty = service.requests
    assert bare.all(b"content-length") == []
    assert full.all(b"content-length") == [b"5"]
    assert empty.all(b"content-length") == [b"0"]
    assert not any(got.all(b"transfer-encoding") for got in service.requests)


# -- answers without a body ------------------------------------------------------------------------


def test_head_204_and_304_have_no_body(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    answers = {
        b"/length": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"/chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"/none": b"HTTP/1.1 200 OK\r\nETag: x\r\n\r\n",
        b"/204": b"HTTP/1.1 204 No Content\r\nX: y\r\n\r\n",
        b"/304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 1000\r\nETag: x\r\n\r\n",
    }
    service = start_service(answering(lambda got: answers[got.target]))
    open_tunnel(service)
    asked = [(b"HEAD", target) for target in answers] + [(b"GET", b"/204"), (b"GET", b"/304")]
    with connect(server.proxy_port) as sock:
        for method, target in asked:
            sock.sendall(request("demo", target.decode(), method=method))
            response = read_response(sock, method)
            assert response.status == (int(target[1:]) if target[1:].isdigit() else 200)
            assert response.get(b"connection") is None, target
            if target in (b"/length", b"/304"):
                assert response.get(b"content-length") == b"1000"
            if target == b"/chunked":
                assert response.get(b"transfer-encoding") == b"chunked"
    assert len(service.peers) == 1


def test_a_body_where_none_may_be_is_dropped(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda _: respond(b"secret"))))
    with connect(server.proxy_port) as sock:
        for _ in range(3):
            sock.sendall(request("demo", method=b"HEAD") + request("nobody"))
            assert read_response(sock, b"HEAD").get(b"content-length") == b"6"
            assert read_response(sock).status == 404


# -- Expect: 100-continue --------------------------------------------------------------------------

EXPECT = (b"Expect: 100-continue",)


def test_continue_is_the_service_s_to_say(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        while (got := peer.read_head()) is not None:
            assert got.get(b"expect") == b"100-continue"
            assert may_go_on.acquire(timeout=DEADLINE)
            peer.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            peer.body_of(got)
            peer.sendall(respond(got.body))

    may_go_on = threading.Semaphore(0)
    service = start_service(script)
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        for body in (b"hello", b"x" * 100_000):
            whole = request("demo", "/", *EXPECT, method=b"POST", body=body)
            sock.sendall(whole[: -len(body)])
            sock.settimeout(0.1)
            with pytest.raises(TimeoutError):
                sock.recv(1)  # the edge does not say it for the service
            sock.settimeout(DEADLINE)
            may_go_on.release()
            assert read_response(sock).status == 100
            sock.sendall(body)
            assert read_response(sock).body == body
    assert len(service.peers) == 1


@pytest.mark.parametrize("status", [b"417 Expectation Failed", b"413 Content Too Large", b"200 OK"])
def test_a_final_answer_instead_of_continue(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, status: bytes
) -> None:
    """The body may come or not: the connection ends, so that nothing is taken for a request."""

    def script(peer: Peer) -> None:
        peer.read_head()
        peer.sendall(respond(b"no", status=status))
        peer.wait_end()

    service = start_service(script)
    open_tunnel(service)
    smuggled = request("demo", "/smuggled")
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", *EXPECT, method=b"POST", body=smuggled)[: -len(smuggled)])
        response = read_response(sock)
        assert response.start == b"HTTP/1.1 " + status
        assert response.body == b"no"
        assert response.get(b"connection") == b"close"
        try:
            sock.sendall(smuggled)
            assert read_rest(sock) == b""
        except ConnectionError:
            pass
    assert b"/smuggled" not in service.log
    assert service.peers[0].ended.wait(DEADLINE)


def test_a_service_that_does_not_know_expect(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda got: respond(got.body))))
    with connect(server.proxy_port) as sock:
        for _ in range(2):
            sock.sendall(request("demo", "/", *EXPECT, method=b"POST", body=b"hello"))
            assert read_response(sock).body == b"hello"


# -- HTTP/1.0 --------------------------------------------------------------------------------------


def test_http_1_0_visitors(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """They get a length or the end of the connection, never chunks, and no second exchange."""
    answers: dict[bytes, bytes] = {
        b"/length": respond(b"hello"),
        b"/close": b"HTTP/1.0 200 OK\r\n\r\nhello",
        b"/chunks": b"HTTP/1.1 200 OK\r\nTrailer: X\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nhe\r\n03;a=b\r\nllo\r\n0\r\nX: y\r\n\r\n",
        b"/old": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    }

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            peer.sendall(answers[got.target])
            if got.target == b"/close":
                return

    service = start_service(script)
    open_tunnel(service)
    for target in answers:
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", target.decode(), b"Connection: keep-alive", minor=0))
            response = read_response(sock)
            assert (response.status, response.body) == (200, b"hello")
            assert response.get(b"transfer-encoding") is None
            assert response.get(b"trailer") is None
            assert response.get(b"connection") == b"close"
            assert read_rest(sock) == b""
    assert [got.start for got in service.requests] == [
        b"GET %b HTTP/1.1" % target for target in answers
    ]


# -- pipelining, half-close ------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_order(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def answer(got: Request) -> bytes:
        if got.target.startswith(b"/slow"):
            threading.Event().wait(0.05)
        return respond(got.target + b" " + got.body)

    service = start_service(answering(answer))
    open_tunnel(service)
    chunked = (b"Transfer-Encoding: chunked",)
    sent = [
        request("demo", "/slow/1"),
        request("demo", "/2", method=b"POST", body=b"GET /smuggled HTTP/1.1\r\n\r\n"),
        request("nobody", "/3"),
        request("demo", "/slow/4", *chunked, method=b"PUT") + CHUNKS + b"0\r\n\r\n",
        b"\r\n" + request("demo", "/5"),
        request("demo", "/6", b"Connection: close"),
        request("demo", "/7"),
    ]
    with connect(server.proxy_port) as sock:
        sock.sendall(b"".join(sent))
        assert read_response(sock).body == b"/slow/1 "
        assert read_response(sock).body == b"/2 GET /smuggled HTTP/1.1\r\n\r\n"
        assert read_response(sock).status == 404
        assert read_response(sock).body == b"/slow/4 hello0123456789!"
        assert read_response(sock).body == b"/5 "
        last = read_response(sock)
        assert (last.body, last.get(b"connection")) == (b"/6 ", b"close")
        assert read_rest(sock) == b"", "nothing behind close is answered"
    assert get(server.proxy_port, "demo", "/8").status == 200  # what was sent before is there now
    assert b"/7" not in service.log, "… or forwarded"


def test_a_bad_request_behind_good_ones(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(answering(lambda got: respond(got.target)))
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        good = request("demo", "/1") + request("demo", "/2")
        sock.sendall(good + b"nonsense\r\n\r\n" + request("demo", "/3"))
        assert read_response(sock).body == b"/1"
        assert read_response(sock).body == b"/2"
        bad = read_response(sock)
        assert (bad.status, bad.get(b"connection")) == (400, b"close")
        assert read_rest(sock) == b""
    assert b"/3" not in service.log


def test_more_pipelined_requests_than_fit_a_head(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Together they are far above the limit of one head, while the first one is slow."""
    go_on = threading.Event()

    def answer(got: Request) -> bytes:
        assert go_on.wait(DEADLINE)
        return respond(got.target)

    open_tunnel(start_service(answering(answer)))
    count = 200
    with connect(server.proxy_port) as sock:
        data = b"".join(request("demo", f"/{number}", b"X: " + b"a" * 1000) for number in range(count))
        sender = threading.Thread(target=sock.sendall, args=(data,), daemon=True)
        sender.start()
        go_on.set()
        for number in range(count):
            assert read_response(sock).body == b"/%d" % number
        sender.join(DEADLINE)


def test_a_half_closed_visitor_gets_his_answers(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Its last request said that nothing follows. The FIN is not passed on; the service may take its time."""
    ended_early: list[bool] = []

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            peer.sock.settimeout(0.1)
            try:
                ended_early.append(peer.sock.recv(1, socket.MSG_PEEK) == b"")
            except TimeoutError:
                ended_early.append(False)
            peer.sock.settimeout(DEADLINE)
            peer.sendall(respond(got.target + got.body))

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        last = request("demo", "/2", b"Connection: close", method=b"POST", body=b"body")
        sock.sendall(request("demo", "/1") + last)
        sock.shutdown(socket.SHUT_WR)
        assert read_response(sock).body == b"/1"
        assert read_response(sock).body == b"/2body"
        assert read_rest(sock) == b""
    assert ended_early == [False, False]


def test_a_half_close_inside_a_head_ends_the_connection(server: TunnelServer) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(request()[:-2])
        sock.shutdown(socket.SHUT_WR)
        assert read_rest(sock) == b""


# -- bodies of any size ----------------------------------------------------------------------------

SIZE = 64 * MIB


@pytest.mark.parametrize("chunked", [False, True])
def test_64_mib_down(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, chunked: bool
) -> None:
    block = os.urandom(MIB)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % SIZE

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(b"HTTP/1.1 200 OK\r\n%b\r\n\r\n" % framing)
        for number in range(SIZE // MIB):
            data = number.to_bytes(8, "big") + block[8:]
            peer.sendall(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        if chunked:
            peer.sendall(b"0\r\n\r\n")
        peer.wait_end()

    open_tunnel(start_service(script))
    expected = hashlib.sha256()
    for number in range(SIZE // MIB):
        expected.update(number.to_bytes(8, "big") + block[8:])
    with connect(server.proxy_port) as sock:
        sock.sendall(request())
        assert hashlib.sha256(read_response(sock).body).digest() == expected.digest()


@pytest.mark.parametrize("chunked", [False, True])
def test_64_mib_up(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, chunked: bool
) -> None:
    block = os.urandom(MIB)
    service = start_service(answering(lambda got: respond(hashlib.sha256(got.body).hexdigest().encode())))
    open_tunnel(service)
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % SIZE
    expected = hashlib.sha256()
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", framing, method=b"POST"))
        for number in range(SIZE // MIB):
            data = number.to_bytes(8, "big") + block[8:]
            expected.update(data)
            sock.sendall(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        if chunked:
            sock.sendall(b"0\r\n\r\n")
        assert read_response(sock).body == expected.hexdigest().encode()


def test_a_body_that_nobody_takes_is_not_collected(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """32 MiB to a visitor who does not read, then to a service that does not: memory stays flat.

    Server and client are in this process, whose growth is measured; kernel buffers are not in it.
    """
    stop = threading.Event()
    moved = {"down": 0, "up": 0}

    def script(peer: Peer) -> None:
        got = peer.read_head()
        assert got is not None
        if got.target == b"/up":
            stop.wait(2 * DEADLINE)
            return
        peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (32 * MIB))
        push(peer.sock, "down")

    def push(sock: socket.socket, direction: str) -> None:
        sock.settimeout(0.5)
        block = b"x" * (64 * KIB)
        try:
            for _ in range(512):
                sock.sendall(block)
                moved[direction] += len(block)
        except OSError:
            pass

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as lazy, connect(server.proxy_port) as eager:
        for sock in (lazy, eager):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        get(server.proxy_port, "nobody")
        before = psutil.Process().memory_info().rss
        lazy.sendall(request("demo", "/down"))
        eager.sendall(request("demo", "/up", b"Content-Length: %d" % (32 * MIB), method=b"POST"))
        push(eager, "up")
        grown = psutil.Process().memory_info().rss - before
        stop.set()
        assert moved["up"] < 32 * MIB, "nothing held the sender back"
        assert grown < 24 * MIB


def test_an_empty_chunked_body_and_a_huge_chunk(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda got: respond(b"%d" % len(got.body)))))
    with connect(server.proxy_port) as sock:
        for size in (0, 8 * MIB):
            chunk = b"%x\r\n%b\r\n" % (size, b"x" * size) if size else b""
            sock.sendall(request("demo", "/", b"Transfer-Encoding: chunked", method=b"POST"))
            sock.sendall(chunk + b"0\r\n\r\n")
            assert read_response(sock).body == b"%d" % size
