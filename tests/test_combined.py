"""A line of the access log: the format, the escaping, and what is never in it."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server import combined
from tinytun_gevent.server.account import Account
from tinytun_gevent.server.combined import quoted, timestamp, without_query, word
from tinytun_gevent.server.observed import Refused
from tinytun_gevent.wire.handshake import Kind
from tinytun_gevent.wire.http1 import HeadLimits, parse_request_head

COMBINED = re.compile(
    r'(?P<ip>\S+) - (?P<user>\S+) \[(?P<time>[^\]]+)\] "(?P<first>(?:[^"\\]|\\.)*)" (?P<status>\d{3}) '
    r'(?P<bytes>\d+|-) "(?P<referer>(?:[^"\\]|\\.)*)" "(?P<agent>(?:[^"\\]|\\.)*)"'
)
"""As what reads such logs does; it does not look beyond."""

ESCAPE = re.compile(r'\\(x[0-9a-f]{2}|["\\bnrtv])')


def unescaped(text: str) -> bytes:
    """The bytes that Apache's escapes stand for."""
    short = {'"': 0x22, "\\": 0x5C, "b": 8, "n": 10, "r": 13, "t": 9, "v": 11}

    def byte(match: re.Match[str]) -> str:
        code = match[1]
        return chr(int(code[1:], 16) if code[0] == "x" else short[code])

    return ESCAPE.sub(byte, text).encode("latin-1")


def line(head: bytes, tunnel: Tunnel | None = None, **given: Any) -> str:
    values: dict[str, Any] = {
        "client": "192.0.2.7",
        "request_id": "5f0c1d2e3a4b",
        "status": 200,
        "response_bytes": 1024,
        "started_at": 10.0,
        "tunnel": tunnel,
        "request": parse_request_head(head, HeadLimits(16384, 100)) if head else None,
    }
    return combined.line(Refused(**values | given), "26/Nov/2026:12:00:00 +0000", 10.0126)


HEAD = b"GET /a/b?token=1 HTTP/1.1\r\nHost: App.Example.com:80\r\nUser-Agent: curl/8\r\nReferer: http://x/y?z\r\n\r\n"


def test_the_line_is_apache_s_with_host_id_and_seconds_behind_it() -> None:
    assert line(HEAD) == (
        '192.0.2.7 - - [26/Nov/2026:12:00:00 +0000] "GET /a/b HTTP/1.1" 200 1024 "http://x/y" "curl/8" '
        "app.example.com 5f0c1d2e3a4b 0.013\n"
    )


def test_the_user_is_the_token_s_label() -> None:
    tunnel = Tunnel("0" * 32, Kind.HTTP, "app")
    assert " - - [" in line(HEAD, tunnel)
    tunnel.account = Account(label="alice smith")
    assert " - alice\\x20smith [" in line(HEAD, tunnel)


def test_who_left_before_an_answer_has_nginx_s_status() -> None:
    assert '" 499 0 "' in line(HEAD, status=0, response_bytes=0)


def test_what_was_not_understood_is_a_line_all_the_same() -> None:
    assert line(b"", status=400) == (
        '192.0.2.7 - - [26/Nov/2026:12:00:00 +0000] "-" 400 1024 "-" "-" - 5f0c1d2e3a4b 0.013\n'
    )


@given(st.binary(max_size=200))
@example(b'"\\\b\n\r\t\v\x00\x1b\x7f\xff\xc3\xa9')
def test_an_escaped_value_is_printable_and_can_be_read_back(value: bytes) -> None:
    text = quoted(value)
    assert text.isascii()
    assert text.isprintable()
    assert '"' not in ESCAPE.sub("", text)
    assert unescaped(text) == value
    assert " " not in word(value)


def test_the_escapes_are_apache_s() -> None:
    assert quoted('a"b\\c\n\té\x01'.encode()) == '\\"'.join(["a", "b\\\\c\\n\\t\\xc3\\xa9\\x01"])


@given(st.binary(max_size=60), st.binary(max_size=60), st.binary(max_size=20))
def test_whatever_is_sent_the_line_stays_one_and_has_its_fields(
    agent: bytes, referer: bytes, label: bytes
) -> None:
    tunnel = Tunnel("0" * 32, Kind.HTTP, "app", account=Account(label=label.decode("latin-1")))
    request = parse_request_head(HEAD, HeadLimits(16384, 100))
    request.fields = [(b"USER-agent", agent), (b"referer", referer)]
    text = line(b"", tunnel, request=request)
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    match = COMBINED.match(text)
    assert match is not None
    assert unescaped(match["agent"]) == (agent or b"-")
    assert match["status"] == "200"
    assert len(text[match.end() :].split()) == 3


def test_a_value_is_cut_where_nobody_reads_on() -> None:
    assert len(quoted(b"x" * 5000)) == combined.LONGEST


@pytest.mark.parametrize(
    ("url", "left"),
    [
        (b"/a?b", b"/a"),
        (b"/?", b"/"),
        (b"*", b"*"),
        (b"/a@b?c", b"/a@b"),
        (b"https://x/y#z?w", b"https://x/y"),
        (b"https://user:word@x/y", b"https://x/y"),
        (b"https://user:wo@rd@x?y", b"https://x"),
        (b"//user@x/y", b"//x/y"),
        (b"https://x/@y", b"https://x/@y"),
        (b"", b""),
    ],
)
def test_queries_and_passwords_are_left_out(url: bytes, left: bytes) -> None:
    assert without_query(url) == left


def test_the_time_is_local_with_its_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "IST-5:30")
        time.tzset()
        assert timestamp(1_700_000_000) == "15/Nov/2023:03:43:20 +0530"
        patch.setenv("TZ", "XXX3:30")
        time.tzset()
        assert timestamp(1_700_000_000) == "14/Nov/2023:18:43:20 -0330"
    time.tzset()
