"""The CONNECT request and its answers: round trips, every rule, and hostile bytes."""

from __future__ import annotations

import re
import string
from base64 import urlsafe_b64encode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent.errors import HandshakeError, UsageError
from tinytun_gevent.wire import handshake
from tinytun_gevent.wire.handshake import (
    HealthCheck,
    Join,
    Kind,
    OpenReply,
    OpenRequest,
    Refusal,
    build_check,
    build_checked,
    build_health,
    build_refusal,
    build_reply,
    build_request,
    clean_text,
    head_end,
    is_host,
    is_resume_token,
    is_subdomain,
    parse_reply,
    parse_request,
)
from tinytun_gevent.wire.options import Options, Rewrite

subdomains = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True)
hosts = st.one_of(
    st.from_regex(r"[A-Za-z0-9._-]{1,60}(:[0-9]{1,4})?", fullmatch=True),
    st.ip_addresses(v=6).map(lambda address: f"[{address}]:5554"),
)
ports = st.integers(1, 65535)
tokens = st.from_regex(r"[A-Za-z0-9._~+/-]{1,80}={0,2}", fullmatch=True)
connection_ids = st.from_regex(r"[!-~]{1,64}", fullmatch=True)
keys = st.from_regex(r"[0-9A-Za-z]{16,64}", fullmatch=True)


def request(*fields: bytes, first: bytes = b"CONNECT example.com:5554 HTTP/1.1") -> bytes:
    return b"\r\n".join((first, *fields, b"", b""))


def reply(*fields: bytes, first: bytes = b"HTTP/1.1 101 Switching Protocols") -> bytes:
    return request(*fields, first=first)


def opened(*fields: bytes) -> OpenRequest:
    parsed = parse_request(request(*fields))
    assert isinstance(parsed, OpenRequest)
    return parsed


def refused(head: bytes) -> int:
    """The status of the HandshakeError that ``head`` causes."""
    with pytest.raises(HandshakeError) as caught:
        parse_request(head)
    return caught.value.status


# Round trips


@given(hosts, subdomains | st.none(), tokens | st.none(), hosts | st.none())
def test_an_http_request_survives(
    authority: str, subdomain: str | None, token: str | None, host_header: str | None
) -> None:
    asked = OpenRequest(Kind.HTTP, authority, subdomain, None, token, host_header)
    head = build_request(asked)
    assert head_end(head) == len(head)
    assert parse_request(head) == asked


@given(st.sampled_from((Kind.TCP, Kind.TCP_PORT)), hosts, ports | st.none())
def test_a_tcp_request_survives(kind: Kind, authority: str, port: int | None) -> None:
    asked = OpenRequest(kind, authority, port=port)
    assert parse_request(build_request(asked)) == asked


@given(st.sampled_from(Kind), hosts, connection_ids, keys, tokens | st.none())
def test_a_request_to_join_survives(
    kind: Kind, authority: str, connection_id: str, key: str, token: str | None
) -> None:
    asked = OpenRequest(kind, authority, token=token, join=Join(connection_id, key))
    head = build_request(asked)
    assert head_end(head) == len(head)
    assert parse_request(head) == asked


@given(
    st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
    hosts | st.none(),
    subdomains | st.none(),
    ports | st.none(),
    st.sampled_from((None, "http://a.example.com", "https://a.b:8443", "tcp://h:20000")),
    st.booleans(),
    keys | st.none(),
)
def test_a_reply_survives(
    cid: str,
    domain: str | None,
    sub: str | None,
    port: int | None,
    url: str | None,
    host_header: bool,
    key: str | None,
) -> None:
    said = OpenReply(cid, domain, sub, port, url, host_header, key)
    head = build_reply(said)
    assert head_end(head) == len(head)
    assert parse_reply(head) == said


@given(
    st.sampled_from((400, 401, 403, 409, 429, 503)), st.text(max_size=2000), st.none() | st.integers(0, 999)
)
def test_a_refusal_survives_whatever_its_reason(status: int, reason: str, retry_after: int | None) -> None:
    answer = build_refusal(status, reason, retry_after)
    end = head_end(answer)
    parsed = parse_reply(answer[:end])
    assert isinstance(parsed, Refusal)
    assert parsed.status == status
    assert parsed.retry_after == retry_after
    assert parsed.content_length == len(answer) - end
    assert clean_text(answer[end:], 4096).isprintable()


def test_a_refusal_is_plain_text_that_closes() -> None:
    assert build_refusal(409, "the subdomain is taken", 7) == (
        b"HTTP/1.1 409 Conflict\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 22\r\n"
        b"Retry-After: 7\r\nConnection: close\r\n\r\nthe subdomain is taken"
    )


# What the original sends


def test_the_originals_client_is_understood() -> None:
    head = b"CONNECT 127.0.0.1:5554 HTTP/1.1\r\nx-tinytun-type: http\r\nx-tinytun-subdomain: MyApp\r\n\r\n"
    assert parse_request(head) == OpenRequest(Kind.HTTP, "127.0.0.1:5554", "myapp")


def test_its_port_may_be_missing_from_the_authority_but_not_empty() -> None:
    parsed = parse_request(request(first=b"CONNECT tinytun.example HTTP/1.1"))
    assert parsed == OpenRequest(Kind.HTTP, "tinytun.example")
    assert refused(request(first=b"CONNECT tinytun.example: HTTP/1.1")) == 400


def test_the_originals_replies_are_understood() -> None:
    cid = "0123456789abcdef0123456789abcdef"
    head = (
        f"HTTP/1.1 101 Switching Protocols\r\nx-tinytun-connection-id: {cid}\r\nx-tinytun-domain: a.b.c\r\n"
        "x-tinytun-subdomain: a\r\ndate: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n"
    ).encode()
    assert parse_reply(head) == OpenReply(cid, "a.b.c", "a")
    tcp = f"HTTP/1.1 101\r\nx-tinytun-connection-id: {cid}\r\nx-tinytun-port: 30000\r\nodd: \xff\r\n\r\n"
    assert parse_reply(tcp.encode("latin-1")) == OpenReply(cid, port=30000)
    taken = b"HTTP/1.1 409 Conflict\r\ncontent-length: 23\r\n\r\n"
    assert parse_reply(taken) == Refusal(409, "Conflict", None, 23)


def test_our_101_has_neither_upgrade_nor_connection() -> None:
    head = build_reply(OpenReply("id", "a.b", "a", url="http://a.b", host_header=True)).lower()
    assert head.startswith(b"http/1.1 101 ")
    assert b"upgrade:" not in head
    assert b"connection:" not in head
    assert b"x-tinytun-host-header: 1\r\n" in head


# The request's rules


@pytest.mark.parametrize("value", [b"", b" ", b"http", b"HTTP", b"TCP", b"nonsense", b"\xff"])
def test_any_type_but_the_tcp_ones_is_http(value: bytes) -> None:
    assert opened(b"x-tinytun-type:" + value).kind is Kind.HTTP


def test_the_type_may_be_absent_and_tcp_types_are_known() -> None:
    assert opened().kind is Kind.HTTP
    assert opened(b"X-TinyTun-Type: tcp").kind is Kind.TCP
    assert opened(b"x-tinytun-type:\ttcp_port ").kind is Kind.TCP_PORT


@pytest.mark.parametrize("name", ["a", "7", "a-b", "a--b", "x" * 63])
def test_good_subdomains(name: str) -> None:
    assert is_subdomain(name)
    assert opened(f"x-tinytun-subdomain: {name.upper()}".encode()).subdomain == name


@pytest.mark.parametrize(
    "name", ["-a", "a-", "-", "a.b", "a_b", "x" * 64, "a b", "é", "a\tb", "*", "a/b", "\uff41", "a\u212a"]
)
def test_bad_subdomains(name: str) -> None:
    assert not is_subdomain(name)
    assert refused(request(b"x-tinytun-subdomain: " + name.encode())) == 400


def test_a_blank_subdomain_counts_as_absent() -> None:
    assert opened(b"x-tinytun-subdomain:").subdomain is None
    assert opened(b"x-tinytun-subdomain:  \t ").subdomain is None


def test_what_belongs_to_another_kind_is_ignored() -> None:
    assert opened(b"x-tinytun-port: nonsense").port is None
    assert opened(b"x-tinytun-type: tcp", b"x-tinytun-subdomain: -").subdomain is None


@pytest.mark.parametrize("value", [b"1", b"20000", b"65535", b"02000"])
def test_good_ports(value: bytes) -> None:
    assert opened(b"x-tinytun-type: tcp", b"x-tinytun-port: " + value).port == int(value)


@pytest.mark.parametrize(
    "value",
    [b"", b"0", b"65536", b"-1", b"+80", b"8 0", b"1e4", b"0x50", b"99999999999", b"\xb2", b"80.0", b"8_0"],
)
def test_bad_ports(value: bytes) -> None:
    assert refused(request(b"x-tinytun-type: tcp", b"x-tinytun-port: " + value)) == 400


@pytest.mark.parametrize(
    "value", ["localhost", "localhost:3000", "[::1]:80", "[::ffff:1.2.3.4]", "a_b.c", "a" * 255]
)
def test_good_host_headers(value: str) -> None:
    assert is_host(value)
    assert opened(f"x-tinytun-host-header: {value}".encode()).host_header == value


@pytest.mark.parametrize(
    "value",
    [
        "",
        "a b",
        "a:b",
        "a:",
        "a:65536",
        "a:123456",
        "::1",
        "[::1",
        "[:::1]",
        "[1.2.3.4]",
        "a@b",
        "a/b",
        "a,b",
        "a" * 256,
        "http://a",
        "é",
        "[fe80::1%eth0]",
        "a\tb",
        "[]",
        ":80",
        "[::1]x",
        "[::1]:",
    ],
)
def test_bad_host_headers(value: str) -> None:
    assert not is_host(value)
    assert refused(request(b"x-tinytun-host-header: " + value.encode())) == 400


def test_the_bearer_token_is_taken_and_never_shown() -> None:
    asked = opened(b"Authorization: bEaReR  abc.DEF-1_~+/==")
    assert asked.token == "abc.DEF-1_~+/=="
    assert "abc.DEF" not in repr(asked)


def test_who_joins_names_a_tunnel_and_its_key_which_is_never_shown() -> None:
    key = "0123456789abcdef" * 2
    asked = opened(b"x-tinytun-join:  a1 " + key.encode() + b" ")
    assert asked.join == Join("a1", key)
    assert opened().join is None
    said = parse_reply(reply(b"x-tinytun-connection-id: a1", b"x-tinytun-join: " + key.encode()))
    assert said == OpenReply("a1", join_key=key)
    assert key not in repr(asked) + repr(said)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("token", [None, "", "0123456789abcdef" * 4])
def test_a_resume_token_survives_and_is_never_shown(kind: Kind, token: str | None) -> None:
    asked = OpenRequest(kind, "a:1", resume=token)
    assert parse_request(build_request(asked)) == asked
    granted = OpenReply("a1", resume=token or None)
    assert parse_reply(build_reply(granted)) == granted
    assert not token or token not in repr(asked) + repr(granted)
    assert is_resume_token(token or "") == bool(token)


@pytest.mark.parametrize("value", [b"k" * 15, b"k" * 257, b"k" * 20 + b" k", b"k" * 16 + b"\xe9"])
def test_what_is_no_resume_token_is_refused(value: bytes) -> None:
    assert refused(request(b"x-tinytun-resume: " + value)) == 400
    with pytest.raises(HandshakeError):
        open_reply(b"x-tinytun-resume: " + value)
    with pytest.raises(UsageError):
        build_request(OpenRequest(Kind.HTTP, "a:1", resume=value.decode("latin-1")))
    assert not is_resume_token(value.decode("latin-1"))


def test_who_joins_resumes_nothing() -> None:
    joins = opened(b"x-tinytun-join: a " + b"k" * 32, b"x-tinytun-resume: " + b"k" * 32)
    assert joins.resume is None


def test_a_name_means_nothing_to_who_joins() -> None:
    join = b"x-tinytun-join: a " + b"k" * 32
    assert opened(join, b"x-tinytun-subdomain: app").subdomain is None
    assert opened(join, b"x-tinytun-subdomain: not a name").subdomain is None
    asked = opened(join, b"x-tinytun-type: tcp", b"x-tinytun-port: x")
    assert (asked.kind, asked.port, asked.join) == (Kind.TCP, None, Join("a", "k" * 32))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"a",
        b"a ",
        b"a " + b"k" * 15,
        b"a " + b"k" * 65,
        b"a " + b"k" * 31 + b"-",
        b"a " + b"k" * 31 + b"\xe9",
        b"a  " + b"k" * 32,
        b"a\t" + b"k" * 32,
        b"a b " + b"k" * 32,
        b"a " + b"k" * 32 + b" b",
        b"a" * 65 + b" " + b"k" * 32,
        b"\xe9 " + b"k" * 32,
        b"k" * 32,
    ],
)
def test_what_is_not_an_id_and_a_key_is_refused(value: bytes) -> None:
    with pytest.raises(HandshakeError) as caught:
        parse_request(request(b"x-tinytun-join: " + value))
    assert caught.value.status == 400
    assert "k" * 15 not in str(caught.value)


def test_other_credentials_are_not_ours_but_a_malformed_bearer_is_refused() -> None:
    assert opened(b"Authorization: Basic YTpi").token is None
    for value in (b"Bearer", b"Bearer a b", b"Bearer \xff", b"Bearer " + b"a" * 4097, b"Bearer a=b"):
        assert refused(request(b"Authorization: " + value)) == 400


@pytest.mark.parametrize("name", [b"Host", b"Authorization", b"Content-Length"])
def test_single_fields_may_not_be_repeated(name: bytes) -> None:
    value = {b"Host": b"a", b"Authorization": b"Bearer a", b"Content-Length": b"0"}[name]
    assert isinstance(parse_request(request(name + b": " + value)), OpenRequest)
    assert refused(request(name + b": " + value, name.upper() + b": " + value)) == 400


@pytest.mark.parametrize(
    "name", ["type", "subdomain", "port", "host-header", "resume", "join", "of-tomorrow"]
)
def test_our_fields_may_not_be_repeated(name: str) -> None:
    line = f"x-tinytun-{name}: a".encode()
    assert refused(request(line, b"X-Other: 1", line.replace(b"x-tiny", b"X-Tiny"))) == 400


def test_other_fields_may_be_repeated_and_unknown_ones_are_skipped() -> None:
    assert opened(b"Via: 1.1 a", b"Via: 1.1 b", b"x-tinytun-of-tomorrow: 1").kind is Kind.HTTP


def test_host_is_not_required_but_must_be_valid() -> None:
    assert opened(b"Host:").authority == "example.com:5554"
    assert opened(b"Host: other.example").authority == "example.com:5554"
    assert refused(request(b"Host: a b")) == 400


@pytest.mark.parametrize(
    "field",
    [b"Transfer-Encoding: chunked", b"Content-Length: 5", b"Content-Length: 0, 5", b"Content-Length: x"],
)
def test_connect_has_no_body(field: bytes) -> None:
    assert refused(request(field)) == 400


@pytest.mark.parametrize(
    "bad",
    [
        b"X: a\nY: b",
        b"X: a\rY: b",
        b"X: a\r\n folded",
        b"X: a\r\n\tfolded",
        b" X: a",
        b"X : a",
        b"X",
        b": a",
        b"",
        b"X\xe9: a",
        b"X: \0",
        b"X: \x1b[2J",
        b"X: \x7f",
        b"X" * 65 + b": a",
    ],
)
def test_malformed_fields_are_refused(bad: bytes) -> None:
    assert refused(request(b"A: b", bad, b"C: d")) == 400
    assert refused(request(bad, first=b"GET / HTTP/1.1")) == 400


@pytest.mark.parametrize(
    "first",
    [
        b"CONNECT a:1",
        b"CONNECT  a:1 HTTP/1.1",
        b"CONNECT a:1 HTTP/1.1 ",
        b" CONNECT a:1 HTTP/1.1",
        b"CONNECT a:1\tHTTP/1.1",
        b"CONNECT a:1 http/1.1",
        b"CONNECT a:1 HTTP/1.1\n",
        b"CONNECT /path HTTP/1.1",
        b"CONNECT http://a:1 HTTP/1.1",
        b"CONNECT a@b:1 HTTP/1.1",
        b"CONNECT a:99999 HTTP/1.1",
        b"CONNECT \x1b:1 HTTP/1.1",
        b"CONN\x00ECT a:1 HTTP/1.1",
        b"",
        b"GET /\xff HTTP/1.1",
        b"GET /",
    ],
)
def test_malformed_request_lines_are_refused(first: bytes) -> None:
    assert refused(request(first=first)) == 400


@pytest.mark.parametrize("version", [b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/3"])
def test_other_versions_are_505(version: bytes) -> None:
    assert refused(request(first=b"CONNECT a:1 " + version)) == 505
    assert refused(request(first=b"PRI * " + version)) == 505


def test_http_1_0_is_spoken() -> None:
    parsed = parse_request(request(first=b"CONNECT a:1 HTTP/1.0"))
    assert parsed == OpenRequest(Kind.HTTP, "a:1")


def test_other_methods_are_health_checks() -> None:
    for first in (b"GET / HTTP/1.1", b"HEAD /healthz HTTP/1.0", b"OPTIONS * HTTP/1.1", b"connect a HTTP/1.1"):
        assert isinstance(parse_request(request(b"Host: a", first=first)), HealthCheck)
    assert build_health() == b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def test_a_get_with_a_token_asks_whether_it_is_valid() -> None:
    parsed = parse_request(build_check("a:1", "tt_secret"))
    assert isinstance(parsed, HealthCheck)
    assert parsed.token == "tt_secret"
    assert "secret" not in repr(parsed)
    with pytest.raises(UsageError):
        build_check("a:1", "no token")
    for needed, status in ((True, 204), (False, 200)):
        answer = build_checked(needed=needed)
        reply = parse_reply(answer[: head_end(answer)])
        assert isinstance(reply, Refusal)
        assert reply.status == status


def test_at_most_100_fields() -> None:
    fields = [b"X-%d: a" % number for number in range(101)]
    assert opened(*fields[:100]).kind is Kind.HTTP
    assert refused(request(*fields)) == 431


def test_at_most_16_kib() -> None:
    size = handshake.MAX_HEAD - len(request(b"X: "))
    assert opened(b"X: " + b"a" * size).kind is Kind.HTTP
    assert refused(request(b"X: " + b"a" * (size + 1))) == 431


def test_bytes_beyond_the_head_and_heads_without_end_are_refused() -> None:
    assert refused(request() + b"PRI") == 400
    assert refused(request() + request()) == 400
    assert refused(b"CONNECT a:1 HTTP/1.1\r\n") == 400
    assert refused(b"") == 400


@given(st.binary(max_size=200), st.integers(0, 200))
def test_head_end_may_be_asked_as_bytes_arrive(noise: bytes, cut: int) -> None:
    buffer = bytearray(noise + request() + b"tail")
    whole = head_end(buffer)
    assert whole == bytes(buffer).index(b"\r\n\r\n") + 4
    seen, found = 0, -1
    for size in (cut, cut + 1, cut + 2, cut + 3, len(buffer)):
        found = head_end(buffer[:size], seen)
        seen = min(size, len(buffer))
        if found >= 0:
            break
    assert found == whole


# Hostile bytes

noise = st.lists(
    st.one_of(
        st.sampled_from(
            [
                b"CONNECT",
                b"GET",
                b" ",
                b"a:1",
                b"HTTP/1.1",
                b"HTTP/1.1 101 x",
                b"HTTP/1.1 409 ",
                b"\r\n",
                b"\r",
                b"\n",
                b":",
                b"x-tinytun-port: ",
                b"x-tinytun-type: tcp",
                b"x-tinytun-subdomain:",
                b"Host:",
                b"\t",
                b"[::1]",
                b"x-tinytun-connection-id: a",
                b"x-tinytun-url: http://a",
                b"Retry-After: ",
                b"\x00",
                b"\xff",
                b"9",
            ]
        ),
        st.binary(max_size=6),
    ),
    max_size=30,
).map(b"".join)


@given(noise)
@example(b"CONNECT a:1 HTTP/1.1\r\nx-tinytun-type: tcp\r\nx-tinytun-port: \xb2")
def test_garbage_raises_nothing_but_handshake_error(garbage: bytes) -> None:
    for head in (garbage, garbage + b"\r\n\r\n", request(garbage), reply(garbage)):
        for parse in (parse_request, parse_reply):
            try:
                parsed: object = parse(head)
            except HandshakeError as error:
                parsed = error
            if isinstance(parsed, HandshakeError):
                assert parsed.status in (400, 431, 502, 505)
                assert str(parsed).isprintable()
            else:
                assert isinstance(parsed, (OpenRequest, HealthCheck, OpenReply, Refusal))


@given(st.text(string.printable + "\x00\x1b\x7fé\u202e", max_size=30))
def test_what_is_accepted_of_a_value_is_clean(text: str) -> None:
    value = text.encode()
    heads = [
        reply(b"x-tinytun-connection-id: a", name + b": " + value)
        for name in (b"x-tinytun-url", b"x-tinytun-domain")
    ]
    heads += [reply(b"x-tinytun-connection-id: " + value), reply(first=b"HTTP/1.1 409 " + value)]
    for head in heads:
        try:
            parsed = parse_reply(head)
        except HandshakeError:
            continue
        if isinstance(parsed, Refusal):
            texts = [parsed.reason]
        else:
            assert isinstance(parsed, OpenReply)
            texts = [parsed.connection_id, parsed.url or "", parsed.domain or ""]
        assert all(part.isprintable() for part in texts)


# The reply's rules


def open_reply(*fields: bytes) -> OpenReply:
    parsed = parse_reply(reply(b"x-tinytun-connection-id: a", *fields))
    assert isinstance(parsed, OpenReply)
    return parsed


def test_a_reply_must_have_an_id() -> None:
    with pytest.raises(HandshakeError) as caught:
        parse_reply(reply(b"x-tinytun-domain: a.b"))
    assert caught.value.status == 502


@pytest.mark.parametrize(
    "field",
    [
        b"x-tinytun-connection-id: b",  # the second one
        b"x-tinytun-domain: a b",
        b"x-tinytun-domain: a\x1b[2J",
        b"x-tinytun-domain:",
        b"x-tinytun-subdomain: a.b",
        b"x-tinytun-port: 70000",
        b"x-tinytun-port: x",
        b"x-tinytun-join:",
        b"x-tinytun-join: " + b"k" * 15,
        b"x-tinytun-join: " + b"k" * 65,
        b"x-tinytun-join: a " + b"k" * 32,
        b"x-tinytun-url: ftp://a",
        b"x-tinytun-url: javascript:alert(1)",
        b"x-tinytun-url: http://a b",
        b"x-tinytun-url: http://\xc3\xa9",
        b"x-tinytun-url: http://",
        b"x-tinytun-url: http://" + b"a" * 2048,
    ],
)
def test_bad_reply_fields_are_refused(field: bytes) -> None:
    with pytest.raises(HandshakeError):
        open_reply(field)


def test_an_id_has_bounds() -> None:
    for value in (b"a" * 65, b"a b", b"\xe9", b""):
        with pytest.raises(HandshakeError):
            parse_reply(reply(b"x-tinytun-connection-id: " + value))
    assert parse_reply(reply(b"x-tinytun-connection-id: " + b"a" * 64)) == OpenReply("a" * 64)


def test_a_server_that_echoes_the_host_header_knows_it() -> None:
    assert open_reply(b"X-Tinytun-Host-Header: 1").host_header
    assert not open_reply().host_header


@pytest.mark.parametrize(
    "first", [b"HTTP/1.1 100 Continue", b"HTTP/1.1 102 ", b"HTTP/2 101", b"HTTP/1.1 99", b"SSH-2.0"]
)
def test_what_is_no_final_answer_is_refused(first: bytes) -> None:
    with pytest.raises(HandshakeError):
        parse_reply(reply(first=first))


def test_any_other_final_answer_is_a_refusal() -> None:
    assert parse_reply(reply(first=b"HTTP/1.0 200 OK")) == Refusal(200, "OK")
    assert parse_reply(reply(first=b"HTTP/1.1 503")) == Refusal(503, "")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0.0),
        (b"30", 30.0),
        (b"999999999", 86400.0),
        (b"-1", None),
        (b"soon", None),
        (b"1.5", None),
        (b"", None),
        (b"9" * 40, None),
        (b"Fri, 31 Dec 1999 23:59:59 GMT", None),
    ],
)
def test_retry_after_is_bounded(value: bytes, seconds: float | None) -> None:
    parsed = parse_reply(reply(b"Retry-After: " + value, first=b"HTTP/1.1 429 Slow"))
    assert parsed == Refusal(429, "Slow", seconds)


def test_a_reason_reaches_a_terminal_without_control_characters() -> None:
    head = b"HTTP/1.1 409 no\x1b[31m\x07 \x9b \xe2\x80\xae way" + b"!" * 400 + b"\r\n\r\n"
    parsed = parse_reply(head)
    assert isinstance(parsed, Refusal)
    assert re.fullmatch(r"no \[31m \ufffd way!+", parsed.reason)
    assert len(parsed.reason) <= 200


@given(st.binary(max_size=3000))
def test_clean_text_is_one_printable_bounded_line(data: bytes) -> None:
    text = clean_text(data, 100)
    assert text.isprintable()
    assert len(text) <= 100


# Options


def test_options_travel_in_both_directions() -> None:
    options = Options(rewrite=Rewrite("http://localhost:3000"), forwarded_host=False)
    head = build_request(OpenRequest(Kind.HTTP, "a:1", options=options))
    parsed = parse_request(head)
    assert isinstance(parsed, OpenRequest)
    assert parsed.options == options
    said = parse_reply(build_reply(OpenReply("id", options=options.names, kind=Kind.HTTP)))
    assert said == OpenReply("id", options=("rewrite", "forwarded_host"), kind=Kind.HTTP)


def test_options_beside_the_longest_of_everything_else_fit_into_a_head() -> None:
    asked = OpenRequest(
        Kind.HTTP, "h" * 249 + ":65535", "s" * 63, token="t" * 4096, host_header="h" * 255, resume="r" * 256
    )
    head = build_request(asked)
    longest = f"x-tinytun-options: {urlsafe_b64encode(b'{%8190b}' % b'').rstrip(b'=').decode()}\r\n".encode()
    parsed = parse_request(head[:-2] + longest + b"\r\n")
    assert isinstance(parsed, OpenRequest)
    assert parsed.options == Options()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (b'{"rewrite":{"origin":1}}', "option rewrite.origin: "),
        (b'{"visitors":[]}', "option visitors: unknown"),
        (b'{"a\x1b[31m\r\nb":1}', "not JSON"),
        ('{"\u202e":1}'.encode(), "option : unknown"),
        (b'{"%b":1}' % (b"x" * 4000), "option xxx"),
    ],
)
def test_bad_options_are_refused_with_their_path(value: bytes, path: str) -> None:
    head = request(b"x-tinytun-options: " + urlsafe_b64encode(value).rstrip(b"="))
    with pytest.raises(HandshakeError, match=path) as caught:
        parse_request(head)
    assert caught.value.status == 400
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_a_blank_or_second_list_of_options_is_refused() -> None:
    assert refused(request(b"x-tinytun-options:")) == 400
    assert refused(request(b"x-tinytun-options: e30", b"x-tinytun-options: e30")) == 400


def test_a_session_that_joins_has_its_tunnels_options() -> None:
    assert opened(b"x-tinytun-join: id " + b"k" * 32, b"x-tinytun-options: e30").options is None


@pytest.mark.parametrize("value", [b"Rewrite", b"a b", b"a;b", b"x" * 33, b"\xe9", b"a," * 70])
def test_a_list_of_options_that_makes_no_sense_is_refused(value: bytes) -> None:
    with pytest.raises(HandshakeError):
        open_reply(b"x-tinytun-options: " + value)


def test_a_server_may_name_options_that_nobody_asked_for() -> None:
    assert open_reply(b"x-tinytun-options: one,two ,, three").options == ("one", "two", "three")
    assert open_reply(b"x-tinytun-options: ").options == ()


def test_the_type_that_was_opened_is_a_known_one() -> None:
    assert open_reply(b"x-tinytun-type: tcp").kind is Kind.TCP
    with pytest.raises(HandshakeError):
        open_reply(b"x-tinytun-type: udp")


# Building


@pytest.mark.parametrize(
    "bad",
    [
        OpenRequest(Kind.HTTP, "a:1\r\nX: y"),
        OpenRequest(Kind.HTTP, "a:1", subdomain="A"),
        OpenRequest(Kind.HTTP, "a:1", subdomain="a\r\nX: y"),
        OpenRequest(Kind.TCP, "a:1", port=0),
        OpenRequest(Kind.TCP, "a:1", port=65536),
        OpenRequest(Kind.HTTP, "a:1", host_header="a\r\nX: y"),
        OpenRequest(Kind.HTTP, "a:1", token="a\r\nX: y"),
        OpenRequest(Kind.HTTP, "a:1", token=""),
        OpenRequest(Kind.HTTP, "a:1", join=Join("a", "k" * 31 + "\r")),
        OpenRequest(Kind.HTTP, "a:1", join=Join("a b", "k" * 32)),
        OpenRequest(Kind.HTTP, "a:1", join=Join("a", "")),
    ],
)
def test_what_cannot_be_asked_for_is_not_sent(bad: OpenRequest) -> None:
    with pytest.raises(UsageError):
        build_request(bad)


def test_a_reply_cannot_be_given_a_second_line() -> None:
    with pytest.raises(ValueError):
        build_reply(OpenReply("a", url="http://a\r\nX: y"))
