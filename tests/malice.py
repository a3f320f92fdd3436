"""Malicious peers of a session: what each of them sends, and how it has to end.

An :class:`Attack` is played over a :class:`Link`, a socket on which the tunnel has been opened already: by a
malicious tunnel client against a server (`as_client`), or by a malicious tunnel server against a client
(:class:`FakeServer`). `play` floods until the victim has said GOAWAY or closed, and tells when
that was. Plain sockets and threads only, so that any program can use it::

    with as_client(port, "evil") as link:
        end = play(ATTACKS["PING flood"], link)
        assert end.code in (None, *ATTACKS["PING flood"].codes)

``CLIENT`` and ``SERVER`` say who may play an attack: HTTP/2's roles are turned around in a tunnel, its
*server* opens the streams.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, UPDATE, CONTINUATION = range(10)
ACK, END_STREAM, END_HEADERS, PADDED = 1, 1, 4, 8

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST: Final = b"\x82\x86\x84"
"""``:method GET``, ``:scheme http``, ``:path /``."""
OK: Final = b"\x88"
"""``:status 200``."""
CONTINUE: Final = b"\x08\x03100"
"""``:status 100``."""

PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR = 1, 3, 5, 6
COMPRESSION_ERROR, CALM = 9, 11

CLIENT, SERVER = "client", "server"
BOTH: Final = frozenset({CLIENT, SERVER})

PATIENCE: Final = 60.0
"""Seconds after which whatever should have happened has not."""

BURST: Final = 500
"""Frames sent at once in a flood."""


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + struct.pack(">BBL", kind, flags, stream) + payload


def number(value: int) -> bytes:
    return struct.pack(">L", value)


@dataclass
class End:
    """How a session ended."""

    code: int | None
    """GOAWAY's; None if none came before the connection's end."""
    after: float
    """Seconds from the first malicious byte on."""


class Link:
    """The malicious end of a session: sends what it is told, answers PING and SETTINGS, notes GOAWAY."""

    def __init__(self, sock: socket.socket, role: str, visit: Callable[[], None] | None = None) -> None:
        """``visit`` makes the victim open a stream; only a tunnel's client needs it."""
        self.role = role
        #: This end's address, as the victim's log has it.
        self.address = "{}:{}".format(*sock.getsockname()[:2])
        self._sock = sock
        self._visit = visit
        self._next = 1
        self._opened: queue.Queue[int] = queue.Queue()
        self._writing = threading.Lock()
        #: Answers that could not be sent because something else was just being sent.
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._mute = False
        self._answered = threading.Semaphore(0)
        #: What came on the streams.
        self._data: queue.Queue[bytes] = queue.Queue()
        self._goaway: tuple[float, int] | None = None
        self._closed_at = 0.0
        self.over = threading.Event()
        self._reading = threading.Event()
        self._reading.set()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def greet(self) -> None:
        """What an honest peer says first."""
        self.send((PREFACE if self.role == SERVER else b"") + frame(SETTINGS, struct.pack(">HL", 3, 100)))
        self.listen()
        for _ in range(2):  # the second one is sent when the victim has dealt with the first
            self.send(frame(PING, b"so far ?"))
            self._answered.acquire(timeout=PATIENCE)

    def listen(self, *, mute: bool = False) -> None:
        """Begins to read, and to answer what has to be, unless ``mute``: the greeting comes first."""
        self._mute = mute
        self._reader.start()

    def send(self, data: bytes) -> bool:
        """Sends all of it; False if the victim has gone."""
        try:
            with self._writing:
                self._sock.sendall(data)
                self._sock.sendall(self._answers.get_nowait() if not self._answers.empty() else b"")
        except OSError:
            self.over.wait(PATIENCE)
            return False
        return not self.over.is_set()

    def _answer(self, data: bytes) -> None:
        """Sends it now, or leaves it to whoever is sending: the reader must not wait."""
        if self._writing.acquire(blocking=False):
            try:
                self._sock.sendall(data)
            finally:
                self._writing.release()
        else:
            self._answers.put(data)

    def open(self) -> int:
        """A new stream, accepted: one of ours, or for a visitor."""
        if self.role == SERVER:
            stream, self._next = self._next, self._next + 2
            self.send(frame(HEADERS, REQUEST, END_HEADERS, stream))
            return stream
        stream = self.visited()
        self.send(frame(HEADERS, OK, END_HEADERS, stream))
        return stream

    def visited(self) -> int:
        """The stream that the victim, a server, opens for a visitor; not yet accepted."""
        assert self._visit is not None
        self._visit()
        return self._opened.get(timeout=PATIENCE)

    def data(self) -> bytes:
        """What comes next on the streams."""
        return self._data.get(timeout=PATIENCE)

    def stop_reading(self) -> None:
        self._reading.clear()

    def end(self, began: float) -> End:
        """Waits until the session is over."""
        assert self.over.wait(PATIENCE), "the victim goes on"
        if self._goaway is not None:
            return End(self._goaway[1], self._goaway[0] - began)
        return End(None, self._closed_at - began)

    def close(self) -> None:
        self._reading.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        if self._reader.ident is not None:
            self._reader.join(PATIENCE)
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        buffer = bytearray()
        preface = len(PREFACE) if self.role == CLIENT else 0
        with contextlib.suppress(OSError):
            while self._more(buffer):
                if len(buffer) < preface:
                    continue
                del buffer[:preface]
                preface = 0
                while len(buffer) >= 9 and len(buffer) >= (whole := 9 + int.from_bytes(buffer[:3], "big")):
                    stream = int.from_bytes(buffer[5:9], "big")
                    self._take(buffer[3], buffer[4], stream, bytes(buffer[9:whole]))
                    del buffer[:whole]
        self._closed_at = time.monotonic()
        self.over.set()

    def _more(self, buffer: bytearray) -> bool:
        """Reads some bytes, or with `stop_reading` waits for the end only."""
        if not self._reading.is_set():
            while not self._reading.wait(0.02):
                if self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != 1:
                    return False  # it is not established any more
        data = self._sock.recv(65536)
        buffer += data
        return bool(data)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == GOAWAY:
            if self._goaway is None:
                self._goaway = time.monotonic(), int.from_bytes(payload[4:8], "big")
                self.over.set()
        elif kind == HEADERS:
            self._opened.put(stream)
        elif kind == DATA:
            self._data.put(payload)
        elif kind == PING and flags & ACK:
            self._answered.release()
        elif kind in (PING, SETTINGS) and not flags & ACK and not self._mute:
            self._answer(frame(kind, payload if kind == PING else b"", ACK))


def open_tunnel(port: int, name: str) -> socket.socket:
    """A connection to a tunnel server that has answered 101."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    wish = b"x-tinytun-type: http\r\nx-tinytun-subdomain: %b\r\n\r\n" % name.encode()
    sock.sendall(b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n" + wish)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += sock.recv(1)
    assert head.startswith(b"HTTP/1.1 101 "), head
    return sock


def as_client(port: int, name: str, visit: Callable[[], None] | None = None) -> Link:
    """Opens the tunnel ``name`` and is its malicious client."""
    return Link(open_tunnel(port, name), CLIENT, visit)


class FakeServer:
    """A malicious tunnel server: each connection of a client becomes a `Link` as soon as it is asked for."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(PATIENCE)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def accept(self) -> Link:
        """The next connection, whose CONNECT is granted."""
        sock, _ = self._listener.accept()
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        sock.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nx-tinytun-connection-id: %b\r\n" % (b"0" * 32)
            + b"x-tinytun-domain: evil.test\r\nx-tinytun-subdomain: evil\r\n\r\n"
        )
        return Link(sock, SERVER)

    def close(self) -> None:
        self._listener.close()


# -- the attacks -----------------------------------------------------------------------------------

Script = Callable[[Link], Iterator[bytes]]
"""Yields what is to be sent, for as long as the victim is there."""


@dataclass(frozen=True)
class Attack:
    """One way to be malicious."""

    name: str
    script: Script
    codes: frozenset[int]
    """What GOAWAY may say. A flood leaves bytes unread, so that the connection's end may overtake it."""
    roles: frozenset[str] = BOTH
    greets: bool = True
    """Whether the peer begins as an honest one does."""


ATTACKS: dict[str, Attack] = {}


def attack(
    name: str, *codes: int, roles: frozenset[str] = BOTH, greets: bool = True
) -> Callable[[Script], Script]:
    def add(script: Script) -> Script:
        ATTACKS[name] = Attack(name, script, frozenset(codes), roles, greets)
        return script

    return add


def play(attack: Attack, link: Link) -> End:
    """Does what the attack's script says until the session is over, which must not last for ever."""
    if attack.greets:
        link.greet()
    script = attack.script(link)
    chunk = next(script)
    began = time.monotonic()
    if not attack.greets:
        link.listen(mute=True)
    while link.send(chunk) and time.monotonic() < began + PATIENCE:
        following = next(script, None)
        if following is None:
            break
        chunk = following
    return link.end(began)


def again(data: bytes, count: int = BURST) -> Iterator[bytes]:
    """``data`` over and over, ``count`` times at once."""
    return itertools.repeat(data * count)


def flood(name: str, data: bytes, *codes: int, roles: frozenset[str] = BOTH) -> None:
    """An attack that repeats one thing on the connection."""

    @attack(name, *codes, roles=roles)
    def script(link: Link) -> Iterator[bytes]:
        return again(data)


def once(name: str, data: bytes, *codes: int, roles: frozenset[str] = BOTH, greets: bool = True) -> None:
    """An attack that is one mistake."""

    @attack(name, *codes, roles=roles, greets=greets)
    def script(link: Link) -> Iterator[bytes]:
        yield data


def on_stream(name: str, make: Callable[[int], bytes], *codes: int, roles: frozenset[str] = BOTH) -> None:
    """An attack that repeats one thing on one open stream."""

    @attack(name, *codes, roles=roles)
    def script(link: Link) -> Iterator[bytes]:
        return again(make(link.open()))


def on_streams(name: str, make: Callable[[int], bytes], *codes: int) -> None:
    """An attack that opens stream after stream, for a malicious server."""

    @attack(name, *codes, roles=frozenset({SERVER}))
    def script(link: Link) -> Iterator[bytes]:
        for first in range(1, 1_000_000, 2 * BURST):
            yield b"".join(make(stream) for stream in range(first, first + 2 * BURST, 2))


def request(stream: int) -> bytes:
    return frame(HEADERS, REQUEST, END_HEADERS, stream)


# Streams that are opened for nothing


def overflow(stream: int) -> bytes:
    return frame(UPDATE, number(2**31 - 1), 0, stream)


def ended(stream: int) -> bytes:
    return frame(DATA, b"", END_STREAM, stream) + frame(DATA, b"x", 0, stream)


on_streams("rapid reset", lambda stream: request(stream) + frame(RST, number(8), 0, stream), CALM)
on_streams("made to reset: a window too large", lambda stream: request(stream) + overflow(stream), CALM)
on_streams("made to reset: DATA after the end", lambda stream: request(stream) + ended(stream), CALM)
on_streams("streams beyond the limit", request, CALM)


@attack("DATA on a closed stream", CALM)
def _data_on_closed(link: Link) -> Iterator[bytes]:
    stream = link.open()
    yield frame(RST, number(8), 0, stream)
    yield from again(frame(DATA, b"x", 0, stream))


@attack("RST_STREAM on a closed stream", CALM)
def _reset_of_closed(link: Link) -> Iterator[bytes]:
    stream = link.open()
    yield from again(frame(RST, number(8), 0, stream))


once("DATA on an idle stream", frame(DATA, b"x", 0, 4001), PROTOCOL_ERROR)
once("RST_STREAM on an idle stream", frame(RST, number(8), 0, 4001), PROTOCOL_ERROR)
once(
    "a stream that only the other side may open",
    request(4001),
    PROTOCOL_ERROR,
    roles=frozenset({CLIENT}),
)


@attack("DATA beyond the window", FLOW_CONTROL_ERROR)
def _beyond_the_window(link: Link) -> Iterator[bytes]:
    yield from again(frame(DATA, bytes(16384), 0, link.open()), 20)


# Frames that say nothing

flood("PING flood", frame(PING, b"12345678"), CALM)
flood("PING answers that nobody asked for", frame(PING, b"12345678", ACK), CALM)
flood("SETTINGS flood", frame(SETTINGS), CALM)
flood("SETTINGS ACK flood", frame(SETTINGS, b"", ACK), CALM)
flood("windows that change", frame(SETTINGS, struct.pack(">HLHL", 4, 1, 4, 65535)), CALM)
flood("WINDOW_UPDATE flood", frame(UPDATE, number(1)), CALM, FLOW_CONTROL_ERROR)
flood("PRIORITY flood", frame(PRIORITY, number(0) + b"\x10", 0, 1), CALM)
flood("unknown frames", frame(77, b"whatever"), CALM)
flood("GOAWAY flood", frame(GOAWAY, number(0) + number(2)), CALM, 0)
on_stream("WINDOW_UPDATE flood on a stream", lambda s: frame(UPDATE, number(1), 0, s), CALM)
on_stream("empty DATA", lambda s: frame(DATA, b"", 0, s), CALM)
on_stream("DATA of padding only", lambda s: frame(DATA, b"\x04" + bytes(4), PADDED, s), CALM)
on_stream(
    "interim answers after the answer",
    lambda s: frame(HEADERS, CONTINUE, END_HEADERS, s),
    PROTOCOL_ERROR,
    roles=frozenset({CLIENT}),
)
on_stream("repeated HEADERS", lambda s: frame(HEADERS, REQUEST, END_HEADERS, s), PROTOCOL_ERROR)


@attack("interim answers before the answer", CALM, roles=frozenset({CLIENT}))
def _interim(link: Link) -> Iterator[bytes]:
    return again(frame(HEADERS, CONTINUE, END_HEADERS, link.visited()))


@attack("settings that nobody knows", CALM)
def _unknown_settings(link: Link) -> Iterator[bytes]:
    for first in range(1000, 60_000, 1000):
        yield frame(SETTINGS, b"".join(struct.pack(">HL", code, 1) for code in range(first, first + 1000)))


# Header blocks

once("PUSH_PROMISE", frame(PUSH, number(2) + REQUEST, END_HEADERS, 1), PROTOCOL_ERROR)


@attack("CONTINUATION flood", CALM)
def _continuation(link: Link) -> Iterator[bytes]:
    more = frame(CONTINUATION, b"\x00\x01a\x01b" * 100, 0, 1)
    yield frame(HEADERS, REQUEST, 0, 1) + more * BURST  # with nothing in between
    yield from again(more)


@attack("empty CONTINUATION flood", CALM)
def _empty_continuation(link: Link) -> Iterator[bytes]:
    more = frame(CONTINUATION, b"", 0, 1)
    yield frame(HEADERS, REQUEST, 0, 1) + more * BURST
    yield from again(more)


@attack("HPACK bomb", CALM)
def _bomb(link: Link) -> Iterator[bytes]:
    stream = link.open() + (2 if link.role == SERVER else 0)
    entry = b"\x40\x01x" + b"\x7f" + bytes([0x80 | (3900 - 127) & 0x7F, (3900 - 127) >> 7]) + b"y" * 3900
    yield frame(HEADERS, REQUEST + entry + b"\xbe" * 12_000, END_HEADERS, stream)


def _block(name: str, block: bytes, *codes: int) -> None:
    @attack(name, *codes)
    def script(link: Link) -> Iterator[bytes]:
        stream = link.open() + (2 if link.role == SERVER else 0)
        yield frame(HEADERS, block, END_HEADERS, stream)


_block("an integer without end", b"\x7f" + b"\xff" * 16_000, COMPRESSION_ERROR)
_block("a table over the limit", b"\x3f\xe2\xff\x7f" + REQUEST, COMPRESSION_ERROR)
_block("an index that is not there", b"\xfe" * 10, COMPRESSION_ERROR)

# Lengths and windows

once("a frame of 16 MiB", b"\xff\xff\xff" + bytes([77, 0]) + number(0), FRAME_SIZE_ERROR)
once("a block of 16 MiB", b"\xff\xff\xff" + bytes([HEADERS, END_HEADERS]) + number(1), FRAME_SIZE_ERROR)
once("an increment of nothing", frame(UPDATE, number(0)), PROTOCOL_ERROR)
once("a window beyond the maximum", frame(UPDATE, number(2**31 - 1)), FLOW_CONTROL_ERROR)

# Peers that do not speak HTTP/2, or do not listen

once(
    "garbage instead of the greeting",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4000,
    PROTOCOL_ERROR,
    FRAME_SIZE_ERROR,
    greets=False,
)


@attack("unknown frames before the greeting", PROTOCOL_ERROR, greets=False)
def _unknown_first(link: Link) -> Iterator[bytes]:
    yield (PREFACE if link.role == SERVER else b"") + frame(77) * BURST


@attack("a flood from a peer that never reads", CALM)
def _deaf(link: Link) -> Iterator[bytes]:
    link.stop_reading()
    return again(frame(PING, b"12345678") + frame(SETTINGS))
