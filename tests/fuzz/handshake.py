"""The CONNECT head and its answer, both directions. The first byte chooses which."""

from __future__ import annotations

from tinytun_gevent.errors import HandshakeError
from tinytun_gevent.wire import handshake, options, origin
from tinytun_gevent.wire.handshake import Kind, OpenReply, OpenRequest
from tinytun_gevent.wire.options import Options, Rewrite

from .splitting import outcome

CODE = (handshake, options, origin)
_ID = "0123456789abcdef" * 2
_REQUESTS = (
    OpenRequest(Kind.HTTP, "server.test:5554", subdomain="app", token="a.b-c==", host_header="app.test"),
    OpenRequest(Kind.TCP, "[::1]:5554", port=30000, resume="x" * 64),
    OpenRequest(Kind.HTTP, "server.test", join=handshake.Join(_ID, "k" * 32)),
    OpenRequest(Kind.TCP_PORT, "1.2.3.4:1", resume=""),
    OpenRequest(Kind.HTTP, "a", options=Options(rewrite=Rewrite("http://[::1]:1"), forwarded_host=False)),
)
_REPLIES = (
    OpenReply(_ID, domain="app.test", subdomain="app", url="http://app.test", host_header=True),
    OpenReply(_ID, port=20000, join_key="k" * 32, resume="r" * 64),
    OpenReply(_ID, domain="app.test", options=("rewrite", "forwarded_host"), kind=Kind.HTTP),
)
SEEDS = (
    *(b"\0" + handshake.build_request(request) for request in _REQUESTS),
    *(b"\1" + handshake.build_reply(reply) for reply in _REPLIES),
    b"\0GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"\1" + handshake.build_refusal(409, "Subdomain not available"),
    b"\1" + handshake.build_refusal(503, "later", 7),
    b"\1" + handshake.build_health(),
    b"\1HTTP/1.0 500\r\nRetry-After: x\r\nContent-Length: 12\r\n\r\n",
)
TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b": ",
        b" ",
        b"\t",
        b"\0",
        b"\x1b[0m",
        b"\xe9",
        b"\xb2",
        b"\x85",
        b"HTTP/1.1",
        b"HTTP/1.0",
    ),
    *(
        b"x-tinytun-type: tcp\r\n",
        b"x-tinytun-subdomain: a\r\n",
        b"x-tinytun-port: 1\r\n",
        b"x-tinytun-join: ",
    ),
    *(
        b"x-tinytun-resume: \r\n",
        b"x-tinytun-host-header: [::1]:1\r\n",
        b"x-tinytun-options: e30\r\n",
        b"Authorization: Bearer x\r\n",
        b"Host: a\r\n",
    ),
    *(
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Retry-After: 99999999999\r\n",
        b"CONNECT ",
    ),
    *(
        b"x-tinytun-connection-id: ",
        b"x-tinytun-url: https://x\r\n",
        b"x-tinytun-domain: a\r\n",
        b"101",
        b"599",
        b"99",
    ),
)


def one(data: bytes) -> None:
    choice, data = (data[0] & 1, data[1:]) if data else (0, b"")
    end = handshake.head_end(data)
    for start in range(0, len(data), 7):
        assert (
            end < 0 or start >= end or handshake.head_end(data, start if start < end - 3 else end - 4) == end
        )
    _check_text(data)
    if end < 0:
        return
    if choice:
        _reply(data[:end])
    else:
        _request(data[:end])


def _check_text(data: bytes) -> None:
    text = handshake.clean_text(data, 200)
    assert text == "" or text.isprintable()
    assert len(text) <= 200


def _request(head: bytes) -> None:
    got, error = outcome(lambda: handshake.parse_request(head), HandshakeError)
    if got is None:
        assert error.split()[1] in ("400", "431", "505"), error
        assert error.isprintable(), error
        return
    if isinstance(got, OpenRequest):
        assert got.port is None or 0 < got.port < 65536
        assert not got.token or got.token not in repr(got) or len(got.token) < 40
        again = handshake.parse_request(handshake.build_request(got))
        assert again == got


def _reply(head: bytes) -> None:
    got, error = outcome(lambda: handshake.parse_reply(head), HandshakeError)
    if got is None:
        assert error.split()[1] == "502", error
        assert error.isprintable(), error
        return
    if isinstance(got, OpenReply):
        for text in (got.connection_id, got.domain, got.subdomain, got.url, got.join_key, got.resume):
            assert text is None or (text.isascii() and text.isprintable() and text)
        assert got.port is None or 0 < got.port < 65536
        assert handshake.parse_reply(handshake.build_reply(got)) == got
    else:
        assert 200 <= got.status < 600
        assert got.reason == "" or got.reason.isprintable()
        assert got.retry_after is None or 0 <= got.retry_after <= handshake.MAX_RETRY_AFTER
        assert got.content_length is None or got.content_length >= 0
