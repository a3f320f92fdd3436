"""Visitors' request heads: parsed, and written anew for the local service."""

from __future__ import annotations

import framing_corpus

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields, forwarded, http1, request
from tinytun_gevent.wire.http1 import Forwarding, RequestHead

from . import reference
from .splitting import outcome

CODE = (request, fields, forwarded)
SEEDS = tuple(
    data
    for _, data, *_ in (*framing_corpus.VALID_REQUESTS, *framing_corpus.INVALID_REQUESTS)
    if len(data) < 1024
)
TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b":",
        b"\0",
        b",",
        b";",
        b"0\r\n\r\n",
        b"\r\n\r\n",
        b"_",
        b"-",
        b"\x0b",
    ),
    *(
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Host: demo.localhost\r\n",
        b"Host: x\r\n",
    ),
    *(
        b"Connection: close\r\n",
        b"Connection: upgrade, x\r\nUpgrade: websocket, h2c\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(b"X-Forwarded-For: 1.2.3.4\r\n", b"Content_Length: 1\r\n", b"TE: trailers\r\n", b"Keep-Alive: 5\r\n"),
    *(
        b"Authorization: NTLM x\r\n",
        b"Accept: text/html\r\n",
        b"Connection: host\r\n",
        b"http://a.localhost:80/x",
    ),
    *(
        b"OPTIONS",
        b"*",
        b"CONNECT",
        b"PRI",
        b"HTTP/1.0",
        b"HTTP/1.1",
        b"HTTP/2.0",
        b"chunked",
        b"gzip",
        b"[::1]",
    ),
    *(
        b"%",
        b"#",
        b"@",
        b"GET / HTTP/1.1\r\n",
        b"HEAD",
        b"\xe9",
        b"\x7f",
        b"\x85",
        b"\xa0",
        b"\xc3\xa9",
        b"\xe2\x82\xac",
    ),
)
STATUSES = {400, 414, 417, 421, 431, 501, 505}
TOLD = {b"for", b"proto", b"host", b"port"}
"""What follows `X-Forwarded-` in a request that is passed on."""

FORWARDING = Forwarding("192.0.2.7", 5555)


def one(data: bytes) -> None:
    end = http1.head_end(data)
    _check_pieces(data, end)
    if end < 0:
        return
    head, error = outcome(lambda: http1.parse_request_head(data[:end]), MessageError)
    if head is None:
        assert int(error.split()[1]) in STATUSES, error
        return
    _check_input(data[:end], head)
    for override in (None, b"app.test"):
        _check_output(head, override)


def _check_pieces(data: bytes, end: int) -> None:
    """Bytes that come one by one have their head end at the same place (or sooner, at a bare LF)."""
    for size in range(len(data) + 1):
        found = http1.head_end(data[:size], 0, max(0, size - 1))
        if found >= 0:
            assert end >= 0
            assert (
                found == end or outcome(lambda: http1.parse_request_head(data[:end]), MessageError)[0] is None
            )
            return
    assert end < 0


def _check_input(data: bytes, head: RequestHead) -> None:
    """What is accepted is well-formed, and means what the reference says."""
    line, fields = reference.head(_without_blank_lines(data), reference.RAW_REQUEST_LINE)
    target = reference.encoded(line[2])
    assert (head.method, head.minor) == (line[1], int(line[3]))
    assert (reference.framing(fields) or 0) == head.length
    hosts = reference.values(fields, b"host")
    assert len(hosts) == 1 or (not hosts and head.minor == 0 and not line[2].startswith((b"/", b"*")))
    assert all(reference.HOST.fullmatch(host) for host in hosts)
    if line[2].startswith((b"/", b"*")):
        assert (head.target, head.host_field) == (target, hosts[0])
    else:
        assert head.host_field in line[2]
    assert head.host == head.host.lower()
    assert head.host


def _without_blank_lines(data: bytes) -> bytes:
    while data.startswith(b"\r\n"):
        data = data[2:]
    return data


def _check_output(head: RequestHead, override: bytes | None) -> None:
    """What is written is well-formed, means the same, and is read by ourselves as the same."""
    built = http1.build_request_head(head, FORWARDING, override)
    line, fields = reference.head(built, reference.REQUEST_LINE)
    assert (line[1], line[2]) == (head.method, head.target)
    assert reference.values(fields, b"host") == [override or head.host_field]
    assert (reference.framing(fields) or 0) == head.length
    assert reference.values(fields, b"x-forwarded-for") == [b"192.0.2.7"]
    own = {b"te", b"keep-alive", b"proxy-connection", b"http2-settings", b"forwarded", b"x-real-ip"}
    told = {name.replace(b"_", b"-") for name, _ in fields}
    assert not own & told
    assert {name[12:] for name in told if name.startswith(b"x-forwarded-")} == TOLD
    again = http1.parse_request_head(built, http1.HeadLimits(1 << 20, 1000))
    assert (again.method, again.target, again.length) == (head.method, head.target, head.length)
    assert (again.minor, again.upgrade, again.fields) == (1, head.upgrade, head.fields)
