"""One request and its answer: second tries, bound authentication, interim answers, what is observed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from conftest import OpenTunnel, StartServer, StartService
from h2.events import RequestReceived, StreamReset
from raw_client import RawClient
from support import (
    DEADLINE,
    Peer,
    Request,
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
from tinytun_gevent.server.core import Observed

REFUSED_STREAM = 7
CANCEL = 8


def head_of(message: bytes) -> bytes:
    """A message without its body."""
    return message[: message.index(b"\r\n\r\n") + 4]


def streams_of(server: TunnelServer, name: str = "demo") -> int:
    return sum(session.stream_count for session in server.registry.tunnels[name].sessions)


# -- second tries ----------------------------------------------------------------------------------


class Dying:
    """A service whose first connection dies at its second request, in one of several ways."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            if peer.number == 0 and len(peer.requests) == 2:
                if self.how == "reset":
                    peer.reset()
                elif self.how == "half an answer":
                    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-")
                elif self.how == "an interim answer":
                    peer.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
                return
            answer = respond(got.target + got.body)
            peer.sendall(head_of(answer) if got.method == b"HEAD" else answer)


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize(
    ("method", "body"),
    [(b"GET", b""), (b"HEAD", b""), (b"DELETE", b""), (b"PUT", b"hello"), (b"OPTIONS", b"x" * 9999)],
)
def test_an_idempotent_request_is_sent_once_more(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    how: str,
    method: bytes,
    body: bytes,
) -> None:
    service = start_service(Dying(how))
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/1"))
        assert read_response(sock).body == b"/1"
        sock.sendall(request("demo", "/2", method=method, body=body))
        response = read_response(sock, method)
        assert response.status == 200
        assert response.body == (b"" if method == b"HEAD" else b"/2" + body)
        sock.sendall(request("demo", "/3"))
        assert read_response(sock).body == b"/3"
        # Within 2 s, in which no idle stream ends for age; it may be kept for its visitor.
        eventually(lambda: streams_of(server) == 1, 2, "the dead stream's place is free again")
    assert [(got.target, got.body) for got in service.requests[1:3]] == [(b"/2", body)] * 2
    assert len(service.peers) == 2


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("method", [b"POST", b"PATCH", b"FROBNICATE"])
def test_any_other_is_not(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, how: str, method: bytes
) -> None:
    service = start_service(Dying(how))
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/1"))
        assert read_response(sock).status == 200
        sock.sendall(request("demo", "/2", method=method, body=b"hello"))
        assert read_response(sock).status == 502
        sock.sendall(request("demo", "/3"))
        assert read_response(sock).body == b"/3"
    assert [got.target for got in service.requests] == [b"/1", b"/2", b"/3"]
    eventually(lambda: streams_of(server) == 1, 2, "the dead stream's place is free again")


@pytest.mark.parametrize("how", ["half an answer", "an interim answer"])
def test_nothing_is_sent_again_once_an_answer_has_begun(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel, how: str
) -> None:
    service = start_service(Dying(how))
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/1"))
        assert read_response(sock).status == 200
        sock.sendall(request("demo", "/2"))
        response = read_response(sock)
        if how == "an interim answer":
            assert response.status == 103
            response = read_response(sock)
        assert response.status == 502
    assert [got.target for got in service.requests] == [b"/1", b"/2"]


def test_a_service_that_always_dies_is_tried_twice(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None and got.target == b"/fine":
            peer.sendall(respond())

    service = start_service(script)
    open_tunnel(service)
    assert get(server.proxy_port, "demo", "/fine").status == 200
    assert get(server.proxy_port, "demo", "/bad").status == 502
    assert [got.target for got in service.requests] == [b"/fine", b"/bad", b"/bad"]
    assert get(server.proxy_port, "demo", "/bad").status == 502
    assert len(service.requests) == 4, "a fresh connection that dies is no reason to try again"


def test_what_must_not_be_sent_twice_gets_no_stream_that_rested_long(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = start_service()
    open_tunnel(service)
    for age, peers in ((1.0, 1), (0.0, 3)):  # a stream that carried a body is no other visitor's
        monkeypatch.setattr("tinytun_gevent.server.pool.FRESH_LIFE", age)
        assert get(server.proxy_port).status == 200
        assert get(server.proxy_port, method=b"POST", body=b"x").status == 200
        assert len(service.peers) == peers


# -- refused streams (RFC 9113 section 8.7) --------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"hello"])
def test_a_refused_stream_is_tried_again_whatever_the_method(server: TunnelServer, body: bytes) -> None:
    with RawClient(server) as client, connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/x", method=b"POST", body=body))
        for _ in range(2):
            stream_id = client.next(RequestReceived).stream_id or 0
            client.reset(stream_id, REFUSED_STREAM)
        stream_id, head = client.next_request()
        assert head.startswith(b"POST /x HTTP/1.1\r\n")
        assert head.endswith(body)
        client.send(stream_id, respond(b"at last"))
        assert read_response(sock).body == b"at last"


def test_a_client_that_refuses_everything_is_not_asked_for_ever(start_server: StartServer) -> None:
    server = start_server(queue_timeout=0.5)
    client = RawClient(server)
    refused = 0

    def refuse() -> None:
        nonlocal refused
        try:
            while True:
                client.reset(client.next(RequestReceived).stream_id or 0, REFUSED_STREAM)
                refused += 1
        except EOFError:
            pass

    refuser = threading.Thread(target=refuse, daemon=True)
    refuser.start()
    with client, connect(server.proxy_port) as sock:
        sock.sendall(request())
        response = read_response(sock)
    refuser.join(DEADLINE)
    assert response.status == 503
    assert response.get(b"retry-after") is not None
    assert 1 < refused < 100, "the client was asked again without a pause"


def test_a_stream_refused_while_its_request_waits_for_a_window(server: TunnelServer) -> None:
    """The sender is woken by the refusal, too: it must not answer 502 beside the second try."""
    with RawClient(server, window=100) as client, connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/" + "x" * 500))
        first = client.next(RequestReceived).stream_id or 0
        client.reset(first, REFUSED_STREAM)
        stream_id = client.next(RequestReceived).stream_id or 0
        client.accept(stream_id)
        client.open_window(stream_id, 10_000)
        assert client.next_head().startswith(b"GET /xxx")
        client.send(stream_id, respond(b"fine"))
        response = read_response(sock)
        assert (response.status, response.body) == (200, b"fine")


def test_an_answer_that_overtakes_its_request_leaves_the_stream_to_nobody(server: TunnelServer) -> None:
    """The body is at hand, but waits for a window: another request must not get in between."""
    with RawClient(server, window=400) as client, connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/a", method=b"POST", body=b"A" * 2000))
        first, _ = client.next_request()
        client.send(first, respond(b"early"))
        assert read_response(sock).body == b"early"
        eventually(lambda: streams_of(server) == 0, 2, "the end of the stream")
        assert client.next(StreamReset).stream_id == first
        sock.sendall(request("demo", "/b"))
        second, head = client.next_request()
        assert second != first
        assert head.startswith(b"GET /b ")


def test_a_stream_cancelled_before_any_answer_is_a_service_that_refused(server: TunnelServer) -> None:
    """The original's client says so that its service cannot be reached; nothing is sent again."""
    with RawClient(server) as client, connect(server.proxy_port) as sock:
        sock.sendall(request())
        stream_id, _ = client.next_request()
        client.reset(stream_id, CANCEL)
        assert read_response(sock).status == 502
        sock.sendall(request())
        stream_id, _ = client.next_request()
        client.send(stream_id, respond(b"up again"))
        assert read_response(sock).body == b"up again"


# -- authentication that is bound to a connection --------------------------------------------------


def ntlm(peer: Peer) -> None:
    """Knows its user by the connection, as NTLM and Negotiate do."""
    user = b""
    while (got := peer.read_request()) is not None:
        credentials = got.get(b"authorization") or b""
        if credentials.startswith(b"NTLM user:"):
            user = credentials[10:]
        if user:
            peer.sendall(respond(user))
        else:
            challenge = b"NTLM challenge" if credentials else b"NTLM"
            peer.sendall(respond(b"who", b"WWW-Authenticate: " + challenge, status=b"401 Unauthorized"))


def test_ntlm_stays_with_its_visitor(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(ntlm)
    open_tunnel(service)
    with connect(server.proxy_port) as ann, connect(server.proxy_port) as ben:

        def ask(sock: object, *fields: bytes) -> bytes:
            sock.sendall(request("demo", "/", *fields))  # type: ignore[attr-defined]
            return read_response(sock).body  # type: ignore[arg-type]

        assert ask(ann) == b"who"
        assert ask(ann, b"Authorization: NTLM hello") == b"who"
        assert ask(ann, b"Authorization: NTLM user:ann") == b"ann"
        for _ in range(5):
            assert ask(ann) == b"ann"
            assert ask(ben) == b"who"
            assert get(server.proxy_port).body == b"who"
        assert ask(ben, b"Authorization: NTLM user:ben") == b"ben"
        assert ask(ann) == b"ann"
        assert ask(ben) == b"ben"
    for peer in service.peers:
        assert peer.ended.wait(60), "a visitor's own stream outlived him"
    assert get(server.proxy_port).body == b"who"


def test_negotiate_at_the_first_request_pins_too(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    open_tunnel(service)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/", b"Authorization: Negotiate abc"))
        assert read_response(sock).status == 200
        assert get(server.proxy_port).status == 200
        assert len(service.peers) == 2, "another visitor got the stream"


def test_a_pinned_stream_serves_its_own_tunnel_only(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    one = start_service(ntlm)
    open_tunnel(one, "one")
    open_tunnel(start_service(answering(lambda _: respond(b"two"))), "two")
    with connect(server.proxy_port) as sock:
        for _ in range(3):
            sock.sendall(request("one", "/", b"Authorization: NTLM user:ann"))
            assert read_response(sock).body == b"ann"
            sock.sendall(request("two"))
            assert read_response(sock).body == b"two"
    assert all(b"two.localhost" not in bytes(peer.received) for peer in one.peers)


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_pinned_stream_that_the_service_ended_is_replaced(server: TunnelServer, how: str) -> None:
    with RawClient(server) as client, connect(server.proxy_port) as sock:
        for number in range(3):
            sock.sendall(request("demo", "/", method=b"POST", body=b"x"))
            stream_id, _ = client.next_request()
            answer = respond(b"%d" % number, b"WWW-Authenticate: Negotiate")
            client.send(stream_id, answer, end=how == "end")
            assert read_response(sock).body == b"%d" % number
            if how == "reset":
                client.reset(stream_id, CANCEL)
            client.sync()


# -- interim answers -------------------------------------------------------------------------------


def hints(count: int) -> bytes:
    return b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n" * count


def test_interim_answers_pass_in_order(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda got: hints(int(got.target[1:])) + respond(b"final"))))
    with connect(server.proxy_port) as sock:
        for count in (1, 3, 64):
            sock.sendall(request("demo", f"/{count}"))
            for _ in range(count):
                interim = read_response(sock)
                assert interim.status == 103
                assert interim.get(b"link") == b"</a.css>"
            assert read_response(sock).body == b"final"


def test_interim_answers_have_a_limit(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(interim_answers=3)
    service = start_service(answering(lambda got: hints(int(got.target[1:])) + respond(b"final")))
    open_tunnel(service, server=server)
    for count, status in ((3, 200), (4, 502)):
        with connect(server.proxy_port) as sock:
            sock.sendall(request("demo", f"/{count}"))
            for _ in range(3):
                assert read_response(sock).status == 103
            assert read_response(sock).status == status


def test_interim_answers_are_kept_from_http_1_0(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    open_tunnel(start_service(answering(lambda _: hints(2) + respond(b"final"))))
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", minor=0))
        assert read_response(sock).body == b"final"
        assert read_rest(sock) == b""


# -- heads -----------------------------------------------------------------------------------------


def test_an_answer_s_head_in_drops(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def script(peer: Peer) -> None:
        while peer.read_request() is not None:
            for byte in hints(1) + respond(b"drop by drop"):
                peer.sendall(bytes([byte]))

    open_tunnel(start_service(script))
    with connect(server.proxy_port) as sock:
        for _ in range(2):
            sock.sendall(request())
            assert read_response(sock).status == 103
            assert read_response(sock).body == b"drop by drop"


def test_a_request_in_drops(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service(answering(lambda got: respond(got.body)))
    open_tunnel(service)
    chunked = request("demo", "/", b"Transfer-Encoding: chunked", method=b"POST")
    chunked += b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nX: y\r\n\r\n"
    with connect(server.proxy_port) as sock:
        for byte in chunked + request("demo", method=b"POST", body=b"second"):
            sock.sendall(bytes([byte]))
        assert read_response(sock).body == b"hello!"
        assert read_response(sock).body == b"second"
    assert service.requests[0].trailers == []


def test_the_configured_limits_of_an_answer_s_head_apply(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    def answer(got: Request) -> bytes:
        what, number = got.target[1:].split(b"/")
        fields = [b"X: a"] * int(number) if what == b"fields" else [b"X: " + b"a" * int(number)]
        return respond(b"ok", *fields)

    server = start_server(answer_head_bytes=4096, answer_head_fields=10)
    service = start_service(answering(answer))
    open_tunnel(service, server=server)
    for target in ("/fields/9", "/bytes/4000"):
        assert get(server.proxy_port, "demo", target).status == 200, target
    for target in ("/fields/10", "/bytes/4100"):
        assert get(server.proxy_port, "demo", target).status == 502, target


def test_a_wide_answer_s_head_passes_where_it_is_allowed(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    server = start_server(answer_head_bytes=200_000, answer_head_fields=500)
    wide = respond(b"ok", *[b"X: " + b"a" * 300] * 400)
    open_tunnel(start_service(answering(lambda _: wide)), server=server)
    assert len(get(server.proxy_port).all(b"x")) == 400


# -- what is observed ------------------------------------------------------------------------------


@pytest.fixture
def observed(server: TunnelServer) -> Iterator[list[tuple[str, int, int]]]:
    """Tunnel, status and body bytes of every exchange that is over."""
    seen: list[tuple[str, int, int]] = []

    def observe(exchange: Observed) -> None:
        seen.append((exchange.tunnel_id, exchange.status, exchange.response_bytes))

    server.core.observers.append(observe)
    yield seen
    server.core.observers.remove(observe)


def test_every_exchange_is_observed_once(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    observed: list[tuple[str, int, int]],
) -> None:
    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            if got.target == b"/cut":
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")
                return
            if got.target == b"/bad":
                peer.sendall(b"nonsense\r\n\r\n")
                return
            if got.target == b"/last":
                peer.sendall(respond(b"y" * 10, b"Connection: close"))
                return
            answer = respond(b"x" * 1000)
            peer.sendall(head_of(answer) if got.method == b"HEAD" else answer)

    open_tunnel(start_service(script))
    tunnel = server.registry.tunnels["demo"].id
    assert get(server.proxy_port).status == 200
    assert get(server.proxy_port, method=b"HEAD").status == 200
    missing = get(server.proxy_port, "nobody")
    assert get(server.proxy_port, "demo", "/last").status == 200
    failed = get(server.proxy_port, "demo", "/bad", method=b"POST")
    assert (missing.status, failed.status) == (404, 502)
    pages = len(missing.body), len(failed.body)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", "/cut"))
        assert read_head(sock).status == 200
        with pytest.raises(ConnectionResetError):
            read_rest(sock)
    expected = [(tunnel, 200, 1000), (tunnel, 200, 0), ("", 404, pages[0]), (tunnel, 200, 10)]
    expected += [(tunnel, 502, pages[1]), (tunnel, 200, 5)]
    eventually(lambda: len(observed) >= len(expected))
    assert observed == expected


def test_an_observer_s_mistake_disturbs_nobody(
    server: TunnelServer,
    start_service: StartService,
    open_tunnel: OpenTunnel,
    observed: list[tuple[str, int, int]],
) -> None:
    def observe(exchange: Observed) -> None:
        raise ZeroDivisionError

    server.core.observers.insert(0, observe)
    open_tunnel(start_service())
    with connect(server.proxy_port) as sock:
        for _ in range(3):
            sock.sendall(request())
            assert read_response(sock).body == b"ok"
    eventually(lambda: len(observed) == 3)


# -- many exchanges --------------------------------------------------------------------------------


def test_every_answer_reaches_its_own_visitor(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    """Sixteen visitors share pooled streams with answers of all sizes, some services close early."""

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            size = int(got.target.rsplit(b"/", 1)[1])
            body = got.target * (size // len(got.target) + 1)
            if size % 7 == 0:
                peer.sendall(respond(body, b"Connection: close"))
                return
            peer.sendall(respond(body))

    open_tunnel(start_service(script))
    wrong: list[object] = []

    def visit(visitor: int) -> None:
        with connect(server.proxy_port) as sock:
            for number in range(40):
                target = f"/{visitor}/{number}/{(visitor * 40 + number) * 37 % 50_000}".encode()
                sock.sendall(request("demo", target.decode()))
                body = read_response(sock).body
                if not body or body.replace(target, b""):
                    wrong.append((target, body[:100]))

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
