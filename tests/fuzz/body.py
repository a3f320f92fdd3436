"""Bodies: where they end, and what of them passes.

The first byte chooses the kind, the rest are its bytes and what follows: 0 a request's chunks, 1 an
answer's, 4 an answer's without the framing, 2 a length, 3 all up to the end.
"""

from __future__ import annotations

import framing_corpus

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import body, chunked
from tinytun_gevent.wire.fields import CHUNKED
from tinytun_gevent.wire.response import UNTIL_CLOSE

from . import reference
from .splitting import outcome, pieces

CODE = (body, chunked)
_STRICT, _LENIENT, _PLAIN = b"\0", b"\1", b"\4"
SEEDS = (
    *(kind + data.partition(b"\r\n\r\n")[2]
      for kind, cases in (
          (_STRICT, (*framing_corpus.VALID_REQUESTS, *framing_corpus.INVALID_REQUESTS)),
          (_LENIENT, [(case[0], case[2]) for case in
                      (*framing_corpus.VALID_RESPONSES, *framing_corpus.INVALID_RESPONSES)]),
          (_PLAIN, [(case[0], case[2]) for case in framing_corpus.VALID_RESPONSES]),
      )
      for _, data, *_ in cases
      if b"chunked" in data.lower() and len(data) < 1024),
    b"\2" + b"x" * 70,
    b"\3" + b"x" * 9,
)  # fmt: skip
TOKENS = (
    *(
        b"\r\n",
        b"0\r\n\r\n",
        b"5\r\nhello\r\n",
        b"1\r\nx\r\n",
        b";a",
        b';a="b"',
        b'"',
        b"\\",
        b'="\\\n"',
        b'="\\\r"',
        b" ",
        b"\t",
        b"\0",
        b"\n",
    ),
    *(
        b"Host: x\r\n",
        b"Trailer: x\r\n",
        b"X: y\r\n",
        b"Content_Length: 3\r\n",
        b"0" * 15,
        b"f" * 16,
        b"00000000000000001",
    ),
    *(b"10\r\n", b"0;a=b\r\n", b"\r", b"=", b"\xff", b"7fffffffffffffff", b"80000000"),
)


_WITHHELD = frozenset({b"x"})


def _fresh(kind: int) -> body.Body:
    if kind == 4:
        return chunked.ChunkedBody(True, plain=True)
    length = (CHUNKED, CHUNKED, 64, UNTIL_CLOSE)[kind]
    return body.body_of(length, response=kind in (1, 3), withheld=_WITHHELD)


def _feed(made: body.Body, parts: list[bytes]) -> tuple[int, bytes, str]:
    """How many bytes were taken, what was passed on for them, and the error that ended it."""
    taken, passed = 0, b""
    for part in parts:
        count, error = outcome(lambda part=part: made.feed(memoryview(part)), MessageError)  # type: ignore[misc]
        if count is None:
            return taken, passed, error
        assert 0 <= count <= len(part)
        assert count == len(part) or made.done, "bytes were left though the body goes on"
        taken += count
        passed += body.taken_of(made, part, count)
        if made.done:
            assert made.feed(b"more") == 0
            break
    return taken, passed, ""


def one(data: bytes) -> None:
    kind, data = (data[0] & 7, data[1:]) if data else (0, b"")
    if kind > 4:
        kind -= 4
    whole, split = _fresh(kind), _fresh(kind)
    taken, passed, error = _feed(whole, [data])
    in_pieces, passed_in_pieces, wrong = _feed(split, list(pieces(data)))
    assert error.split()[:2] == wrong.split()[:2], f"{error!r} whole, {wrong!r} in pieces"
    if error:
        assert kind in (0, 1, 4)
        assert error.split()[1] == ("502" if kind else "400")
        assert in_pieces < len(data)
        return
    assert (taken, passed, whole.done) == (in_pieces, passed_in_pieces, split.done)
    ended, _ = outcome(whole.eof, MessageError), None
    assert bool(ended[1]) == (not split.done and kind != 3)
    if kind == 4:
        read = reference.chunked(data, lenient=True)
        assert (-1 if read is None else read.end) == (taken if split.done else -1)
        assert read is None or passed == read.content
    elif kind < 2:
        _check_chunked(data, kind == 1, taken, passed, split.done)
    else:
        assert passed == data[:taken]
    if kind == 2:
        assert taken == min(64, len(data))


def _check_chunked(data: bytes, lenient: bool, taken: int, passed: bytes, done: bool) -> None:
    """The body ends where the reference says, and what passes has the same content."""
    read = reference.chunked(data, lenient)
    assert (-1 if read is None else read.end) == (taken if done else -1)
    if read is not None:
        again = reference.chunked(passed, False, reference.BARE_LINE)
        assert again is not None
        assert (again.end, again.content) == (len(passed), read.content)
        kept = [line for line in read.trailers if line.partition(b":")[0].lower() not in _WITHHELD]
        assert again.trailers == (kept if lenient else [])
