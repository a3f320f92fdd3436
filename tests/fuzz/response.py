"""The local service's response heads: parsed, and written anew for the visitor.

The first byte chooses the request's method, whether it asked for an upgrade, and the visitor's version.
"""

from __future__ import annotations

import framing_corpus

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields, http1, response
from tinytun_gevent.wire.http1 import ResponseHead

from . import reference, request
from .splitting import outcome

CODE = (response, fields)
_METHODS = (b"GET", b"HEAD", b"POST", b"OPTIONS")
SEEDS = (
    b"\x04HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    *(
        bytes((_METHODS.index(method) if method in _METHODS else 0,)) + data
        for _, method, data, *_ in (*framing_corpus.VALID_RESPONSES, *framing_corpus.INVALID_RESPONSES)
        if len(data) < 1024
    ),
)
TOKENS = (
    *request.TOKENS,
    *(
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.0 ",
        b" 101 ",
        b" 204 ",
        b" 304 ",
        b" 426 ",
        b"WWW-Authenticate: Negotiate\r\n",
    ),
    *(
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Upgrade: websocket\r\n",
        b"100 ",
        b"\x04",
        b"\n\n",
        b"\r\n\n",
        b"\n\r\n",
        b" 600 ",
        b" 999\n",
    ),
)


def one(data: bytes) -> None:
    choice, data = (data[0], data[1:]) if data else (0, b"")
    method, asked, minor = _METHODS[choice & 3], bool(choice & 4), 0 if choice & 8 else 1
    end = http1.response_head_end(data)
    _check_end(data, end)
    if end < 0:
        return
    head, error = outcome(lambda: http1.parse_response_head(data[:end], method, asked), MessageError)
    if head is None:
        assert error.split()[1] == "502", error
        return
    _check_input(data[:end], method, asked, head)
    for close in (False, True):
        built = http1.build_response_head(head, close=close, minor_visitor=minor)
        _check_output(head, method, close, minor, built)


def _lines(data: bytes) -> list[bytes]:
    """The lines of a head, which end in CRLF or a bare LF."""
    return [line.removesuffix(b"\r") for line in data.split(b"\n")]


def _check_end(data: bytes, end: int) -> None:
    """The head ends behind its first empty line, a leading one aside, even if the bytes come one by one."""
    lines = _lines(data)
    empty = next((at for at, line in enumerate(lines[1:-1], 1) if not line), -1)
    assert end == (-1 if empty < 0 else sum(len(line) + 1 for line in data.split(b"\n")[: empty + 1]))
    found = [http1.response_head_end(data[:size], max(0, size - 1)) for size in range(len(data) + 1)]
    assert next((at for at in found if at >= 0), -1) == end


def _check_input(data: bytes, method: bytes, asked: bool, head: ResponseHead) -> None:
    line, fields = reference.head(b"\r\n".join(_lines(data)), reference.STATUS_LINE)
    assert (head.minor, head.status) == (int(line[1]), int(line[2]))
    assert bool(head.upgrade) == (head.status == 101)
    assert head.status != 101 or asked
    if head.status < 200 or head.status in (204, 304) or method == b"HEAD":
        assert head.length == 0
    else:
        declared = reference.framing(fields)
        assert head.length == (http1.UNTIL_CLOSE if declared is None else declared)
    assert not (head.keep_alive and head.length == http1.UNTIL_CLOSE)
    assert not (head.keep_alive and head.minor == 0 and reference.framing(fields) == http1.CHUNKED)


def _check_output(head: ResponseHead, method: bytes, close: bool, minor: int, built: bytes) -> None:
    line, fields = reference.head(built, reference.STATUS_LINE)
    assert line[0].startswith(b"HTTP/1.1 ")
    assert int(line[2]) == head.status
    declared = reference.framing(fields)
    if head.status < 200 or head.status == 204:
        assert declared is None
    elif head.status != 304 and method != b"HEAD":
        unframed = head.length == http1.UNTIL_CLOSE or (head.length == http1.CHUNKED and not minor)
        assert declared == (None if unframed else head.length)
    names = [name for name, _ in fields]
    assert not {b"te", b"keep-alive", b"proxy-connection", b"http2-settings"} & set(names)
    assert names.count(b"connection") <= (2 if head.status == 426 else 1)
    if head.status >= 200 and head.status != 426 and (close or head.length == http1.UNTIL_CLOSE):
        assert reference.values(fields, b"connection") == [b"close"]
    length = head.length
    if minor == 0:
        assert not {b"transfer-encoding", b"trailer"} & set(names)
        if head.status >= 200 and head.status != 426:
            assert reference.values(fields, b"connection") == [b"close"]
        if length == http1.CHUNKED:
            length = http1.UNTIL_CLOSE
    again = http1.parse_response_head(built, method, True, http1.HeadLimits(1 << 20, 1000))
    assert (again.status, again.length, again.upgrade) == (head.status, length, head.upgrade)
