"""A stream of HTTP/2 frames, split into DATA and control frames."""

from __future__ import annotations

from tinytun_gevent.wire import frames
from tinytun_gevent.wire.http2 import CONTROL_FRAME_MAX

from .splitting import outcome, pieces

CODE = (frames,)
MAX_FRAME = 20_000


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream_id: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


SEEDS = (
    frame(4) + frame(0, b"hello", 1, 1) + frame(6, b"12345678"),
    frame(0, b"\x03abc\0\0\0", 8, 1) + frame(0, b"", 0, 3) + frame(0, b"x", 0, 0),
    frame(1, b"\x82", 0, 1) + frame(9, b"\x86\x84", 4, 1) + frame(0, b"y", 0, 1),
    frame(1, b"\x82", 0, 1) + frame(0, b"inside a block", 0, 1) + frame(11, b"unknown"),
    frame(11, b"unknown" * 9) + frame(8, b"\0\0\0\1", 0, 1) + frame(3, b"\0\0\0\x08", 0, 1),
    frame(0, b"")[:-1] + b"\1",
    b"\xff\xff\xff\0\0\0\0\0\1",
)
TOKENS = (
    *(frame(kind, b"\0\0\0\0", flags, 1) for kind in range(11) for flags in (0, 1, 4, 8)),
    *(b"\0\0\0", b"\0\0\4", b"\x80\0\0\0", b"\0\x4e\x20", b"\0\x40\1", b"\0\0\1", bytes(40)),
)


class Recorder:
    """Remembers the calls, the pieces of one DATA frame joined."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self._payload: bytearray | None = None

    def data_begins(self, stream_id: int, length: int, flags: int) -> None:
        assert self._payload is None
        assert length <= MAX_FRAME
        self.calls.append(("data", stream_id, length, flags))
        self._payload = bytearray()

    def data_piece(self, view: memoryview) -> None:
        assert self._payload is not None
        assert len(view)
        self._payload += view

    def data_ends(self) -> None:
        assert self._payload is not None
        self.calls.append(("end", bytes(self._payload)))
        self._payload = None

    def unknown_frame(self) -> None:
        assert self._payload is None
        self.calls.append(("unknown",))

    def control_frame(self, frame: memoryview, kind: int, flags: int, stream_id: int) -> None:
        assert self._payload is None
        assert len(frame) == 9 + int.from_bytes(frame[:3], "big")
        assert len(frame) - 9 <= (MAX_FRAME if kind == 0 else CONTROL_FRAME_MAX)
        self.calls.append(("control", bytes(frame)))


def _run(parts: list[bytes]) -> tuple[list[tuple[object, ...]], str]:
    recorder = Recorder()
    splitter = frames.FrameSplitter(recorder, MAX_FRAME)

    def feed(part: bytes) -> None:
        rest = memoryview(part)
        while rest:
            rest = splitter.feed(rest)

    error = ""
    for part in parts:
        _, error = outcome(lambda part=part: feed(part), frames.FrameTooLongError)  # type: ignore[misc]
        assert len(splitter._partial) <= 9 + MAX_FRAME
        if error:
            break
    return recorder.calls, error


def one(data: bytes) -> None:
    calls, error = _run([data])
    assert (calls, error) == _run(list(pieces(data)))
    assert calls == _reference(data, bool(error))


def _reference(data: bytes, broken: bool) -> list[tuple[object, ...]]:
    """The frames by their lengths alone (RFC 9113 section 4.1), as the calls that they should have led to."""
    calls: list[tuple[object, ...]] = []
    at, in_block = 0, False
    while len(data) - at >= 9:
        size, kind, flags = int.from_bytes(data[at : at + 3], "big"), data[at + 3], data[at + 4]
        stream_id = int.from_bytes(data[at + 5 : at + 9], "big") & 0x7FFFFFFF
        payload = data[at + 9 : at + 9 + size]
        if size > (MAX_FRAME if kind == 0 else CONTROL_FRAME_MAX):
            assert broken, "a frame that is too long was let pass"
            return calls
        if kind == 0 and not flags & 8 and not in_block and stream_id:
            calls.append(("data", stream_id, size, flags))
            if len(payload) == size:
                calls.append(("end", payload))
        elif len(payload) == size and (kind <= 9 or in_block):
            calls.append(("control", data[at : at + 9 + size]))
            if kind in (1, 5, 9):
                in_block = not flags & 4
        elif kind > 9 and not in_block:
            calls.append(("unknown",))
        at += 9 + size
    assert not broken, "a frame was refused that is not too long"
    return calls
