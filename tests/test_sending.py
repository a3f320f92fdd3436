"""The request side of an exchange: what a body's source gives to whoever sends it."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tinytun_gevent.errors import MessageError
from tinytun_gevent.server.sending import BodySource
from tinytun_gevent.wire import body as body_module
from tinytun_gevent.wire.body import ChunkedBody, LengthBody

NEXT = b"GET / HTTP/1.1\r\n"


class FakeEnd:
    """A visitor's connection: each piece is what one read finds; then nothing, or the end."""

    def __init__(self, *pieces: bytes, ends: bool = False) -> None:
        self.pieces = list(pieces)
        self.ends = ends
        self.waits = 0

    @property
    def unread(self) -> int:
        return sum(map(len, self.pieces))

    def wait_readable(self) -> None:
        self.waits += 1

    def recv_now(self, view: memoryview) -> int:
        if not self.pieces:
            return 0 if self.ends else -1
        piece = self.pieces.pop(0)
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        if count < len(piece):
            self.pieces.insert(0, piece[count:])
        return count


def source(
    body: LengthBody | ChunkedBody, *pieces: bytes, early: bytes = b"", ends: bool = False
) -> tuple[BodySource, bytearray, FakeEnd]:
    end, buffer = FakeEnd(*pieces, ends=ends), bytearray(early)
    return BodySource(body, cast(Any, end), buffer), buffer, end


def read_all(body: BodySource, size: int = 1000) -> bytes:
    """What it gives until it is done or has nothing more, in reads of ``size`` bytes at most."""
    view, read = memoryview(bytearray(size)), b""
    while not body.done:
        body.wait_readable()
        got = body.recv_now(view)
        if got == 0 or (got < 0 and not body.unread):
            break
        read += view[: max(got, 0)]
    return read


def test_a_body_of_known_length_leaves_what_follows_where_it_is() -> None:
    body, buffer, end = source(LengthBody(5), b"hel", b"lo" + NEXT)
    assert body.unread == 5
    assert read_all(body) == b"hello"
    assert body.done
    assert not buffer
    assert end.pieces == [NEXT]


def test_what_follows_chunks_is_kept_for_the_next_request() -> None:
    body, buffer, _ = source(ChunkedBody(), b"5\r\nhello\r\n", b"0\r\n\r\n" + NEXT)
    assert read_all(body) == b"5\r\nhello\r\n0\r\n\r\n"
    assert buffer == NEXT


def test_what_was_read_already_comes_first() -> None:
    body, buffer, _ = source(ChunkedBody(), b"lo\r\n0\r\n\r\n", early=b"5\r\nhel")
    assert body.take_buffered() == b"5\r\nhel"
    assert read_all(body) == b"lo\r\n0\r\n\r\n"
    whole, buffer, _ = source(LengthBody(5), early=b"hello" + NEXT)
    assert whole.take_buffered() == b"hello"
    assert whole.done
    assert buffer == NEXT


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_what_is_rewritten_leaves_however_little_room_there_is(size: int) -> None:
    data = b"5\r\nhello\r\n0\r\nX: y\r\nZ: a\r\n\r\n"
    pieces = [data[at : at + 7] for at in range(0, len(data), 7)]
    body, _, _ = source(ChunkedBody(), *pieces)
    assert read_all(body, size) == b"5\r\nhello\r\n0\r\n\r\n"
    assert body.done


def test_many_chunks_in_one_read_leave_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "LINES_AT_ONCE", 10)
    data = b"1\r\nx\r\n" * 95 + b"0\r\n\r\n"
    body, buffer, end = source(ChunkedBody(), data)
    view, reads = memoryview(bytearray(10_000)), []
    while not body.done:
        body.wait_readable()
        reads.append(body.recv_now(view))
    assert sum(reads) == len(data)
    assert len(reads) == 10
    assert end.waits == 1, "all but the first came from what was read at once"
    assert not buffer


def test_the_end_of_the_visitor_is_no_end_of_the_body() -> None:
    body, _, _ = source(ChunkedBody(), b"5\r\nhel", ends=True)
    assert read_all(body) == b"5\r\nhel"
    assert not body.done
    assert body.recv_now(memoryview(bytearray(10))) == 0
    assert body.recv(10) == b""


def test_a_broken_body_raises_and_gives_nothing_of_that_read() -> None:
    body, _, _ = source(ChunkedBody(), b"5\r\nhello!")
    with pytest.raises(MessageError):
        body.recv_now(memoryview(bytearray(100)))


def test_a_blocking_read_gives_what_there_is() -> None:
    body, _, _ = source(ChunkedBody(), b"5\r\nhel", b"lo\r\n0\r\nX: y\r\n", b"\r\n")
    assert body.recv(100) == b"5\r\nhel"
    assert body.recv(100) == b"lo\r\n0\r\n"
    assert body.recv(100) == b"\r\n"
    assert body.done
