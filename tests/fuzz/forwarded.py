"""Forwarding fields of a proxy that is trusted: each line of the input is one field."""

from __future__ import annotations

from ipaddress import ip_address

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import fields, forwarded, http1
from tinytun_gevent.wire.http1 import Forwarding

from .splitting import outcome

CODE = (forwarded, fields)
SEEDS = (
    b"X-Forwarded-For: 203.0.113.9, 10.0.0.1\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Port: 8443",
    b"X-Forwarded-For: [2001:db8::1]:80\r\nX-Forwarded-Host: app.example.com:8443",
    b'Forwarded: for="[2001:db8::1]:4711";proto=https;host=a.example, for=10.0.0.1',
    b"Forwarded: for=unknown, for=_hidden;by=1.2.3.4",
    b"X-Real-IP: 1.2.3.4\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: ::ffff:10.0.0.1",
)
TOKENS = (
    *(
        b"X-Forwarded-For: ",
        b"X-Forwarded-Proto: ",
        b"X-Forwarded-Host: ",
        b"X-Forwarded-Port: ",
        b"Forwarded: ",
    ),
    *(
        b"\r\n",
        b",",
        b";",
        b"=",
        b'"',
        b"[",
        b"]",
        b":",
        b"for=",
        b"host=",
        b"proto=",
        b"https",
        b"10.0.0.1",
        b"::1",
    ),
    *(b"203.0.113.9", b"unknown", b"_x", b"%eth0", b"\xb2", b"\xe9", b" ", b"\t", b"443", b"app.localhost"),
)
DIRECT = Forwarding("10.0.0.2", 5555)


def _trusted(address: str) -> bool:
    return address.startswith("10.")


def one(data: bytes) -> None:
    request = b"GET / HTTP/1.1\r\nHost: a.localhost\r\n%b\r\n\r\n" % data
    if len(request) > http1.REQUEST.bytes or http1.head_end(request) != len(request):
        return
    head, _ = outcome(lambda: http1.parse_request_head(request), MessageError)
    if head is None:
        return
    assert http1.client_from_forwarding(head, Forwarding("192.0.2.1", 80), _trusted) == Forwarding(
        "192.0.2.1", 80
    )
    said = http1.client_from_forwarding(head, DIRECT, _trusted)
    address = ip_address(said.client)
    assert str(address) == said.client
    assert getattr(address, "ipv4_mapped", None) is None
    assert 0 < said.port < 65536
    assert said.proto in ("http", "https")
    built = http1.build_request_head(head, said)
    again = http1.parse_request_head(built)
    assert (again.method, again.target, again.host, again.length) == (b"GET", b"/", head.host, head.length)
    assert [name for name, _ in again.claims] == [
        b"X-Forwarded-For", b"X-Forwarded-Proto", b"X-Forwarded-Host", b"X-Forwarded-Port",
    ]  # fmt: skip
