"""What the status block reads of passing bytes; ``\\xff`` parts chunks, to service and visitor in turn."""

from __future__ import annotations

from tinytun_gevent.client import observe, text
from tinytun_gevent.client.observe import Exchange, Observer

CODE = (observe, text)
SEEDS = (
    b"GET /a?secret=1 HTTP/1.1\r\nHost: x\r\n\r\n\xffHTTP/1.1 200 OK\r\n\r\n",
    b"POST /a HTTP/1.0\r\n\xffHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\n\r\nHTTP/1.1 404 \r\n",
    b"GET / HTTP/1.1\r\n\xffHTTP/1.1 100 Continue\n\nHTTP/1.1 103 X\r\n\nHTTP/1.1 999\n",
    b"GET /chat HTTP/1.1\r\n\xffHTTP/1.1 101 Switching\r\n\r\n\xffGET / HTTP/1.1\r\n\xffnothing",
    b"DELETE " + b"/x" * 700 + b" HTTP/1.1\r\n\xffHTTP/1.0 500\r",
)
TOKENS = (
    b"\xff",
    b"GET ",
    b"HTTP/1.1 ",
    b"100 ",
    b"\r\n",
    b"\r\n\r\n",
    b"/",
    b"?",
    b" ",
    b"\x1b]0;x\x07",
    b"\xc2\x9b",
    b"\xe2\x80\xae",
)


def one(data: bytes) -> None:
    seen: list[Exchange] = []
    observer = Observer(seen.append, clock=lambda: 0.0)
    for number, chunk in enumerate(data.split(b"\xff")):
        if number % 2:
            assert observer.to_visitor(memoryview(chunk)) == len(chunk)
        else:
            observer.to_service(memoryview(chunk))
    assert len(seen) <= data.count(b"\xff") + 1
    for exchange in seen:
        assert exchange.method.isprintable()
        assert exchange.path.isprintable()
        assert len(exchange.path) <= 1100
        assert 100 <= exchange.status < 1000
