"""A whole session, fed with a peer's bytes, in both roles.

The first byte chooses the role (1: the opener's, a tunnel server's), whether a proper greeting comes
first (2), how many streams the opener has open (4: three), and whether receivers hold what they get (8).
Where `MARK` stands in the input our own side does something: the byte behind it says what (`_act`).
Nothing waits here: the bytes are given to the receiving half as the reader would.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import gevent
from gevent import socket
from h2.exceptions import ProtocolError
from hyperframe.frame import Frame, SettingsFrame

from tinytun_gevent.errors import PeerProtocolError, SessionError
from tinytun_gevent.session import Session
from tinytun_gevent.stream import Stream
from tinytun_gevent.wire import http2
from tinytun_gevent.wire.frames import FrameTooLongError

from .frames import frame
from .splitting import pieces

_ELSEWHERE = ("tinytun_gevent.server", "tinytun_gevent.client")
CODE = tuple(
    module
    for name, module in list(sys.modules.items())
    if name.startswith("tinytun_gevent.") and not name.startswith(_ELSEWHERE)
)
MAX_STREAMS = 5
OPENER, GREETED, OPEN, HOLDING = 1, 2, 4, 8
MARK = b"\xf5\xf6"
RESET, SHUTDOWN, SEND, OPEN_ONE, GO_AWAY, RELEASE, REST = range(7)
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, UPDATE, CONTINUATION = range(10)
ACT = 100  # bytes that our side may say for one act, which is more than any of their frames has
_REQUEST = http2.request(1)[9:]
_SETTINGS = SettingsFrame(0, {3: 100, 4: 70_000}).serialize()
_OPENING = http2.request(1, "192.0.2.1:5") + http2.request(3)
SEEDS = tuple(
    bytes((choice,)) + b"".join(frames)
    for choice, *frames in (
        (0, http2.PREFACE, _SETTINGS, _OPENING, frame(DATA, b"hello", 1, 1)),
        (2, _OPENING, frame(DATA, b"hello", 0, 1), frame(RST, b"\0\0\0\x08", 0, 3), frame(DATA, b"", 1, 1)),
        (10, _OPENING, frame(DATA, b"\2abc\0\0", 9, 1), frame(UPDATE, b"\0\0\1\0", 0, 1)),
        (
            2,
            frame(HEADERS, b"\x82\x86", 0, 1),
            frame(CONTINUATION, b"\x84", 4, 1),
            frame(HEADERS, b"\x82", 0, 3),
        ),
        (2, *(http2.request(number) for number in range(1, 15, 2))),
        (2, _OPENING, frame(SETTINGS, b"\0\4\0\0\0\1"), frame(SETTINGS, b"\0\4\x7f\xff\xff\xff")),
        (2, frame(PING, b"12345678"), frame(PING, b"12345678", 1), frame(PRIORITY, b"\0\0\0\3\1", 0, 1)),
        (2, frame(HEADERS, b"\0\0\0\3\1" + _REQUEST, 0x24, 1), frame(HEADERS, b"\x40\1a\1b", 5, 1)),
        (2, frame(GOAWAY, b"\0\0\0\1\0\0\0\0bye"), http2.request(1), frame(SETTINGS, b"", 1)),
        (7, http2.response(1), frame(DATA, b"hello", 1, 1), frame(RST, b"\0\0\0\7", 0, 3)),
        (7, frame(DATA, b"early", 0, 1), http2.response(1), frame(HEADERS, b"\x88", 5, 3)),
        (15, frame(GOAWAY, b"\0\0\0\1\0\0\0\0"), http2.response(1), frame(DATA, b"x", 1, 1)),
        (7, frame(PUSH, b"\0\0\0\2" + _REQUEST, 4, 1), frame(HEADERS, b"\x8d", 4, 1)),
        (7, frame(SETTINGS, b"\0\1\0\0\0\0\0\3\0\0\0\0"), frame(UPDATE, b"\x7f\xff\xff\xff", 0, 0)),
        (1, _SETTINGS, frame(UPDATE, b"\0\0\0\0", 0, 0)),
        (1, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        *((7, http2.response(1), MARK, bytes((act,)), frame(DATA, b"late", 1, 1)) for act in range(7)),
        *(
            (10, _OPENING, frame(DATA, b"x", 0, 1), MARK, bytes((act,)), frame(UPDATE, b"\0\0\0\1", 0, 1))
            for act in range(7)
        ),
    )
)
TOKENS = (
    *(MARK + bytes((act | stream << 3,)) for act in range(7) for stream in range(3)),
    *(frame(kind, b"\0\0\0\1", flags, at) for kind in range(10) for flags in (0, 1, 4) for at in (0, 1)),
    *(_SETTINGS, http2.PREFACE, http2.request(5), http2.response(3), frame(DATA, b"x", 1, 1)),
    frame(DATA, b"x", 0, 3),
    *(frame(RST, b"\0\0\0\x08", 0, 1), frame(RST, b"\0\0\0\7", 0, 3), frame(PING, bytes(8))),
    frame(PING, bytes(8), 1),
    *(frame(SETTINGS, b"\0\4\0\0\0\0"), frame(SETTINGS, b"\0\1\0\0\0\0")),
    frame(SETTINGS, b"\0\5\0\xff\xff\xff"),
    *(frame(GOAWAY, bytes(8)), frame(DATA, b"\0", 8, 1), b"\x82", b"\x88", b"\x8d", b"\x41\0"),
    *(b"\x3f\xe1\x1f", b"\x20"),
    *(frame(HEADERS, b"\x88", 4, 1), frame(HEADERS, b"\x88", 5, 3), frame(UPDATE, b"\x7f\xff\xff\xff", 0, 1)),
)  # fmt: skip


class Inbox:
    """A receiver that keeps what comes and refuses what may not come."""

    def __init__(self, stream: Stream, hold: bool) -> None:
        self.stream, self.hold = stream, hold
        self.received = bytearray()
        self.end = ""
        stream.receiver = self

    def data(self, view: memoryview) -> None:
        assert not self.end, "data after the end"
        self.received += view
        if not self.hold:
            self.stream.consumed(len(view))

    def eof(self) -> None:
        assert not self.end, "two ends"
        self.end = "whole"

    def aborted(self, error: SessionError) -> None:
        assert not self.end.startswith("aborted"), "aborted twice"
        self.end = f"aborted: {error}"


_listener: list[socket.socket] = []


def _sockets() -> tuple[socket.socket, socket.socket]:
    if not _listener:
        _listener.append(socket.create_server(("127.0.0.1", 0)))  # type: ignore[attr-defined]
    one = socket.create_connection(_listener[0].getsockname())
    return one, _listener[0].accept()[0]


def _act(made: Session, inboxes: list[Inbox], what: int, hold: bool) -> None:
    """One thing that our side may do at any time, on one of its streams; a session may refuse it."""
    act, inbox = what & 7, inboxes[(what >> 3) % len(inboxes)] if inboxes else None
    with contextlib.suppress(SessionError):
        if act == OPEN_ONE and made.opener:
            inboxes.append(Inbox(made.open("192.0.2.1:99"), hold))
        elif act == GO_AWAY:
            made.goaway()
        elif inbox is None or inbox.stream.closed:
            return
        elif act == RESET:
            inbox.stream.reset()
        elif act == SHUTDOWN:
            inbox.stream.shutdown()
        elif act == SEND and not inbox.stream.local_ended:
            made.send_small(inbox.stream, b"a few bytes")
        elif act == RELEASE and inbox.hold:
            inbox.stream.consumed(inbox.stream.receive_window.undelivered)
        elif act == REST:
            inbox.stream.rest()


def _run(choice: int, data: bytes, cut: Callable[[bytes], list[bytes]]) -> tuple[object, ...]:
    """Feeds a new session with pieces of ``data``; what became of it and of its streams."""
    ours, theirs = _sockets()
    inboxes: list[Inbox] = []
    holding = bool(choice & HOLDING)

    def on_stream(stream: Stream) -> None:
        inboxes.append(Inbox(stream, holding))
        stream.accept()

    opener = bool(choice & OPENER)
    made = Session(ours, opener=opener, max_streams=0 if opener else MAX_STREAMS, on_stream=on_stream)
    made.keep_alive.probes = 0
    try:
        made.conn.initiate_connection()
        made.writer.queue(made.conn.take_output())
        made.keep_alive.ping()
        if choice & GREETED:
            _receive(made, [(b"" if opener else http2.PREFACE) + _SETTINGS])
        if opener and choice & GREETED and choice & OPEN:
            inboxes += [Inbox(made.open(), holding) for _ in range(3)]
        first, *others = data.split(MARK)
        sent = _receive(made, cut(first))
        for part in others:
            if part and not made.closing:
                _act(made, inboxes, part[0], holding)
            sent += _receive(made, cut(part[1:])) + ACT
        _check(made, inboxes, theirs, sent)
        ends = [(inbox.stream.id, bytes(inbox.received), inbox.end) for inbox in inboxes]
        return made.closing, repr(made.error), ends, made.goaway_received, len(made.streams)
    finally:
        made.close()
        ours.close()
        theirs.close()
        gevent.sleep(0)


def _receive(made: Session, parts: list[bytes]) -> int:
    """What ``Incoming.read`` does with what it reads, without waiting for anything; bytes taken."""
    taken = 0
    try:
        for part in parts:
            if made.closing:
                break
            rest = memoryview(part)
            while rest and not made.closing:
                rest = made._incoming._receive(rest)
            taken += len(part)
    except (FrameTooLongError, ProtocolError, PeerProtocolError) as error:
        made._incoming._broken_by_peer(error)
    return taken


def _check(made: Session, inboxes: list[Inbox], theirs: socket.socket, taken: int) -> None:
    if not made.opener:
        assert len(made.streams) <= MAX_STREAMS
    assert str(made.error).isprintable(), "it reaches the log and the peer"
    assert " 0x" not in str(made.error), "an address of ours"
    assert len(made.conn.streams) <= MAX_STREAMS + 1, "h2 keeps streams that are over"
    assert len(made.conn.remote_settings._settings) <= 8
    held = sum(len(inbox.received) for inbox in inboxes if inbox.hold)
    assert made.backlog >= 0
    assert made.backlog <= held + made._incoming._splitter.data_left + taken
    for inbox in inboxes:
        if inbox.stream.id not in made.streams:
            assert inbox.end, f"stream {inbox.stream.id} is gone and nobody was told"
    gevent.sleep(0)  # what is to leave when this round of the event loop is over
    said = _read(theirs)
    assert len(said) <= 4096 + 8 * taken, f"{len(said)} bytes were said to {taken}"
    if made.opener:
        assert said.startswith(http2.PREFACE)
        said = said[len(http2.PREFACE) :]
    while said:
        head, length = Frame.parse_frame_header(memoryview(said[:9]))
        assert len(said) >= 9 + length, "a frame was sent in part"
        head.parse_body(memoryview(said[9 : 9 + length]))
        said = said[9 + length :]


def _read(theirs: socket.socket) -> bytes:
    got = b""
    theirs.setblocking(False)
    with contextlib.suppress(OSError):
        while data := theirs.recv(1 << 20):
            got += data
    return got


def one(data: bytes) -> None:
    choice, data = (data[0], data[1:]) if data else (0, b"")
    assert _run(choice, data, lambda part: [part]) == _run(choice, data, lambda part: list(pieces(part)))
