"""A peer's answer to "do you have this tunnel?"."""

from __future__ import annotations

from tinytun_gevent.server import peers

CODE = (peers,)
SEEDS = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"id": "0", "name": {"Subdomain": "app"}}',
    b'HTTP/1.0 200 OK\r\n\r\n{"name": {"PortNumber": 20000}, "read_bytes": 1}',
    b"HTTP/1.1 404 Not Found\r\n\r\n",
    b"HTTP/1.1 500 Oops\r\n\r\n{}",
    b"HTTP/1.1 200\r\n\r\n[[[[]]]]",
)
TOKENS = (
    *(b"HTTP/1.1 ", b"200", b"404", b"\r\n", b"\r\n\r\n", b"{", b"}", b"[", b"]", b'"', b":", b"null"),
    *(b"NaN", b"1e999"),
    *(b'"name"', b'{"Subdomain": "app"}', b'{"PortNumber": 20000}', b"true", b"\\ud800", b"\xff"),
    *(b"[" * 200, b"1" * 400),
)  # fmt: skip


def one(data: bytes) -> None:
    for name in ("app", 20000):
        try:
            yes = peers._says_yes(data, name)
        except (ValueError, RecursionError):  # what the one who asks is prepared for
            continue
        assert isinstance(yes, bool)
        if yes:
            assert b" 200" in data.split(b"\r\n", 1)[0]
            assert b"name" in data or b"\\u" in data
