"""Who may use a stream next: the table of conditions."""

from __future__ import annotations

import pytest

from tinytun_gevent.server.reuse import NextUser, next_user
from tinytun_gevent.wire.request import RequestHead, parse_request_head
from tinytun_gevent.wire.response import ResponseHead, parse_response_head

ANYBODY, SAME_VISITOR, SAME_LOGIN, NOBODY = NextUser


def asked(*fields: bytes, method: bytes = b"GET", minor: int = 1) -> RequestHead:
    lines = [b"%b / HTTP/1.%d" % (method, minor), b"Host: demo.localhost", *fields, b"", b""]
    return parse_request_head(b"\r\n".join(lines))


def answered(
    *fields: bytes, status: int = 200, minor: int = 1, method: bytes = b"GET", upgrade: bool = False
) -> ResponseHead:
    lines = [b"HTTP/1.%d %d X" % (minor, status), *fields, b"", b""]
    return parse_response_head(b"\r\n".join(lines), method, upgrade)


LENGTH = b"Content-Length: 2"
EMPTY = b"Content-Length: 0"
CHUNKED = b"Transfer-Encoding: chunked"
UPGRADE = (b"Connection: Upgrade", b"Upgrade: websocket")


@pytest.mark.parametrize(
    ("request_head", "response_head", "expected"),
    [
        # Anybody: a head, and an answer that is framed.
        (asked(), answered(LENGTH), ANYBODY),
        (asked(), answered(EMPTY), ANYBODY),
        (asked(), answered(CHUNKED), ANYBODY),
        (asked(), answered(LENGTH, status=404), ANYBODY),
        (asked(), answered(EMPTY, status=302), ANYBODY),
        (asked(), answered(LENGTH, status=503), ANYBODY),
        (asked(EMPTY, method=b"POST"), answered(LENGTH), ANYBODY),
        (asked(method=b"DELETE"), answered(LENGTH), ANYBODY),
        (asked(b"Authorization: Basic eA=="), answered(LENGTH), ANYBODY),
        (asked(), answered(LENGTH, b"WWW-Authenticate: Basic", status=401), ANYBODY),
        (asked(), answered(LENGTH, b"Connection: keep-alive", minor=0), ANYBODY),
        # A visitor's own Connection is the edge's; HTTP/2 is never offered to the service.
        (asked(b"Connection: close"), answered(LENGTH), ANYBODY),
        (asked(minor=0), answered(LENGTH), ANYBODY),
        (asked(b"Connection: Upgrade", b"Upgrade: h2c"), answered(LENGTH), ANYBODY),
        # The same visitor: something may be left over.
        (asked(LENGTH), answered(LENGTH), SAME_VISITOR),
        (asked(CHUNKED, method=b"POST"), answered(LENGTH), SAME_VISITOR),
        (asked(method=b"HEAD"), answered(LENGTH, method=b"HEAD"), SAME_VISITOR),
        (asked(), answered(status=204), SAME_VISITOR),
        (asked(), answered(status=304), SAME_VISITOR),
        (asked(), answered(LENGTH, status=304), SAME_VISITOR),
        (asked(*UPGRADE), answered(LENGTH, status=403), SAME_VISITOR),
        (asked(*UPGRADE), answered(LENGTH), SAME_VISITOR),
        # The same login.
        (asked(b"Authorization: NTLM eA=="), answered(LENGTH), SAME_LOGIN),
        (asked(LENGTH, b"Authorization: Negotiate eA=="), answered(LENGTH), SAME_LOGIN),
        (asked(), answered(LENGTH, b"WWW-Authenticate: Negotiate", status=401), SAME_LOGIN),
        (asked(b"Authorization: NTLM eA=="), answered(status=304), SAME_LOGIN),
        # Nobody: the service ends it.
        (asked(), answered(LENGTH, b"Connection: close"), NOBODY),
        (asked(), answered(LENGTH, minor=0), NOBODY),
        (asked(), answered(), NOBODY),
        (asked(b"Authorization: NTLM eA=="), answered(LENGTH, b"Connection: close"), NOBODY),
        (asked(*UPGRADE), answered(*UPGRADE, status=101, upgrade=True), NOBODY),
    ],
)  # fmt: skip
def test_who_is_next(request_head: RequestHead, response_head: ResponseHead, expected: NextUser) -> None:
    assert next_user(request_head, response_head) is expected
