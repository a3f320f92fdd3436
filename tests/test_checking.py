"""Asking a server about a token before it is kept: what each answer means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from gevent import socket
from gevent.server import StreamServer
from helpers import deadline

from tinytun_gevent.client.checking import check_with_server
from tinytun_gevent.client.config import ClientConfig, make_config
from tinytun_gevent.errors import RefusedError, TryLaterError, UnreachableError

TOKEN = "tt_secret"

@contextmanager
def answering(answer: bytes) -> Iterator[tuple[ClientConfig, list[bytes]]]:
    """A server that says ``answer`` to whatever comes, and what came."""
    came: list[bytes] = []

    def serve(sock: socket.socket, _: object) -> None:
        came.append(sock.recv(4096))
        sock.sendall(answer)

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        yield make_config("80", server=url, token=TOKEN, environ={}), came
    finally:
        server.stop()


def reply(status: str, body: bytes = b"", kind: str = "text/plain") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_a_good_token_is_shown_to_the_server_and_nothing_is_said() -> None:
    with deadline(), answering(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n") as (config, came):
        assert check_with_server(config) == ""
    assert came[0].startswith(b"GET / HTTP/1.1\r\n")
    assert f"Bearer {TOKEN}".encode() in came[0]


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (reply("401 Unauthorized", b"It is not valid here\n"), RefusedError, "does not take this token"),
        (reply("200 OK", b"It takes no tokens\n"), RefusedError, "takes no tokens, so none is needed"),
        (reply("200 OK", b"<!doctype html><p>shop</p>", "text/html"), RefusedError, "no tunnel server's"),
        (reply("403 Forbidden", b"Not from there\n"), RefusedError, "says: Not from there (403)"),
        (reply("429 Too Many Requests", b"Later\n"), TryLaterError, "Later (429)"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", UnreachableError, ""),
        (b"", UnreachableError, ""),
    ],
)
def test_what_means_that_nothing_is_kept(answer: bytes, error: type[Exception], says: str) -> None:
    with deadline(), answering(answer) as (config, _), pytest.raises(error) as caught:
        check_with_server(config)
    assert says in str(caught.value)
    assert str(caught.value).count("nothing was kept") == 1
    assert "\n" not in str(caught.value)


def test_a_token_that_the_answer_repeats_is_not_shown() -> None:
    body = f"no such token: {TOKEN}\n".encode()
    refused = pytest.raises(RefusedError)
    with deadline(), answering(reply("401 Unauthorized", body)) as (config, _), refused as caught:
        check_with_server(config)
    assert TOKEN not in str(caught.value)


def test_a_server_that_knows_no_such_question_is_told_of() -> None:
    with deadline(), answering(reply("405 Method Not Allowed", b"CONNECT only\n")) as (config, _):
        assert "does not say whether the token is valid (it answered 405)" in check_with_server(config)
