"""Chunked bodies: where each ends, however its bytes arrive, and what of it is passed on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise, repeat
from typing import Any

import pytest
from framing_corpus import HELLO, INVALID_REQUESTS, INVALID_RESPONSES, VALID_REQUESTS
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire import chunked as module
from tinytun_gevent.wire.body import taken_of
from tinytun_gevent.wire.chunked import ChunkedBody


def pass_all(body: ChunkedBody, pieces: Iterable[bytes]) -> tuple[int, bytes]:
    """Feed piece after piece until one is not taken whole; the bytes taken, and those passed on for them."""
    total, passed = 0, b""
    for piece in pieces:
        taken = body.feed(memoryview(piece))
        assert 0 <= taken <= len(piece)
        assert taken == len(piece) or body.done
        total += taken
        passed += taken_of(body, piece, taken)
        if body.done:
            break
    return total, passed


def feed_all(body: ChunkedBody, pieces: Iterable[bytes]) -> int:
    """As :func:`pass_all`, of which only the first is wanted."""
    return pass_all(body, pieces)[0]


def cut(data: bytes, at: list[int]) -> list[bytes]:
    marks = [0, *sorted(position % (len(data) + 1) for position in at), len(data)]
    return [data[a:b] for a, b in pairwise(marks)]


# -- a second opinion: the whole body at once, by regular expressions made from RFC 9112 section 7.1

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
QUOTED = rb'"(?:[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*"'
EXTENSION = rb"(?:[ \t]*;[ \t]*" + TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + TOKEN + rb"|" + QUOTED + rb"))?)*"
STRICT = re.compile(rb"([0-9A-Fa-f]{1,16})" + EXTENSION + rb"\r\n")
LENIENT = re.compile(rb"([0-9A-Fa-f]{1,16})" + EXTENSION + rb"[ \t]*\r\n")
TRAILER = re.compile(rb"(" + TOKEN + rb"):[\t\x20-\x7e\x80-\xff]*\r\n")


def reference(data: bytes, lenient: bool) -> tuple[bytes, int] | None:
    """Return the decoded body and the length of its encoding, None if it is invalid or incomplete."""
    decoded = b""
    position = 0
    while True:
        line = (LENIENT if lenient else STRICT).match(data, position)
        if line is None or int(line[1], 16) >= 2**31:
            return None
        position = line.end()
        size = int(line[1], 16)
        if size == 0:
            break
        decoded += data[position : position + size]
        position += size
        if data[position : position + 2] != b"\r\n":
            return None
        position += 2
    while field := TRAILER.match(data, position):
        position = field.end()
    return (decoded, position + 2) if data[position : position + 2] == b"\r\n" else None


BLANKS = st.sampled_from([b"", b" ", b"\t "])
NAMES = st.text("abcXYZ019-!~", min_size=1, max_size=5).map(str.encode)
VALUES = st.one_of(NAMES, st.sampled_from([b'""', b'"a;b=c"', b'"\\""', b'"\xe9\t "']))
EXTENSIONS = st.lists(
    st.one_of(
        st.builds(lambda a, b, n: a + b";" + b + n, BLANKS, BLANKS, NAMES),
        st.builds(lambda a, n, b, v: b";" + n + a + b"=" + b + v, BLANKS, NAMES, BLANKS, VALUES),
    ),
    max_size=2,
).map(b"".join)
SIZE_FORMATS = st.sampled_from([b"%x", b"%X", b"%04x", b"%016X"])
CHUNKS = st.builds(
    lambda data, size, extension: size % len(data) + extension + b"\r\n" + data + b"\r\n",
    st.one_of(st.binary(min_size=1, max_size=40), st.sampled_from([b"\r\n", b"0\r\n\r\n", b"x" * 300])),
    SIZE_FORMATS,
    EXTENSIONS,
)
LAST = st.builds(lambda size, extension: size % 0 + extension + b"\r\n", SIZE_FORMATS, EXTENSIONS)
TRAILERS = st.lists(
    st.builds(lambda n, v: n + b":" + v + b"\r\n", NAMES, st.sampled_from([b"", b" a", b"\t\xe9 "])),
    max_size=3,
).map(b"".join)
BODIES = st.builds(
    lambda chunks, last, trailers: b"".join(chunks) + last + trailers + b"\r\n",
    st.lists(CHUNKS, max_size=5),
    LAST,
    TRAILERS,
)
CUTS = st.lists(st.integers(0, 10**4), max_size=8)


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, st.binary(max_size=20), CUTS, st.booleans())
def test_any_split_of_a_valid_body_ends_at_the_same_place(
    data: bytes, behind: bytes, at: list[int], lenient: bool
) -> None:
    expected = reference(data + behind, lenient)
    assert expected is not None
    assert expected[1] == len(data)
    body = ChunkedBody(lenient)
    assert feed_all(body, cut(data + behind, at)) == len(data)
    assert body.done
    body.eof()
    assert body.feed(behind) == 0


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, st.data(), st.booleans())
def test_scanner_and_reference_agree_on_mutated_bodies(
    data: bytes, draw: st.DataObject, lenient: bool
) -> None:
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, len(data)))
        new = draw.draw(
            st.one_of(st.binary(max_size=2), st.sampled_from([b"\r", b"\n", b" ", b";", b"0", b'"']))
        )
        data = data[:at] + new + data[at + draw.draw(st.integers(0, 2)) :]
    expected = reference(data, lenient)
    body = ChunkedBody(lenient)
    try:
        taken = feed_all(body, cut(data, draw.draw(CUTS)))
    except MessageError:
        assert expected is None
        return
    assert body.done == (expected is not None)
    if expected is not None:
        assert taken == expected[1]


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, st.binary(max_size=3), st.integers(0, 10**4), CUTS)
def test_whether_a_body_is_refused_does_not_depend_on_its_split(
    data: bytes, new: bytes, at: int, cuts: list[int]
) -> None:
    at %= len(data)
    data = data[:at] + new + data[at + 1 :]

    def judge(pieces: list[bytes]) -> int | None:
        try:
            return feed_all(ChunkedBody(), pieces)
        except MessageError:
            return None

    assert judge([data]) == judge(cut(data, cuts)) == judge([data[i : i + 1] for i in range(len(data))])


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(max_size=300), CUTS, st.booleans())
def test_garbage_raises_nothing_else(data: bytes, at: list[int], lenient: bool) -> None:
    body = ChunkedBody(lenient)
    try:
        feed_all(body, cut(data, at))
        body.eof()
    except MessageError:
        pass
    else:
        assert reference(data, lenient) is not None


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data.split(b"\r\n\r\n", 1)[1], id=name)
        for name, data, _ in INVALID_REQUESTS
        if name.startswith("body/")
    ],
)
def test_no_byte_that_breaks_a_rule_is_taken_byte_by_byte(data: bytes) -> None:
    """What was taken before the error is the beginning of some valid body, and no whole one."""
    body = ChunkedBody()
    pieces = iter([data[i : i + 1] for i in range(len(data))])
    with pytest.raises(MessageError) as caught:
        feed_all(body, pieces)
    taken = len(data) - len(list(pieces)) - 1
    assert caught.value.status == 400
    assert not body.done
    good = ChunkedBody()
    assert good.feed(data[:taken]) == taken
    with pytest.raises(MessageError):
        body.feed(b"\r\n\r\n")
    with pytest.raises(MessageError):
        body.eof()


def test_corpus_bodies_were_found() -> None:
    assert sum(name.startswith("body/") for name, _, _ in INVALID_REQUESTS) > 50


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(data.split(b"\r\n\r\n", 1)[1], id=name)
        for name, data in VALID_REQUESTS
        if b"\r\nTransfer-Encoding: chunked\r\n" in data
    ],
)
def test_valid_corpus_bodies_byte_by_byte(data: bytes) -> None:
    body = ChunkedBody()
    assert feed_all(body, [data[i : i + 1] for i in range(len(data))]) == len(data)
    assert body.done


@pytest.mark.parametrize(
    ("data", "strict"),
    [
        (b"5 \r\nhello\r\n0\r\n\r\n", False),
        (b"5\t \r\nhello\r\n0  \r\n\r\n", False),
        (b"5;a \r\nhello\r\n0\r\n\r\n", False),
        (b"5 ;a\r\nhello\r\n0\r\n\r\n", True),
    ],
)
def test_what_responses_may_and_requests_may_not(data: bytes, strict: bool) -> None:
    assert ChunkedBody(True).feed(data) == len(data)
    if strict:
        assert ChunkedBody().feed(data) == len(data)
    else:
        with pytest.raises(MessageError) as caught:
            ChunkedBody().feed(data)
        assert caught.value.status == 400


# -- what passes ----------------------------------------------------------------------------------


def strictly(data: bytes) -> tuple[bytes, bytes]:
    """The content and the trailer lines of a chunked body that is written as it should be, byte by byte."""
    content = b""
    while True:
        line, data = data.split(b"\r\n", 1)
        assert re.fullmatch(rb"0|[1-9A-Fa-f][0-9A-Fa-f]*", line), line
        size = int(line, 16)
        assert size < 2**31
        if not size:
            assert data.endswith(b"\r\n")
            return content, data[:-2]
        assert data[size : size + 2] == b"\r\n"
        content, data = content + data[:size], data[size + 2 :]


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, st.binary(max_size=20), CUTS, st.booleans())
def test_what_passes_is_written_anew_with_the_same_content_however_it_arrives(
    data: bytes, behind: bytes, at: list[int], response: bool
) -> None:
    expected = reference(data, response)
    assert expected is not None
    taken, passed = pass_all(ChunkedBody(response), cut(data + behind, at))
    assert taken == len(data)
    assert len(passed) <= len(data)
    assert strictly(passed)[0] == expected[0]
    assert pass_all(ChunkedBody(response), [data]) == (taken, passed)
    assert pass_all(ChunkedBody(response), [data[i : i + 1] for i in range(len(data))]) == (taken, passed)


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, st.binary(max_size=20), CUTS)
def test_of_a_plain_one_only_the_content_passes(data: bytes, behind: bytes, at: list[int]) -> None:
    expected = reference(data, lenient=True)
    assert expected is not None
    assert pass_all(ChunkedBody(True, plain=True), cut(data + behind, at)) == (len(data), expected[0])


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, CUTS, st.integers(1, 5), st.booleans())
def test_feeding_in_turns_changes_nothing(data: bytes, at: list[int], lines: int, plain: bool) -> None:
    body, passed = ChunkedBody(True, plain=plain), b""
    for piece in cut(data, at):
        while piece:
            taken = body.feed(piece, lines)
            passed += taken_of(body, piece, taken)
            piece = piece[taken:]
    assert body.done
    assert pass_all(ChunkedBody(True, plain=plain), [data]) == (len(data), passed)


@pytest.mark.parametrize(
    ("data", "passed"),
    [
        (b"05\r\nhello\r\n00;a=b\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
        (b'5;a="0\\"0"\r\nhello\r\n000A ; b\r\n0123456789\r\n', b"5\r\nhello\r\nA\r\n0123456789\r\n"),
        (b"5;a", b""),
        (b"5\r\nhello\r\n5", b"5\r\nhello\r\n"),
        (b"5\r\nhello\r", b"5\r\nhello\r"),
        (b"5\r\nhel", b"5\r\nhel"),
        (b"0\r\n", b"0\r\n"),
    ],
)
def test_lines_are_held_back_until_they_are_whole_and_data_is_not(data: bytes, passed: bytes) -> None:
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))]):
        assert pass_all(ChunkedBody(), pieces) == (len(data), passed)


def test_small_parts_are_joined_so_that_the_pieces_are_few() -> None:
    body = ChunkedBody()
    assert body.feed(b"01;a\r\nx\r\n" * 10_000) == 90_000
    assert body.rewritten is not None
    assert len(body.rewritten) == 1


# -- trailers --------------------------------------------------------------------------------------

WITHHELD = frozenset({b"content-length", b"x-hop"})


@settings(deadline=None)  # a busy machine is no failure
@given(BODIES, CUTS)
def test_a_request_s_trailers_do_not_pass(data: bytes, at: list[int]) -> None:
    _, passed = pass_all(ChunkedBody(), cut(data, at))
    assert strictly(passed)[1] == b""


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.sampled_from([b"X:", b"Content-Length: 5", b"conTENT-length:\t5", b"Y: \xe9 ", b"X-Hop: a"])),
    CUTS,
)
def test_of_a_response_s_trailers_those_pass_that_may(lines: list[bytes], at: list[int]) -> None:
    kept = [line for line in lines if line[:2] in (b"X:", b"Y:")]
    data, expected = (b"\r\n".join([b"1", b"x", b"0", *some, b"", b""]) for some in (lines, kept))
    assert pass_all(ChunkedBody(True, WITHHELD), cut(data, at)) == (len(data), expected)


@pytest.mark.parametrize("data", [HELLO, b"0\r\n\r\n", b"5\r\nhello\r\n", b"hello"])
def test_what_may_pass_as_it_came_is_not_copied(data: bytes) -> None:
    body = ChunkedBody()
    if data == b"hello":
        body.feed(b"5\r\n")
    assert body.feed(data) == len(data)
    assert body.rewritten is None


def test_long_parts_of_what_is_rewritten_are_not_copied() -> None:
    body = ChunkedBody()
    view = memoryview(b"0%x\r\n" % (3 * module.WHOLE) + b"x" * (3 * module.WHOLE) + b"\r\n0\r\nX: y\r\n\r\n")
    body.feed(view)
    assert body.rewritten is not None
    line, data, rest = body.rewritten
    assert isinstance(data, memoryview)
    assert data.obj is view.obj
    assert (line, rest) == (b"%x\r\n" % (3 * module.WHOLE), b"0\r\n\r\n")


def test_errors_of_responses_are_the_services_fault() -> None:
    assert any(name.startswith("body/") for name, _, _ in INVALID_RESPONSES)
    with pytest.raises(MessageError) as caught:
        ChunkedBody(True).feed(b"x")
    assert caught.value.status == 502


def test_next_message_is_left_alone() -> None:
    body = ChunkedBody()
    assert body.feed(HELLO + b"GET / HTTP/1.1\r\n") == len(HELLO)
    assert body.feed(b"GET / HTTP/1.1\r\n") == 0


@pytest.mark.parametrize("have", range(len(HELLO)))
def test_truncated_chunked_body(have: int) -> None:
    body = ChunkedBody()
    assert body.feed(HELLO[:have]) == have
    assert not body.done
    with pytest.raises(MessageError) as caught:
        body.eof()
    assert caught.value.status == 400


@pytest.mark.parametrize("size", [b"7fffffff", b"7FFFFFFF", b"000000007fffffff", b"0fffffff", b"fffffff"])
def test_largest_chunk_sizes(size: bytes) -> None:
    body = ChunkedBody()
    body.feed(b"0001\r\nx\r\n")
    body.feed(size + b"\r\n")
    assert body.feed(b"x" * 1000) == 1000
    assert not body.done


@pytest.mark.parametrize("size", [b"80000000", b"FFFFFFFF", b"0000000080000000", b"100000005", b"7" * 16])
@pytest.mark.parametrize("response", [False, True])
def test_a_size_that_32_bits_cannot_count_is_refused_at_its_last_digit(size: bytes, response: bool) -> None:
    """A service that does would read the 5 of 0x100000005, and what follows as another message."""
    for before in (b"", b"1\r\nx\r\n", b"1\r\nx"):
        for line in (size, size + b"\r\n", size + b";a\r\nx"):
            body = ChunkedBody(response)
            body.feed(before)
            with pytest.raises(MessageError):
                body.feed(b"\r\n" * (before[-1:] == b"x") + line)


def test_overlong_size_is_noticed_at_its_first_digit_too_many() -> None:
    body = ChunkedBody()
    assert body.feed(b"0" * 16) == 16
    with pytest.raises(MessageError):
        body.feed(b"0")
    with pytest.raises(MessageError):
        ChunkedBody().feed(b"0" * 17 + b";a")


def test_what_is_kept_of_an_endless_line_is_bounded() -> None:
    for start, limit in ((b"5;", module.MAX_CHUNK_LINE), (b"0\r\nX:", module.MAX_TRAILER)):
        body = ChunkedBody()
        body.feed(start)
        with pytest.raises(MessageError):
            feed_all(body, repeat(b"a" * 100))
        assert len(body._line) <= limit


class CountingTable(tuple[bytes, ...]):
    """A state table that counts how often it is asked."""

    asked = 0

    def __getitem__(self, state: Any) -> Any:
        CountingTable.asked += 1
        return super().__getitem__(state)


def test_every_byte_is_looked_at_once_however_it_arrives() -> None:
    data = b"5;" + b"a=b;c" * 700 + b"\r\nhello\r\n0\r\nX: " + b"a" * 16_000 + b"\r\n\r\n"
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], cut(data, list(range(0, 20_000, 7)))):
        CountingTable.asked = 0
        body = ChunkedBody()
        body._table = CountingTable(body._table)
        assert feed_all(body, pieces) == len(data)
        assert 16_000 <= CountingTable.asked <= len(data) - len(b"hello")
