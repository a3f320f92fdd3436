"""Splitting a byte stream into frames: the same calls wherever the reads cut it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.wire.frames import FRAMES_AT_ONCE, KNOWN_TYPES, FrameSplitter, FrameTooLongError
from tinytun_gevent.wire.http2 import (
    CONTINUATION,
    CONTROL_FRAME_MAX,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    HEADERS,
    PADDED,
    PUSH_PROMISE,
    SETTINGS,
    WINDOW_UPDATE,
    pack_head,
)

MAX_FRAME = 20_000
PING = 6


class Recorder:
    """Remembers the calls, pieces of one DATA frame joined."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._piece: bytearray | None = None

    def data_begins(self, stream_id: int, length: int, flags: int) -> None:
        assert self._piece is None, "a frame began inside another"
        self.calls.append(("begins", stream_id, length, flags))
        self._piece = bytearray()

    def data_piece(self, view: memoryview) -> None:
        assert self._piece is not None, "payload outside a frame"
        assert len(view), "an empty piece"
        self._piece += view

    def data_ends(self) -> None:
        assert self._piece is not None, "an end without a beginning"
        self.calls.append(("ends", bytes(self._piece)))
        self._piece = None

    def unknown_frame(self) -> None:
        assert self._piece is None, "an unknown frame inside DATA"
        self.calls.append(("unknown",))

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        assert self._piece is None, "a control frame inside DATA"
        self.calls.append(("control", bytes(frame), kind, flags, stream_id))


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream_id: int = 0) -> bytes:
    head = bytearray(FRAME_HEAD)
    pack_head(head, len(payload), kind, flags, stream_id)
    return bytes(head) + payload


def run(*pieces: bytes) -> Recorder:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, MAX_FRAME)
    for piece in pieces:
        splitter.feed(memoryview(piece))
    return recorder


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


frames = st.builds(
    frame,
    st.sampled_from([DATA, DATA, DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION, 11, 200]),
    st.binary(max_size=60),
    st.sampled_from([0, END_STREAM, END_HEADERS, PADDED, END_STREAM | PADDED, 0xFF]),
    st.sampled_from([0, 1, 3, 2**31 - 1]),
)


@given(st.lists(frames, max_size=12), st.lists(st.integers(0, 10_000), max_size=20))
def test_any_split_gives_the_same_calls(stream: list[bytes], places: list[int]) -> None:
    data = b"".join(stream)
    assert run(*cut(data, places)).calls == run(data).calls


@given(st.lists(frames, max_size=6))
def test_byte_by_byte_gives_the_same_calls(stream: list[bytes]) -> None:
    data = b"".join(stream)
    assert run(*(data[i : i + 1] for i in range(len(data)))).calls == run(data).calls


@given(st.binary(max_size=4000), st.lists(st.integers(0, 10_000), max_size=8))
@settings(max_examples=300)
def test_garbage_raises_only_its_own_error_and_alike_in_any_split(data: bytes, places: list[int]) -> None:
    outcomes = []
    for pieces in ([data], cut(data, places)):
        recorder = Recorder()
        splitter = FrameSplitter(recorder, MAX_FRAME)
        failed = False
        try:
            for piece in pieces:
                splitter.feed(memoryview(piece))
        except FrameTooLongError:
            failed = True
        outcomes.append((failed, recorder.calls))
    assert outcomes[0] == outcomes[1]


def test_data_is_handed_on_before_its_frame_is_complete() -> None:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, MAX_FRAME)
    data = frame(DATA, b"abcdef", END_STREAM, 5)
    splitter.feed(memoryview(data[:12]))
    assert recorder.calls == [("begins", 5, 6, END_STREAM)]
    assert bytes(recorder._piece or b"") == b"abc"
    splitter.feed(memoryview(data[12:]))
    assert recorder.calls[-1] == ("ends", b"abcdef")


def test_pieces_are_views_of_what_was_fed() -> None:
    """Nothing may be copied on the way of bulk data."""
    fed = bytearray(frame(DATA, b"x" * 1000, 0, 1))

    class Poke(Recorder):
        def data_piece(self, view: memoryview) -> None:
            view[0] = ord("!")

    FrameSplitter(Poke(), MAX_FRAME).feed(memoryview(fed))
    assert fed[FRAME_HEAD] == ord("!")


def test_an_empty_data_frame_begins_and_ends() -> None:
    assert run(frame(DATA, b"", END_STREAM, 7)).calls == [("begins", 7, 0, END_STREAM), ("ends", b"")]


def test_padded_data_and_data_without_a_stream_come_whole() -> None:
    padded, nowhere = frame(DATA, b"\x02hi\0\0", PADDED, 1), frame(DATA, b"hi", 0, 0)
    assert run(padded, nowhere).calls == [
        ("control", padded, DATA, PADDED, 1),
        ("control", nowhere, DATA, 0, 0),
    ]


def test_data_inside_a_header_block_comes_whole_so_that_h2_refuses_it() -> None:
    """Between HEADERS without END_HEADERS and its CONTINUATION nothing else may stand (§6.10)."""
    first, middle = frame(HEADERS, b"\x82", 0, 1), frame(DATA, b"hi", 0, 1)
    last, after = frame(CONTINUATION, b"\x86", END_HEADERS, 1), frame(DATA, b"yo", 0, 1)
    assert run(first, middle, last, after).calls == [
        ("control", first, HEADERS, 0, 1),
        ("control", middle, DATA, 0, 1),
        ("control", last, CONTINUATION, END_HEADERS, 1),
        ("begins", 1, 2, 0),
        ("ends", b"yo"),
    ]


def test_unknown_types_are_skipped_except_inside_a_header_block() -> None:
    unknown = frame(KNOWN_TYPES + 1, b"z" * 50, 0xFF, 9)
    assert run(unknown, frame(PING, b"8" * 8)).calls == [
        ("unknown",),
        ("control", frame(PING, b"8" * 8), PING, 0, 0),
    ]
    first = frame(PUSH_PROMISE, b"", 0, 1)
    assert run(first, unknown).calls[1][0] == "control"


@pytest.mark.parametrize("kind", [HEADERS, SETTINGS, PING, WINDOW_UPDATE, 77])
def test_a_long_control_frame_is_refused_from_its_head_alone(kind: int) -> None:
    head = bytearray(FRAME_HEAD)
    pack_head(head, CONTROL_FRAME_MAX + 1, kind, 0, 1)
    for pieces in ([bytes(head)], [bytes(head[:4]), bytes(head[4:])]):
        with pytest.raises(FrameTooLongError):
            run(*pieces)
    assert run(frame(kind, b"k" * CONTROL_FRAME_MAX, 0, 1))._piece is None


@pytest.mark.parametrize("flags", [0, PADDED])
def test_data_may_be_as_long_as_announced_and_no_longer(flags: int) -> None:
    assert run(frame(DATA, b"\0" * MAX_FRAME, flags, 1)).calls
    head = bytearray(FRAME_HEAD)
    pack_head(head, MAX_FRAME + 1, DATA, flags, 1)
    with pytest.raises(FrameTooLongError):
        run(bytes(head))


def test_what_is_kept_between_reads_is_at_most_one_control_frame() -> None:
    splitter = FrameSplitter(Recorder(), MAX_FRAME)
    piece = frame(DATA, b"d" * 10_000, 0, 1)
    for _ in range(50):
        for start in range(0, len(piece), 7):
            splitter.feed(memoryview(piece[start : start + 7]))
            assert len(splitter._partial) < FRAME_HEAD
    whole = frame(HEADERS, b"h" * CONTROL_FRAME_MAX, END_HEADERS, 1)
    for start in range(0, len(whole), 1000):
        splitter.feed(memoryview(whole[start : start + 1000]))
        assert len(splitter._partial) <= len(whole)
    assert not splitter._partial


def test_the_reserved_bit_of_a_stream_id_is_ignored() -> None:
    data = bytearray(frame(DATA, b"hi", 0, 5))
    data[5] |= 0x80
    assert run(bytes(data)).calls[0] == ("begins", 5, 2, 0)


def test_a_handler_s_error_comes_through() -> None:
    class Refusing(Recorder):
        def data_begins(self, stream_id: int, length: int, flags: int) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        FrameSplitter(Refusing(), MAX_FRAME).feed(memoryview(frame(DATA, b"hi", 0, 1)))


def test_very_many_frames_are_taken_in_turns() -> None:
    recorder = Recorder()
    splitter = FrameSplitter(recorder, MAX_FRAME)
    one = frame(DATA, b"x", 0, 1)
    rest = splitter.feed(memoryview(one * (FRAMES_AT_ONCE + 7) + one[:4]))
    assert len(recorder.calls) == 2 * FRAMES_AT_ONCE
    assert len(rest) == 7 * len(one) + 4
    assert not splitter.feed(rest)
    assert len(recorder.calls) == 2 * (FRAMES_AT_ONCE + 7)
    assert not splitter.feed(memoryview(one[4:]))
    assert len(recorder.calls) == 2 * (FRAMES_AT_ONCE + 8)
