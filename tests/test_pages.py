"""The server's own answers: format by Accept, request id, and each status at least once."""

from __future__ import annotations

import json
import threading

import pytest
from conftest import FastClock, OpenTunnel, StartServer, StartService
from h2.events import RequestReceived
from raw_client import RawClient
from support import (
    DEADLINE,
    Peer,
    Response,
    connect,
    eventually,
    get,
    read_response,
    read_rest,
    request,
    respond,
)

from tinytun_gevent import TunnelServer
from tinytun_gevent.server.pages import Failure

HTML = b"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def parse(answer: bytes) -> Response:
    head, _, body = answer.partition(b"\r\n\r\n")
    return Response(head + b"\r\n\r\n", body)


def check(response: Response, status: int) -> dict[str, object]:
    """An answer of the server's own, as JSON, that says the same in head and body."""
    assert response.status == status
    assert response.get(b"content-type") == b"application/json"
    assert response.get(b"cache-control") == b"no-store"
    page: dict[str, object] = json.loads(response.body)
    assert page["status"] == status
    assert page["reason"]
    assert str(page["request_id"]).encode() == response.get(b"x-request-id")
    return page


def raw(server: TunnelServer, data: bytes) -> Response:
    """What the server answers to ``data``; it must end the connection afterwards."""
    with connect(server.proxy_port) as sock:
        sock.sendall(data)
        response = read_response(sock)
        assert response.get(b"connection") == b"close"
        assert read_rest(sock) == b""
    return response


# -- the page --------------------------------------------------------------------------------------


def test_the_request_id_finds_the_reason_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    failure = Failure(404, "There is no tunnel x.")
    with caplog.at_level("DEBUG", "tinytun_gevent.server.pages"):
        failure.answer(b"", close=False)
    assert [record.getMessage() for record in caplog.records] == [
        f"request {failure.request_id} answered 404: 'There is no tunnel x.'"
    ]


def test_a_browser_gets_html_and_a_program_json() -> None:
    failure = Failure(404, "There is no tunnel <x>.")
    page = parse(failure.answer(HTML, close=False))
    assert page.get(b"content-type") == b"text/html; charset=utf-8"
    assert b"There is no tunnel &lt;x&gt;." in page.body
    assert b"<x>" not in page.body
    assert failure.request_id.encode() in page.body
    for accept in (b"", b"*/*", b"application/json"):
        assert check(parse(failure.answer(accept, close=False)), 404)["reason"] == failure.reason


def test_the_length_is_the_body_s_also_for_head() -> None:
    failure = Failure(404, "Größe")
    whole = parse(failure.answer(HTML, close=False))
    assert int(whole.get(b"content-length") or b"") == len(whole.body)
    head = parse(failure.answer(HTML, close=False, head_only=True))
    assert head.body == b""
    assert head.fields == whole.fields


def test_retry_after_and_close_are_said_when_meant() -> None:
    plain = parse(Failure(503, "x").answer(b"", close=False))
    assert plain.get(b"retry-after") is None
    assert plain.get(b"connection") is None
    both = parse(Failure(503, "x", retry_after=7).answer(b"", close=True))
    assert both.get(b"retry-after") == b"7"
    assert both.get(b"connection") == b"close"


def test_every_failure_has_its_own_request_id() -> None:
    assert len({Failure(404, "x").request_id for _ in range(100)}) == 100


# -- over the wire ---------------------------------------------------------------------------------


def test_the_visitor_s_accept_chooses(server: TunnelServer) -> None:
    page = get(server.proxy_port, "nobody", "/", b"Accept: " + HTML)
    assert page.status == 404
    assert page.get(b"content-type") == b"text/html; charset=utf-8"
    assert b"nobody.localhost" in page.body
    check(get(server.proxy_port, "nobody", "/", b"Accept: */*"), 404)


def test_a_browser_whose_head_is_bad_gets_html_too(server: TunnelServer) -> None:
    bad = request("demo", "/", b"Accept: " + HTML, b"X : y")
    assert raw(server, bad).get(b"content-type") == b"text/html; charset=utf-8"
    many = request("demo", "/", b"Accept: " + HTML, *[b"X: y"] * 100)
    page = raw(server, many)
    assert page.status == 431
    assert page.get(b"content-type") == b"text/html; charset=utf-8"


def test_404_keeps_the_connection(server: TunnelServer) -> None:
    with connect(server.proxy_port) as sock:
        for method in (b"GET", b"HEAD", b"GET"):
            sock.sendall(request("nobody", method=method))
            response = read_response(sock, method)
            assert response.status == 404
            assert response.get(b"connection") is None


def test_a_failure_before_the_body_ends_the_connection(server: TunnelServer) -> None:
    smuggled = request("nobody", "/smuggled")
    with connect(server.proxy_port) as sock:
        sock.sendall(request("nobody", method=b"POST", body=smuggled))
        assert check(read_response(sock), 404)
        assert read_rest(sock) == b""  # in particular no second answer


@pytest.mark.parametrize("host", [b"localhost", b"LOCALHOST.:80"])
def test_the_base_domain_says_what_this_server_is(server: TunnelServer, host: bytes) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET /?x HTTP/1.1\r\nHost: %b\r\nAccept: text/html\r\n\r\n" % host)
        page = read_response(sock)
        assert page.status == 200
        assert b"<h1>This is a tinytun server</h1>" in page.body
        command = f"tinytun http 3000 --server http://localhost:{server.connection_port}"
        assert command.encode() in page.body
        sock.sendall(b"HEAD / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert read_response(sock, b"HEAD").status == 200
        sock.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert "error" not in check(read_response(sock), 200)
        sock.sendall(b"GET /favicon.ico HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        assert check(read_response(sock), 404)["title"] == "There is no such page"
        sock.sendall(b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 0\r\n\r\n" % host)
        check(read_response(sock), 404)  # what was meant for a tunnel has not been delivered


def test_a_title_in_words_the_cause_and_what_to_do() -> None:
    failure = Failure(503, "The tunnel's client <is> away.")
    page = parse(failure.answer(HTML, close=False)).body.decode()
    assert "<h1>This tunnel takes no visitor at the moment</h1>" in page
    assert "<p>The tunnel&#x27;s client &lt;is&gt; away.</p>" in page
    assert "If this is your tunnel: see whether its client still runs." in page
    assert "src=" not in page
    assert "@import" not in page
    said = check(parse(failure.answer(b"", close=False)), 503)
    assert said["title"] == "This tunnel takes no visitor at the moment"
    assert str(said["advice"]).startswith("Try again in a few seconds.")
    assert said["error"] == "Service Unavailable"
    other = parse(Failure(404, "x", title="<a>", advice="<b>").answer(HTML, close=False)).body
    assert b"<h1>&lt;a&gt;</h1>" in other
    assert b"<p>&lt;b&gt;</p>" in other


def test_a_redirect_has_a_link() -> None:
    failure = Failure(308, "Moved.", location='https://a.org/?a&b="c')
    answer = parse(failure.answer(HTML, close=False))
    assert answer.get(b"location") == b'https://a.org/?a&b="c'
    assert b'<a href="https://a.org/?a&amp;b=&quot;c">' in answer.body
    assert check(parse(failure.answer(b"", close=False)), 308)["location"] == failure.location


@pytest.mark.parametrize("host", [b"a.demo.localhost"])
def test_421_for_a_host_of_ours_that_cannot_be_a_tunnel(server: TunnelServer, host: bytes) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        check(read_response(sock), 421)


@pytest.mark.parametrize(
    "host", [b"demo.localhost", b"DEMO.LOCALHOST.:80", b"example.com", b"demo.localhost.x.y", b"[::1]:80"]
)
def test_404_for_a_tunnel_that_is_not_there(server: TunnelServer, host: bytes) -> None:
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n" % host)
        check(read_response(sock), 404)


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /\r\n\r\n"),
        (400, b"GET / HTTP/1.1\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
        (414, b"GET /" + b"a" * 33000 + b" HTTP/1.1\r\nHost: demo.localhost\r\n\r\n"),
        (414, b"GET /" + b"a" * 33000),
        (417, request("demo", "/", b"Expect: tea", method=b"POST", body=b"hello")),
        (431, request("demo", "/", b"X: " + b"a" * 17000)),
        (431, request("demo", "/", b"X: " + b"a" * 33000)[:-4]),
        (431, request("demo", "/", *[b"X: a"] * 100)),
        (501, b"CONNECT demo.localhost:80 HTTP/1.1\r\nHost: demo.localhost\r\n\r\n"),
        (501, request("demo", "/", b"Transfer-Encoding: gzip, chunked", method=b"POST")),
        (505, b"GET / HTTP/2.0\r\nHost: demo.localhost\r\n\r\n"),
    ],
)
def test_what_cannot_be_understood(server: TunnelServer, status: int, data: bytes) -> None:
    check(raw(server, data), status)


def test_the_configured_limits_are_those_that_apply(start_server: StartServer) -> None:
    server = start_server(head_bytes=2048, head_fields=5)
    assert get(server.proxy_port, "nobody", "/", b"X: " + b"a" * 1900).status == 404
    check(raw(server, request("nobody", "/", b"X: " + b"a" * 2100)), 431)
    assert get(server.proxy_port, "nobody", "/", *[b"X: a"] * 4).status == 404
    check(raw(server, request("nobody", "/", *[b"X: a"] * 5)), 431)
    wide = start_server(head_bytes=40_000, head_fields=300, head_field_bytes=35_000)
    assert get(wide.proxy_port, "nobody", "/", b"X: " + b"a" * 30_000).status == 404
    assert get(wide.proxy_port, "nobody", "/", *[b"X: a"] * 250).status == 404
    check(raw(wide, request("nobody", "/", b"X: " + b"a" * 35_000)), 431)


def test_408_for_a_head_that_takes_too_long(start_server: StartServer, fast_clock: None) -> None:
    server = start_server(head_timeout=0.2)
    with connect(server.proxy_port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        response = read_response(sock)
        check(response, 408)
        assert response.get(b"connection") == b"close"
        assert read_rest(sock) == b""


def test_an_idle_connection_is_closed_without_an_answer(start_server: StartServer, fast_clock: None) -> None:
    server = start_server(idle_timeout=0.2)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("nobody"))
        assert read_response(sock).status == 404
        assert read_rest(sock) == b""


def test_502_for_a_service_that_is_away(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    service = start_service()
    service.stop_listening()
    open_tunnel(service)
    response = get(server.proxy_port)
    assert response.status == 502
    assert b"refused" in response.body
    assert str(service.port).encode() in response.body


def test_502_for_an_answer_that_breaks_off_or_makes_no_sense(
    server: TunnelServer, start_service: StartService, open_tunnel: OpenTunnel
) -> None:
    answers = [b"", b"HTTP/1.1 200 O", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n"]

    def script(peer: Peer) -> None:
        peer.read_request()
        peer.sendall(answers[peer.number])

    open_tunnel(start_service(script))
    for _ in answers:
        check(get(server.proxy_port, "demo", "/", method=b"POST"), 502)


def test_503_while_the_client_is_not_there_yet(start_server: StartServer) -> None:
    server = start_server(queue_timeout=0.2)
    with connect(server.connection_port) as client:
        client.sendall(b"CONNECT a:1 HTTP/1.1\r\nx-tinytun-type: http\r\nx-tinytun-subdomain: slow\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 101"
        response = get(server.proxy_port, "slow")
        check(response, 503)
        assert int(response.get(b"retry-after") or b"") > 0


def test_503_when_the_client_leaves_before_the_answer(server: TunnelServer) -> None:
    client = RawClient(server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo"))
        client.next_request()
        client.close()
        response = read_response(sock)
        check(response, 503)
        assert int(response.get(b"retry-after") or b"") > 0


def test_504_when_the_client_does_not_accept(start_server: StartServer, fast_clock: None) -> None:
    server = start_server(stream_timeout=0.2)
    with RawClient(server) as client, connect(server.proxy_port) as sock:
        sock.sendall(request("demo"))
        stream_id = client.next(RequestReceived).stream_id or 0
        check(read_response(sock), 504)
        client.ended(stream_id)
        sock.sendall(request("nobody"))  # the connection is still good
        check(read_response(sock), 404)


def test_504_when_the_service_does_not_answer(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, fast_clock: None
) -> None:
    server = start_server(answer_timeout=0.2)
    service = start_service(lambda peer: peer.wait_end() and None)
    open_tunnel(service, server=server)
    check(get(server.proxy_port), 504)
    assert service.peers[0].ended.wait(60), "the service's connection was left open"


def test_a_long_upload_does_not_count_as_a_slow_answer(
    start_server: StartServer, start_service: StartService, open_tunnel: OpenTunnel, fast_clock: FastClock
) -> None:
    server = start_server(answer_timeout=80, min_body_rate=0, stream_timeout=3600)
    go_on = threading.Event()

    def slow(peer: Peer) -> None:
        peer.read_request()
        assert go_on.wait(DEADLINE)
        peer.sendall(respond())

    service = start_service(slow)
    open_tunnel(service, server=server)
    with connect(server.proxy_port) as sock:
        sock.sendall(request("demo", method=b"POST", body=b"x" * 10)[:-10])
        for _ in range(9):  # 90 s: longer than an answer may take
            sock.sendall(b"x")
            fast_clock.forward(10)
        sock.sendall(b"x")
        eventually(lambda: service.requests and service.requests[0].body)
        fast_clock.forward(30)
        go_on.set()
        assert read_response(sock).body == b"ok"
    assert service.requests[0].body == b"x" * 10
