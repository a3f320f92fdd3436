"""Bodies: where each ends, however its bytes arrive. Chunked ones are in ``test_chunked.py``."""

from __future__ import annotations

import pytest
from framing_corpus import CHUNKED, UNTIL_CLOSE

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire.body import ChunkedBody, LengthBody, UntilCloseBody, body_of, taken_of


def test_length_body() -> None:
    body = LengthBody(5)
    assert body.feed(b"hel") == 3
    assert (body.left, body.done) == (2, False)
    with pytest.raises(MessageError) as caught:
        body.eof()
    assert caught.value.status == 400
    assert body.feed(memoryview(b"loGET")) == 2
    assert body.done
    body.eof()
    assert body.feed(b"x") == 0


def test_empty_body_is_done_from_the_start() -> None:
    body = LengthBody(0)
    assert body.done
    assert body.feed(b"x") == 0
    body.eof()


def test_truncated_response_is_the_services_fault() -> None:
    with pytest.raises(MessageError) as caught:
        LengthBody(5, response=True).eof()
    assert caught.value.status == 502


def test_body_until_close() -> None:
    body = UntilCloseBody()
    assert body.feed(b"hello") == 5
    assert not body.done
    body.eof()
    assert body.done
    assert body.feed(b"x") == 0


@pytest.mark.parametrize(
    ("length", "kind"),
    [(0, LengthBody), (7, LengthBody), (CHUNKED, ChunkedBody), (UNTIL_CLOSE, UntilCloseBody)],
)
def test_body_of(length: int, kind: type[object]) -> None:
    for response in (False, True):
        body = body_of(length, response=response)
        assert type(body) is kind
        if length != UNTIL_CLOSE and length:
            with pytest.raises(MessageError) as caught:
                body.eof()
            assert caught.value.status == (502 if response else 400)


def test_what_is_passed_on_for_the_bytes_taken() -> None:
    assert taken_of(LengthBody(2), memoryview(b"abc"), 2) == b"ab"
    body = body_of(CHUNKED)
    data = memoryview(b"5\r\nhello\r\n0\r\nX: y\r\n\r\nGET")
    assert taken_of(body, data, body.feed(data)) == b"5\r\nhello\r\n0\r\n\r\n"


def test_trailers_to_withhold_are_a_response_s() -> None:
    data = b"0\r\nX: a\r\nY: b\r\n\r\n"
    body = body_of(CHUNKED, response=True, withheld=frozenset({b"x"}))
    assert taken_of(body, data, body.feed(data)) == b"0\r\nY: b\r\n\r\n"
