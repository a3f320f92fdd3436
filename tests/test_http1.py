"""Heads: the framing corpus, what is read from a head, what is written for the next hop."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar
from urllib.parse import unquote_to_bytes

import pytest
from framing_corpus import (
    CHUNKED,
    HELLO,
    INVALID_REQUESTS,
    INVALID_RESPONSES,
    OK,
    TE,
    UNTIL_CLOSE,
    VALID_REQUESTS,
    VALID_RESPONSES,
    chunked,
    post,
    request,
    response,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import http1
from tinytun_gevent.wire.body import body_of
from tinytun_gevent.wire.http1 import (
    REQUEST,
    Forwarding,
    HeadLimits,
    RequestHead,
    ResponseHead,
    build_request_head,
    build_response_head,
    head_end,
    parse_request_head,
    parse_response_head,
    response_head_end,
    response_too_large,
    too_large,
)

P = ParamSpec("P")
R = TypeVar("R")

GET = b"GET / HTTP/1.1"
FORWARDING = Forwarding("192.0.2.7", 5555)
SWITCH = b"HTTP/1.1 101 Switching Protocols"


def read_request(data: bytes) -> tuple[RequestHead, bytes]:
    """Read a whole request as the edge does; return its head and what follows its body."""
    end = head_end(data)
    if end < 0:
        assert len(data) > http1.REQUEST.bytes, "the head is incomplete"
        raise too_large(data)
    head = parse_request_head(data[:end])
    body = body_of(head.length)
    taken = body.feed(memoryview(data)[end:])
    body.eof()
    return head, data[end + taken :]


def read_response(
    data: bytes, method: bytes, upgrade_asked: bool = False
) -> tuple[list[ResponseHead], bytes]:
    """Read all heads up to the final one, and its body; return them and what follows."""
    heads: list[ResponseHead] = []
    while not heads or heads[-1].status < 200:
        end = response_head_end(data)
        if end < 0:
            assert len(data) > http1.RESPONSE.bytes, "the head is incomplete"
            raise response_too_large()
        heads.append(parse_response_head(data[:end], method, upgrade_asked))
        data = data[end:]
    body = body_of(heads[-1].length, response=True)
    taken = body.feed(memoryview(data))
    body.eof()
    return heads, data[taken:]


def names(fields: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [name.lower() for name, _ in fields]


# -- the corpus ----------------------------------------------------------------------------------


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    lists = [
        [case[0] for case in INVALID_REQUESTS],
        [case[0] for case in VALID_REQUESTS],
        [case[0] for case in INVALID_RESPONSES],
        [case[0] for case in VALID_RESPONSES],
    ]
    assert sum(map(len, lists)) >= 400
    for case_names in lists:
        assert len(set(case_names)) == len(case_names)


@pytest.mark.parametrize(("data", "status"), [pytest.param(d, s, id=n) for n, d, s in INVALID_REQUESTS])
def test_invalid_request_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(MessageError) as caught:
        read_request(data)
    assert caught.value.status == status


@pytest.mark.parametrize("data", [pytest.param(d, id=n) for n, d in VALID_REQUESTS])
def test_valid_request_is_read_to_its_end_and_forwarded_unambiguously(data: bytes) -> None:
    head, rest = read_request(data)
    assert rest == b""
    assert head.host == "demo.localhost"
    assert_same_request(head)


@pytest.mark.parametrize(("method", "data"), [pytest.param(m, d, id=n) for n, m, d in INVALID_RESPONSES])
def test_invalid_response_is_refused(method: bytes, data: bytes) -> None:
    with pytest.raises(MessageError) as caught:
        read_response(data, method)
    assert caught.value.status == 502


@pytest.mark.parametrize(
    ("method", "data", "length"), [pytest.param(m, d, n_, id=n) for n, m, d, n_ in VALID_RESPONSES]
)
def test_valid_response_is_framed(method: bytes, data: bytes, length: int) -> None:
    heads, _ = read_response(data, method)
    assert heads[-1].length == length
    for head in heads:
        again = parse_response_head(build_response_head(head, close=False, minor_visitor=1), method, False)
        assert (again.status, again.reason, again.length) == (head.status, head.reason, head.length)


def assert_same_request(head: RequestHead) -> None:
    """What is forwarded has one reading, and it is ours."""
    built = build_request_head(head, FORWARDING)
    assert built.endswith(b"\r\n\r\n")
    assert head_end(built) == len(built)
    again = parse_request_head(built, HeadLimits(2 * len(built), 200))
    assert again.minor == 1
    for attribute in ("method", "target", "host", "host_field", "fields", "upgrade", "length"):
        assert getattr(again, attribute) == getattr(head, attribute)
    assert names(again.claims) == [
        *(b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-forwarded-port")
    ]


# -- finding a head ------------------------------------------------------------------------------


def test_head_end_finds_pipelined_heads_one_after_the_other() -> None:
    first, second = request(GET, b"X: 1"), request(GET, b"X: 2")
    buffer = bytearray(first + second)
    assert head_end(buffer) == len(first)
    assert head_end(buffer, len(first)) == len(buffer)
    assert head_end(buffer, len(buffer)) == -1


@pytest.mark.parametrize("data", [request(GET, b"X: a"), b"\r\n\r\n" + request(), b"\r\n" + request()])
def test_head_end_gives_the_same_answer_byte_by_byte(data: bytes) -> None:
    for have in range(len(data)):
        assert head_end(data[:have], 0, max(0, have - 1)) == -1
    assert head_end(data, 0, len(data) - 1) == len(data)
    assert head_end(b"junk" + data, 4, 4) == len(data) + 4


def test_bare_line_feed_ends_the_wait_and_the_parser_refuses_it() -> None:
    data = b"GET / HTTP/1.1\nHost: a\n"
    for have in range(len(data) + 1):
        seen = data[:have]
        assert head_end(seen, 0, max(0, have - 1)) == (have if seen.endswith(b"\n") else -1)
    with pytest.raises(MessageError) as caught:
        parse_request_head(data)
    assert caught.value.status == 400


@pytest.mark.parametrize("line_end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("blank", [b"\r\n", b"\n"])
def test_a_response_head_ends_behind_its_first_empty_line(line_end: bytes, blank: bytes) -> None:
    head = line_end.join([b"HTTP/1.1 200 OK", b"X: a", b"Content-Length: 9"]) + line_end + blank
    for behind in (b"", b"x", b"\n", b"\r\n\r\n", b"\n\nHTTP/1.1 200 OK\r\n\r\n"):
        for have in range(len(head + behind) + 1):
            seen = bytearray((head + behind)[:have])
            expected = len(head) if have >= len(head) else -1
            assert response_head_end(seen) == expected
            if have <= len(head):
                assert response_head_end(seen, max(0, have - 1)) == expected
    parsed = parse_response_head(head, b"GET", False)
    assert (parsed.reason, parsed.fields, parsed.length) == (
        *(b"OK", [(b"X", b"a"), (b"Content-Length", b"9")], 9),
    )
    assert b"\n" not in build_response_head(parsed, close=False, minor_visitor=1).replace(b"\r\n", b"")


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.sampled_from([d for _, _, d, _ in VALID_RESPONSES if len(d) < 400]), st.integers(0, 2**20), st.data()
)
def test_a_bare_line_feed_means_what_crlf_does(data: bytes, bare: int, draw: st.DataObject) -> None:
    lines = data[: response_head_end(data)].replace(b"\r\n", b"\n").split(b"\n")
    at = draw.draw(st.integers(0, len(lines) - 2))
    lines[at] = draw.draw(st.sampled_from([lines[at], b" " + lines[at], b"X", b"X: \r", b"X: a\0"]))
    mixed = b"".join(line + (b"\n" if bare >> at & 1 else b"\r\n") for at, line in enumerate(lines[:-1]))
    strict = or_error(parse_response_head, b"\r\n".join(lines[:-1]) + b"\r\n", b"GET", True)
    read = or_error(parse_response_head, mixed, b"GET", True)
    if isinstance(strict, MessageError):
        assert isinstance(read, MessageError) or lines[at].endswith(b"\r")
    else:
        assert read == strict


def test_leading_blank_lines_are_skipped_up_to_a_bound() -> None:
    assert head_end(b"\r\n" * 4) == -1
    assert head_end(b"\r\n" * 4 + request()) == 8 + len(request())
    flood = b"\r\n" * 50
    end = head_end(flood)
    assert 0 < end < len(flood)
    with pytest.raises(MessageError):
        parse_request_head(flood[:end])


@pytest.mark.parametrize(
    "head", [request()[:-1], request()[:-2], request() + b"x", request() + request(), b""]
)
def test_anything_but_exactly_one_head_is_refused(head: bytes) -> None:
    with pytest.raises(MessageError):
        parse_request_head(head)


@pytest.mark.parametrize("tail", [b"x", b"\r\n\r\n", response(), b"\r\n"])
def test_anything_behind_a_response_head_is_refused(tail: bytes) -> None:
    with pytest.raises(MessageError):
        parse_response_head(response(OK, b"Content-Length: 9") + tail, b"GET", False)


# -- requests ------------------------------------------------------------------------------------


def test_typical_request() -> None:
    head = parse_request_head(
        request(
            b"POST /a?b=c HTTP/1.1",
            b"accept: text/html",
            b"X-Own: 1",
            b"Content-Length: 007",
            b"Cookie: a=b",
            host=b"Demo.LocalHost.:5555",
        )
    )
    assert (head.method, head.target, head.minor) == (b"POST", b"/a?b=c", 1)
    assert (head.host, head.host_field) == ("demo.localhost", b"Demo.LocalHost.:5555")
    assert head.fields == [
        (b"accept", b"text/html"),
        (b"X-Own", b"1"),
        (b"Cookie", b"a=b"),
        (b"Content-Length", b"7"),
    ]
    assert (head.length, head.accept, head.upgrade, head.claims) == (7, b"text/html", b"", [])
    assert head.keep_alive
    assert not head.expect_continue
    assert not head.connection_auth


def test_request_as_the_service_gets_it() -> None:
    head = parse_request_head(
        chunked(
            b"", b"Connection: close, X-Gone", b"X-Gone: 1", b"X-Kept: 2", b"TE: trailers", b"Keep-Alive: 5"
        )
    )
    assert build_request_head(head, Forwarding("2001:db8::1", 5555)) == (
        b"POST / HTTP/1.1\r\n"
        b"Host: demo.localhost\r\n"
        b"X-Kept: 2\r\n"
        b"Transfer-Encoding: chunked\r\n"
        b"X-Forwarded-For: 2001:db8::1\r\n"
        b"X-Forwarded-Proto: http\r\n"
        b"X-Forwarded-Host: demo.localhost\r\n"
        b"X-Forwarded-Port: 5555\r\n"
        b"\r\n"
    )


def test_host_override_keeps_the_visitors_host_for_the_service() -> None:
    head = parse_request_head(request(host=b"demo.localhost:5555"))
    built = build_request_head(head, FORWARDING, b"localhost:3000")
    assert b"\r\nHost: localhost:3000\r\n" in built
    assert b"\r\nX-Forwarded-Host: demo.localhost:5555\r\n" in built
    assert built.count(b"Host: ") == 2


@pytest.mark.parametrize(
    ("line", "host", "target", "host_field"),
    [
        (b"GET http://a.test/x?y HTTP/1.1", b"b.test", b"/x?y", b"a.test"),
        (b"GET http://a.test:80?y=/ HTTP/1.1", b"b.test", b"/?y=/", b"a.test:80"),
        (b"GET HTTPS://A.test HTTP/1.1", b"b.test", b"/", b"A.test"),
        (b"OPTIONS http://a.test HTTP/1.1", b"b.test", b"*", b"a.test"),
        (b"OPTIONS http://a.test/ HTTP/1.1", b"b.test", b"/", b"a.test"),
        (b"OPTIONS * HTTP/1.1", b"a.test", b"*", b"a.test"),
        (b"GET http://[::1]:80/ HTTP/1.1", b"b.test", b"/", b"[::1]:80"),
        (b"GET http://a.test/http://c.test/ HTTP/1.1", b"b.test", b"/http://c.test/", b"a.test"),
        (b"FROB http://a.test/ HTTP/1.1", b"b.test", b"/", b"a.test"),
        (b"GET //c.test/x HTTP/1.1", b"a.test", b"//c.test/x", b"a.test"),
    ],
)
def test_absolute_form_decides_over_host(line: bytes, host: bytes, target: bytes, host_field: bytes) -> None:
    head = parse_request_head(request(line, host=host))
    assert (head.target, head.host_field) == (target, host_field)
    assert b"b.test" not in build_request_head(head, FORWARDING)


@pytest.mark.parametrize(
    ("raw", "target"),
    [
        ("/été?q=€", b"/%C3%A9t%C3%A9?q=%E2%82%AC"),
        ("/%2F/é/%c3%a9", b"/%2F/%C3%A9/%c3%a9"),  # what was encoded stays as it was
        ("http://demo.localhost/é?é", b"/%C3%A9?%C3%A9"),
        ("http://demo.localhost?é", b"/?%C3%A9"),
        ('/"<>^`{|}é', b'/"<>^`{|}%C3%A9'),
        ("/\x85\u2028\U0001f600", b"/%C2%85%E2%80%A8%F0%9F%98%80"),
    ],
)
def test_raw_utf8_in_a_target_is_percent_encoded(raw: str, target: bytes) -> None:
    head = parse_request_head(request(b"GET %b HTTP/1.1" % raw.encode()))
    assert (head.target, head.host) == (target, "demo.localhost")
    assert build_request_head(head, FORWARDING).startswith(b"GET %b HTTP/1.1\r\n" % target)


def test_a_target_that_has_grown_is_within_the_limit() -> None:
    for count in (10, 5000, 5400, 5500):
        data = request(b"GET /" + "é".encode() * count + b" HTTP/1.1")
        head = or_error(parse_request_head, data)
        grown = len(data) + 4 * count
        assert isinstance(head, MessageError) == (grown > REQUEST.bytes)
        assert not isinstance(head, MessageError) or head.status == 414


@settings(deadline=None)  # a busy machine is no failure
@given(st.one_of(st.text(max_size=20).map(str.encode), st.binary(max_size=20)))
def test_a_target_is_refused_or_means_what_was_sent(sent: bytes) -> None:
    head = or_error(parse_request_head, request(b"GET /%b HTTP/1.1" % sent))
    if isinstance(head, MessageError):
        return
    assert re.fullmatch(rb"/[\x21\x22\x24-\x7e]*", head.target)
    assert unquote_to_bytes(head.target) == unquote_to_bytes(b"/" + sent)
    assert parse_request_head(request(b"GET %b HTTP/1.1" % head.target)).target == head.target


@pytest.mark.parametrize(
    ("minor", "fields", "keep_alive"),
    [
        (1, [], True),
        (1, [b"Connection: keep-alive"], True),
        (1, [b"Connection: Close"], False),
        (1, [b"Connection: keep-alive, close"], False),
        (1, [b"Connection: x", b"Connection: close"], False),
        (1, [b"Proxy-Connection: close"], True),
        (0, [], False),
        (0, [b"Connection: Keep-Alive"], True),
        (0, [b"Connection: keep-alive, close"], False),
    ],
)
def test_persistence(minor: int, fields: list[bytes], keep_alive: bool) -> None:
    assert parse_request_head(request(b"GET / HTTP/1.%d" % minor, *fields)).keep_alive is keep_alive
    answer = parse_response_head(
        response(b"HTTP/1.%d 200 OK" % minor, b"Content-Length: 0", *fields), b"GET", False
    )
    assert answer.keep_alive is keep_alive


@pytest.mark.parametrize(
    ("fields", "upgrade"),
    [
        ([b"Connection: Upgrade", b"Upgrade: websocket"], b"websocket"),
        ([b"Connection: keep-alive, UPGRADE", b"Upgrade: x/2, websocket"], b"x/2, websocket"),
        ([b"Upgrade: websocket"], b""),
        ([b"Connection: upgrade"], b""),
        ([b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AA", b"Upgrade: h2c"], b""),
        ([b"Connection: Upgrade", b"HTTP2-Settings: AA", b"Upgrade: H2C, websocket,,h2"], b"websocket"),
        ([b"Connection: Upgrade", b"Upgrade: HTTP/2.0"], b""),
    ],
)
def test_upgrade(fields: list[bytes], upgrade: bytes) -> None:
    head = parse_request_head(request(GET, *fields))
    assert head.upgrade == upgrade
    assert head.fields == []
    tail = (
        b"\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n\r\n" if upgrade else b"Port: 5555\r\n\r\n"
    )
    assert build_request_head(head, FORWARDING).endswith(tail)
    old = parse_request_head(request(b"GET / HTTP/1.0", *fields))
    assert old.upgrade == b""
    assert b"upgrade" not in build_request_head(old, FORWARDING).lower()


def test_the_service_is_asked_in_http11_always() -> None:
    head = parse_request_head(
        post(b"Content-Length: 5", b"Connection: keep-alive", b"Expect: 100-continue", minor=0)
    )
    assert not head.expect_continue
    assert head.fields == [(b"Content-Length", b"5")]
    built = build_request_head(head, FORWARDING)
    assert built.startswith(b"POST / HTTP/1.1\r\n")
    assert b"connection:" not in built.lower()
    assert b"expect:" not in built.lower()


@pytest.mark.parametrize(
    "field",
    [
        *(
            b"X-Forwarded-For",
            b"X-Forwarded-Proto",
            b"X-Forwarded-Host",
            b"X-Forwarded-Port",
            b"X-Forwarded-Server",
        ),
        *(
            b"x-forwarded-for",
            b"Forwarded",
            b"X-Real-IP",
            b"X-Forwarded-Ssl",
            b"X_Forwarded_For",
            b"x-real_ip",
        ),
        *(b"X-Forwarded-User", b"x-FORWARDED-client-cert", b"X_Forwarded-Groups", b"X-Forwarded_Email"),
        *(b"X-Forwarded", b"Client-IP", b"X-Client-IP", b"True-Client-IP", b"CF-Connecting-IP", b"client_ip"),
    ],
)
def test_forwarding_fields_of_a_visitor_are_never_passed_on(field: bytes) -> None:
    head = parse_request_head(request(GET, field + b": 203.0.113.9", b"Connection: " + field))
    assert head.fields == []
    assert b"203.0.113.9" not in build_request_head(head, FORWARDING)
    assert head.claims == [(field, b"203.0.113.9")]


def test_our_own_fields_cannot_be_named_away() -> None:
    head = parse_request_head(
        request(GET, b"Connection: X-Forwarded-For, X-Forwarded-Host, Upgrade, Connection")
    )
    assert b"\r\nX-Forwarded-For: 192.0.2.7\r\n" in build_request_head(head, FORWARDING)


def test_fields_with_underscores_of_their_own_are_passed_on() -> None:
    head = parse_request_head(request(GET, b"X_Own: a_b", b"User_Agent: x", b"Cookie: _ga=1"))
    assert names(head.fields) == [b"x_own", b"user_agent", b"cookie"]


@pytest.mark.parametrize(
    ("value", "bound"),
    [
        (b"NTLM TlRMTVNTUAAB", True),
        (b"Negotiate YII", True),
        (b"negotiate", True),
        (b"Basic YTpi", False),
        (b"Bearer negotiated", False),
        (b'Basic realm="a", NTLM', True),
    ],
)
def test_authentication_bound_to_the_connection(value: bytes, bound: bool) -> None:
    assert parse_request_head(request(GET, b"Authorization: " + value)).connection_auth is bound
    answer = response(b"HTTP/1.1 401 X", b"WWW-Authenticate: " + value, b"Content-Length: 0")
    assert parse_response_head(answer, b"GET", False).connection_auth is bound


@pytest.mark.parametrize(
    ("data", "waits"),
    [
        (post(b"Expect: 100-continue", b"Content-Length: 5"), True),
        (chunked(b"", b"expect: 100-Continue"), True),
        (post(b"Expect: 100-continue", b"Content-Length: 0"), False),
        (post(b"Content-Length: 5"), False),
        (post(b"Expect: 100-continue", b"Content-Length: 5", b"Connection: Expect"), False),
    ],
)
def test_expectation(data: bytes, waits: bool) -> None:
    assert parse_request_head(data).expect_continue is waits


def test_limits_are_exact() -> None:
    longest = b"X: " + b"a" * (http1.REQUEST.field_bytes - 3)
    fits = request(GET, longest, b"Y: " + b"b" * (http1.REQUEST.bytes - len(request(GET, longest, b"Y: "))))
    assert len(fits) == http1.REQUEST.bytes == 2 * http1.REQUEST.field_bytes
    assert len(parse_request_head(fits).fields) == 2
    for field in (b"X: ", b"Y: "):
        with pytest.raises(MessageError) as caught:
            parse_request_head(fits.replace(field, field + b"c"))
        assert caught.value.status == 431
    with pytest.raises(MessageError) as caught:
        parse_request_head(request(GET, longest + b"a"))
    assert caught.value.status == 431
    fits = response(OK, b"X: " + b"a" * (http1.RESPONSE.bytes - len(response(OK, b"X: "))))
    assert len(fits) == http1.RESPONSE.bytes
    parse_response_head(fits, b"GET", False)
    with pytest.raises(MessageError):
        parse_response_head(fits.replace(b"X: ", b"X: a"), b"GET", False)


def test_a_request_head_that_never_ends_is_refused_with_the_status_that_fits() -> None:
    assert too_large(b"GET /" + b"a" * 40000).status == 414
    assert too_large(b"GET / HTTP/1.1\r\nX: " + b"a" * 40000).status == 431
    assert too_large(b"\r\nGET /" + b"a" * 40000).status == 414
    assert response_too_large().status == 502


# -- responses -----------------------------------------------------------------------------------


def test_response_as_the_visitor_gets_it() -> None:
    head = parse_response_head(
        response(
            b"HTTP/1.0 200 Fine",
            *(b"Server: x", b"Connection: keep-alive, X-Gone", b"X-Gone: 1", b"Keep-Alive: timeout=5"),
            *(
                b"Content-Length: 05",
                b"Proxy-Connection: close",
                b"Upgrade: h2c",
                b"Set-Cookie: a",
                b"Set-Cookie: b",
            ),
        ),
        b"GET",
        False,
    )
    assert head.keep_alive
    assert head.length == 5
    common = b"HTTP/1.1 200 Fine\r\nServer: x\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nContent-Length: 5\r\n"
    assert build_response_head(head, close=False, minor_visitor=1) == common + b"\r\n"
    assert build_response_head(head, close=True, minor_visitor=1) == common + b"Connection: close\r\n\r\n"
    assert build_response_head(head, close=True, minor_visitor=0) == common + b"Connection: close\r\n\r\n"
    assert build_response_head(head, close=False, minor_visitor=0) == common + b"Connection: close\r\n\r\n"


def test_body_until_close_closes_both_connections() -> None:
    head = parse_response_head(response(b"HTTP/1.1 200 OK", b"Connection: keep-alive"), b"GET", False)
    assert head.length == UNTIL_CLOSE
    assert not head.keep_alive
    assert b"\r\nConnection: close\r\n" in build_response_head(head, close=False, minor_visitor=1)


@pytest.mark.parametrize("status", [200, 206, 404])
def test_answer_to_head_keeps_the_length_of_what_it_does_not_send(status: int) -> None:
    head = parse_response_head(response(b"HTTP/1.1 %d X" % status, b"Content-Length: 5"), b"HEAD", False)
    assert head.length == 0
    assert head.keep_alive
    assert b"\r\nContent-Length: 5\r\n" in build_response_head(head, close=False, minor_visitor=1)


@pytest.mark.parametrize("status", [100, 102, 103, 204])
@pytest.mark.parametrize("field", [b"Content-Length: 5", TE])
def test_status_without_body_loses_fields_that_promise_one(status: int, field: bytes) -> None:
    head = parse_response_head(response(b"HTTP/1.1 %d X" % status, b"Link: x", field), b"GET", False)
    assert (head.length, head.fields) == (0, [(b"Link", b"x")])


def test_interim_response_says_nothing_about_the_connection() -> None:
    head = parse_response_head(response(b"HTTP/1.1 103 X", b"Connection: close", b"Link: x"), b"GET", False)
    assert build_response_head(head, close=True, minor_visitor=1) == b"HTTP/1.1 103 X\r\nLink: x\r\n\r\n"


def test_switching_protocols() -> None:
    answer = response(SWITCH, b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Accept: x")
    head = parse_response_head(answer, b"GET", True)
    assert (head.status, head.upgrade, head.length, head.keep_alive) == (101, b"websocket", 0, False)
    assert build_response_head(head, close=False, minor_visitor=1) == (
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n"
        b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (response(SWITCH, b"Upgrade: websocket", b"Connection: Upgrade"), False),
        (response(SWITCH, b"Connection: Upgrade"), True),
        (response(SWITCH), True),
    ],
)
def test_unsolicited_or_nameless_101_is_refused(data: bytes, asked: bool) -> None:
    with pytest.raises(MessageError) as caught:
        parse_response_head(data, b"GET", asked)
    assert caught.value.status == 502


def test_other_status_with_upgrade_is_no_upgrade() -> None:
    head = parse_response_head(response(OK, b"Upgrade: websocket", b"Connection: Upgrade"), b"GET", True)
    assert head.upgrade == b""
    assert b"pgrade" not in build_response_head(head, close=False, minor_visitor=1)
    head = parse_response_head(
        response(b"HTTP/1.1 426 X", b"Upgrade: websocket", b"Connection: Upgrade", b"Content-Length: 0"),
        b"GET",
        False,
    )
    assert head.upgrade == b""
    built = build_response_head(head, close=True, minor_visitor=1)
    assert b"\r\nUpgrade: websocket\r\n" in built
    assert b"\r\nConnection: Upgrade\r\n" in built


def test_http10_visitor_and_a_chunked_answer() -> None:
    for method in (b"GET", b"HEAD"):
        head = parse_response_head(response(b"HTTP/1.1 200 OK", TE, b"tRailer: X"), method, False)
        assert b"chunked" in build_response_head(head, close=True, minor_visitor=1)
        assert b"tRailer: X" in build_response_head(head, close=True, minor_visitor=1)
        assert (
            build_response_head(head, close=False, minor_visitor=0)
            == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        )


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("minor", [0, 1])
def test_behind_chunks_in_http10_nothing_is_read(method: bytes, minor: int) -> None:
    """RFC 9112 section 6.1: such framing is faulty, whatever Connection says."""
    data = response(b"HTTP/1.%d 200 OK" % minor, b"Connection: keep-alive", TE)
    head = parse_response_head(data, method, False)
    assert head.length == (CHUNKED if method == b"GET" else 0)
    assert head.keep_alive is bool(minor)
    with pytest.raises(MessageError):
        parse_response_head(response(b"HTTP/1.0 200 OK", TE, b"Content-Length: 5"), method, False)


def test_a_peer_may_have_wider_limits() -> None:
    head = request(GET, *[b"X: a"] * 104)
    assert len(parse_request_head(head, HeadLimits(20_000, 110)).fields) == 104


@pytest.mark.parametrize("line", [b"GET /%b HTTP/1.1", b"GET http://demo.localhost/%b HTTP/1.0"])
def test_a_peer_understands_the_largest_request_that_is_sent_on(line: bytes) -> None:
    """A head at all limits, in which no byte can be saved, has grown when it comes to the peer."""
    host = b"demo." + b"a" * 238 + b".localhost:65535" if line.endswith(b"1.1") else None
    fields = [b"X-%d:" % number for number in range(REQUEST.fields - (host is not None))]
    fields[0] += b"a" * (REQUEST.field_bytes - len(fields[0]))
    room = REQUEST.bytes - len(request(line % b"", *fields, host=host))
    head = parse_request_head(request(line % (b"b" * room), *fields, host=host))
    head.fields = [*head.fields, (b"X-Tinytun-Hop", b"1")]
    sent_on = build_request_head(head, Forwarding("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", 65535, "https"))
    with pytest.raises(MessageError):
        parse_request_head(sent_on)
    assert parse_request_head(sent_on, REQUEST.of_a_peer()).target == head.target


# -- properties ----------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        *(
            b"Host: demo.localhost",
            b"host:other.localhost",
            b"Host : a",
            b"Content-Length: 5",
            b"content-length:0",
        ),
        *(b"Content-Length: 5, 5", TE, b"transfer-encoding:chunked", b"Transfer-Encoding: chunked, identity"),
        *(
            b"Transfer-Encoding : chunked",
            b"Connection: close",
            b"Connection: Content-Length",
            b"Connection: X-A",
        ),
        *(
            b"X-A: 1",
            b" X-A: 1",
            b"\tContent-Length: 5",
            b"X_A: 1",
            b"Content_Length: 5",
            b"Expect: 100-continue",
        ),
        *(
            b"Upgrade: websocket",
            b"Connection: upgrade",
            b"X-Forwarded-For: 1.1.1.1",
            b"TE: trailers",
            b"",
            b"X",
        ),
        *(b"X: a\nContent-Length: 7", b"X: a\rContent-Length: 7", b"X: a\0b", b"X-B:", b": a", b"X: \xff"),
    ]
)
FIRST = st.sampled_from(
    [
        *(
            b"GET / HTTP/1.1",
            b"POST /x HTTP/1.1",
            b"GET / HTTP/1.0",
            b"HEAD http://a.test/ HTTP/1.1",
            b"get /",
        ),
        *(
            b"POST / HTTP/2.0",
            b"POST  / HTTP/1.1",
            b"OPTIONS * HTTP/1.1",
            b"",
            b"FROB / HTTP/1.1",
            b"CONNECT a:1 HTTP/1.1",
        ),
    ]
)
HEADS = st.builds(
    lambda first, lines, end: end.join([first, *lines]) + end * 2,
    FIRST,
    st.lists(LINES, max_size=6),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]),
)


def or_error(parse: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | MessageError:
    try:
        return parse(*args, **kwargs)
    except MessageError as error:
        return error


@settings(deadline=None)  # a busy machine is no failure
@given(HEADS)
def test_request_is_refused_or_has_one_reading(data: bytes) -> None:
    head = or_error(parse_request_head, data)
    if isinstance(head, MessageError):
        assert head.status in (400, 414, 417, 431, 501, 505)
        return
    assert head_end(data) == len(data)
    sent = [line.split(b":")[0].lower() for line in data.split(b"\r\n")]
    assert not {b"content-length", b"transfer-encoding"} <= set(sent)
    for name in (b"host", b"content-length", b"transfer-encoding"):
        assert sent.count(name) <= 1
        assert names(head.fields).count(name) <= 1
    assert_same_request(head)


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from([d for _, d in VALID_REQUESTS if len(d) < 400]), st.data())
def test_mutated_request_is_refused_or_has_one_reading(data: bytes, draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(data)))
    cut = draw.draw(st.integers(0, 3))
    data = data[:at] + draw.draw(st.binary(max_size=3)) + data[at + cut :]
    end = head_end(data)
    head = or_error(parse_request_head, data[:end])
    if not isinstance(head, MessageError):
        assert_same_request(head)


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=200))
def test_garbage_raises_nothing_else(data: bytes) -> None:
    for prefix in (b"", b"GET / HTTP/1.1\r\n", b"HTTP/1.1 200 OK\r\n"):
        head_end(prefix + data)
        response_head_end(prefix + data)
        with pytest.raises(MessageError):
            parse_request_head(prefix + data + b"\r\n\r\n")
        answer = or_error(parse_response_head, prefix + data + b"\r\n\r\n", b"GET", True)
        assert not isinstance(answer, MessageError) or answer.status == 502


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from([(m, d) for _, m, d, _ in VALID_RESPONSES if len(d) < 400]), st.data())
def test_mutated_response_is_refused_or_has_one_reading(
    case: tuple[bytes, bytes], draw: st.DataObject
) -> None:
    method, data = case
    at = draw.draw(st.integers(0, len(data)))
    data = data[:at] + draw.draw(st.binary(max_size=3)) + data[at + draw.draw(st.integers(0, 3)) :]
    head = or_error(parse_response_head, data[: response_head_end(data)], method, True)
    if isinstance(head, MessageError):
        assert head.status == 502
        return
    again = parse_response_head(build_response_head(head, close=False, minor_visitor=1), method, True)
    assert (again.status, again.reason, again.length, again.upgrade) == (
        *(head.status, head.reason, head.length, head.upgrade),
    )


def test_constants_agree_with_the_corpus() -> None:
    assert (http1.CHUNKED, http1.UNTIL_CLOSE) == (CHUNKED, UNTIL_CLOSE)
    assert read_request(chunked(HELLO) + request())[1] == request()
