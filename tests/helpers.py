"""What the tests of sessions, relays and tunnels share beside ``support``.

The first half lives in the test's own hub and uses gevent's sockets explicitly: a pair of
connected sockets, a pair of sessions, a receiver that a test can wait on, a peer that speaks
HTTP/2 by hand. The second half is threads and processes for the end-to-end tests. Every wait
has a deadline.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import socket as native
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import gevent
import psutil
import trustme
from gevent import socket, ssl
from gevent.event import Event
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame
from support import DEADLINE

from tinytun_gevent.errors import SessionError
from tinytun_gevent.session import Session
from tinytun_gevent.sockets import End, PlainEnd
from tinytun_gevent.stream import Stream
from tinytun_gevent.tls import TlsEnd
from tinytun_gevent.wire.http2 import PREFACE

MIB = 1024 * 1024
REPO = Path(__file__).resolve().parent.parent

ORIGINAL_REQUEST = bytes.fromhex("828684")
"""``:method GET``, ``:scheme http``, ``:path /``: how the original's server opens a stream."""


# -- in the test's own hub -------------------------------------------------------------------------


@contextlib.contextmanager
def deadline(seconds: float = DEADLINE) -> Iterator[None]:
    """Fails what takes longer, in the greenlet that enters it."""
    with gevent.Timeout(seconds, AssertionError(f"not done within {seconds:g} s")):
        yield


def wait_until(predicate: Callable[[], object], what: str = "", seconds: float = DEADLINE) -> None:
    """Lets the hub run until ``predicate`` is true; fails after ``seconds``."""
    until = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < until, f"not within {seconds:g} s: {what or predicate}"
        gevent.sleep(0.0005)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets of gevent."""
    with socket.socket(native.AF_INET, native.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = socket.socket(native.AF_INET, native.SOCK_STREAM)
        one.settimeout(DEADLINE)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    other.settimeout(DEADLINE)
    return one, other


class Inbox:
    """A receiver that keeps what comes. With ``hold`` it takes nothing off the window."""

    def __init__(self, stream: Stream, *, hold: bool = False) -> None:
        self.stream = stream
        self.hold = hold
        self.received = bytearray()
        self.ended = False
        self.error: SessionError | None = None
        stream.receiver = self

    def data(self, view: memoryview) -> None:
        assert not self.over, "data after the end"
        self.received += view
        if not self.hold:
            self.stream.consumed(len(view))

    def eof(self) -> None:
        assert not self.over, "two ends"
        self.ended = True

    def aborted(self, error: SessionError) -> None:
        assert self.error is None, "aborted twice"
        self.error = error

    @property
    def over(self) -> bool:
        return self.ended or self.error is not None

    def wait(self, count: int) -> bytes:
        """Blocks until ``count`` bytes are there."""
        wait_until(lambda: len(self.received) >= count or self.over, f"{count} bytes")
        assert len(self.received) >= count, f"only {len(self.received)} of {count} bytes: {self.error!r}"
        return bytes(self.received)

    def wait_end(self) -> bytes:
        """Blocks until the peer's half has ended; everything it sent."""
        wait_until(lambda: self.over, "the end of the stream")
        assert self.error is None, repr(self.error)
        return bytes(self.received)

    def wait_error(self) -> SessionError:
        """Blocks until the stream was aborted; why."""
        wait_until(lambda: self.error is not None, "an abort")
        assert self.error is not None
        return self.error

    def release(self) -> None:
        """Takes from now on, and gives back what was held."""
        self.hold = False
        self.stream.consumed(self.stream.receive_window.undelivered)


class Pair:
    """Two sessions over one connection: ``opener`` is the tunnel server's end."""

    def __init__(self, opener: Session, acceptor: Session) -> None:
        self.opener = opener
        self.acceptor = acceptor
        #: Streams that the acceptor got, each with an Inbox for a receiver.
        self.accepted: deque[Inbox] = deque()
        self._answer = True
        self._hold = False

    def on_stream(self, stream: Stream) -> None:
        self.accepted.append(Inbox(stream, hold=self._hold))
        if self._answer:
            stream.accept()

    def open(self, *, hold: bool = False, hold_here: bool = False) -> tuple[Inbox, Inbox]:
        """A new stream, both ends of it; with ``hold`` the accepting end takes nothing."""
        self._hold = hold
        count = len(self.accepted)
        stream = Inbox(self.opener.open(), hold=hold_here)
        self.opener.flush()
        wait_until(lambda: len(self.accepted) > count, "the stream at the other end")
        return stream, self.accepted[-1]


@contextlib.contextmanager
def session_pair(
    max_streams: int = 100, sockets: tuple[socket.socket | End, socket.socket | End] | None = None
) -> Iterator[Pair]:
    """Two sessions that have greeted each other; both are closed at the end."""
    one, other = sockets or socket_pair()
    opener = Session(one, opener=True)
    pair = Pair(opener, Session(other, opener=False, max_streams=max_streams))
    pair.acceptor = acceptor = Session(
        other, opener=False, max_streams=max_streams, on_stream=lambda stream: pair.on_stream(stream)
    )
    try:
        with deadline():
            gevent.joinall(
                [gevent.spawn(opener.start), gevent.spawn(acceptor.start)], raise_error=True, count=2
            )
        yield pair
    finally:
        opener.close()
        acceptor.close()


class RawPeer:
    """The other end of a session, spoken by hand: frames in, frames out, rules optional."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""

    def send(self, *frames: Frame | bytes) -> None:
        self.sock.sendall(b"".join(f if isinstance(f, bytes) else f.serialize() for f in frames))

    def greet(self, *, client: bool, settings: dict[int, int] | None = None) -> None:
        """The preface (as HTTP/2's ``client``) and SETTINGS."""
        self.send(PREFACE if client else b"", SettingsFrame(0, settings or {}))

    def next(self) -> Frame | None:
        """The next frame, None at the end of the connection. Skips the other side's preface."""
        if self._buffer.startswith(b"PRI"):
            self._fill(len(PREFACE))
            self._buffer = self._buffer[len(PREFACE) :]
        if not self._fill(9):
            return None
        if self._buffer.startswith(b"PRI"):
            return self.next()
        frame, length = Frame.parse_frame_header(memoryview(self._buffer[:9]))
        if not self._fill(9 + length):
            return None
        frame.parse_body(memoryview(self._buffer[9 : 9 + length]))
        self._buffer = self._buffer[9 + length :]
        return frame

    def wait(self, kind: type[Any], stream_id: int | None = None, *, ack: bool = False) -> Any:
        """The next frame of that kind; answers PINGs and SETTINGS on the way."""
        while (frame := self.next()) is not None:
            self._answer(frame)
            if (
                isinstance(frame, kind)
                and stream_id in (None, frame.stream_id)
                and ack == ("ACK" in frame.flags)
            ):
                return frame
        raise AssertionError(f"the connection ended before {kind.__name__}")

    def wait_goaway(self) -> GoAwayFrame:
        return self.wait(GoAwayFrame)  # type: ignore[no-any-return]

    def wait_end(self) -> None:
        """Reads to the end of the connection, which may be a reset."""
        with contextlib.suppress(ConnectionResetError):
            while self.next() is not None:
                pass

    def _answer(self, frame: Frame) -> None:
        if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
            answer = PingFrame(0, frame.opaque_data)
        elif isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            answer = SettingsFrame(0)
        else:
            return
        answer.flags.add("ACK")
        with contextlib.suppress(OSError):
            self.send(answer)

    def _fill(self, count: int) -> bool:
        while len(self._buffer) < count:
            data = self.sock.recv(65536)
            if not data:
                return False
            self._buffer += data
        return True


def headers_frame(stream_id: int, block: bytes = ORIGINAL_REQUEST, *flags: str) -> HeadersFrame:
    frame = HeadersFrame(stream_id, block)
    for flag in ("END_HEADERS", *flags):
        frame.flags.add(flag)
    return frame


def data_frame(stream_id: int, payload: bytes, *flags: str, padding: int | None = None) -> DataFrame:
    frame = DataFrame(stream_id, payload, pad_length=padding or 0)
    for flag in flags if padding is None else (*flags, "PADDED"):
        frame.flags.add(flag)
    return frame


@contextlib.contextmanager
def raw_peer(
    *, opener: bool, max_streams: int = 100, start: bool = True
) -> Iterator[tuple[Session, RawPeer, Pair]]:
    """A session of ours (the ``opener`` or the other side) and a peer spoken by hand."""
    ours, theirs = socket_pair()
    pair = Pair(None, None)  # type: ignore[arg-type]
    session = Session(ours, opener=opener, max_streams=max_streams, on_stream=pair.on_stream)
    pair.opener = pair.acceptor = session
    session.keep_alive.probes = 0  # one PING at the start is all that a test has to answer
    peer = RawPeer(theirs)
    try:
        if start:
            starting = gevent.spawn(session.start)
            peer.greet(client=not opener, settings={3: 100} if opener else None)
            with deadline():
                peer.wait(SettingsFrame, ack=True)
                starting.get()
        yield session, peer, pair
    finally:
        session.close()
        theirs.close()


class Wire:
    """A TCP relay inside the test's hub: cut, black-holed, or limited at will.

    Connect to ``port``; everything goes to ``target``, at most ``rate`` bytes a second each way. A
    limited one holds little itself, as a line does: what it does not take waits at the sender.
    """

    def __init__(self, target: int, *, rate: float | None = None) -> None:
        self._target = target
        self._rate = rate
        self._flowing = Event()
        self._flowing.set()
        self._socks: list[socket.socket] = []
        self._listener = self._socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(16)
        self.port: int = self._listener.getsockname()[1]
        self._greenlets = [gevent.spawn(self._accept)]

    def _socket(self) -> socket.socket:
        sock = socket.socket(native.AF_INET, native.SOCK_STREAM)
        if self._rate is not None:
            sock.setsockopt(native.SOL_SOCKET, native.SO_RCVBUF, 64 * 1024)
            sock.setsockopt(native.SOL_SOCKET, native.SO_SNDBUF, 64 * 1024)
        return sock

    def black_hole(self) -> None:
        """Forwards nothing from now on, and says nothing of it."""
        self._flowing.clear()

    def heal(self) -> None:
        self._flowing.set()

    def close(self) -> None:
        gevent.killall(self._greenlets)
        for sock in [self._listener, *self._socks]:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = self._socket()
            far.connect(("127.0.0.1", self._target))
            self._socks += [near, far]
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(native.IPPROTO_TCP, native.TCP_NODELAY, 1)
                self._greenlets.append(gevent.spawn(self._pump, source, sink))

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        size = 65536 if self._rate is None else max(1024, int(self._rate / 50))
        due = time.monotonic()
        with contextlib.suppress(OSError):
            while data := source.recv(size):
                self._flowing.wait()
                if self._rate is not None:
                    due = max(due, time.monotonic() - 0.05) + len(data) / self._rate
                    gevent.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)
            sink.shutdown(native.SHUT_WR)


def greenlet_count() -> int:
    """Greenlets of this process that have begun and not ended."""
    gc.collect()
    return sum(1 for item in gc.get_objects() if isinstance(item, gevent.Greenlet) and bool(item))


def fd_count() -> int:
    return int(psutil.Process().num_fds())


# -- processes -------------------------------------------------------------------------------------


class Process:
    """One of the two commands, started as a user starts it; its output is read by threads."""

    def __init__(self, *argv: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> None:
        """``prefix`` is a command that becomes the one behind it, such as ``nsenter``."""
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        environment |= {"PYTHONUNBUFFERED": "1"} | (env or {})
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, str(REPO / "bin" / argv[0]), *argv[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=REPO,
            text=True,
            start_new_session=True,
        )
        self.pid = self.popen.pid
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        for pipe, lines in ((self.popen.stdout, self.stdout), (self.popen.stderr, self.stderr)):
            threading.Thread(target=self._collect, args=(pipe, lines), daemon=True).start()

    def wait_line(
        self, pattern: str, *, stderr: bool = True, seconds: float = DEADLINE, skip: int = 0
    ) -> str:
        """Blocks until a line (after ``skip`` matching ones) matches; fails when the process ends first."""
        lines = self.stderr if stderr else self.stdout
        matching = re.compile(pattern)
        until = time.monotonic() + seconds
        while True:
            found = [line for line in list(lines) if matching.search(line)]
            if len(found) > skip:
                return found[skip]
            assert self.popen.poll() is None, f"ended with {self.popen.poll()}: {self.tail()}"
            assert time.monotonic() < until, f"no {pattern!r} within {seconds:g} s: {self.tail()}"
            time.sleep(0.01)

    def tail(self) -> str:
        return "".join(self.stdout[-5:] + self.stderr[-15:])

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def tree(self) -> list[psutil.Process]:
        """The process and what it has started."""
        parent = psutil.Process(self.pid)
        return [parent, *parent.children(recursive=True)]

    def rss(self) -> int:
        """Resident bytes of the largest process of the tree."""
        return max(process.memory_info().rss for process in self.tree())

    def kill(self) -> None:
        """SIGKILL for the whole tree; returns when it is gone."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.tree():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.popen.wait(DEADLINE)

    def stop(self) -> int:
        """SIGTERM, and the exit code; SIGKILL if that takes too long."""
        if self.popen.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self.kill()

    @staticmethod
    def _collect(pipe: Any, lines: list[str]) -> None:
        with pipe:
            for line in pipe:
                lines.append(line)


# -- TLS --------------------------------------------------------------------------------------------


def tls_contexts(authority: trustme.CA) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's, for ``localhost``."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    return server, client


def tls_ends(authority: trustme.CA) -> tuple[TlsEnd, TlsEnd]:
    """A server's and a client's end of one connection, both ours; the handshake is over."""
    one, other = socket_pair()
    server, client = tls_contexts(authority)
    ends = TlsEnd(PlainEnd(one), server, server_side=True), TlsEnd(PlainEnd(other), client, host="localhost")
    with deadline():
        gevent.joinall([gevent.spawn(end.handshake) for end in ends], raise_error=True)
    return ends


def tls_pair(authority: trustme.CA) -> tuple[TlsEnd, ssl.SSLSocket]:
    """A server's end of ours, and gevent's own TLS socket at the other side."""
    one, other = socket_pair()
    server, client = tls_contexts(authority)
    end = TlsEnd(PlainEnd(one), server, server_side=True)
    shaking = gevent.spawn(client.wrap_socket, other, server_hostname="localhost")
    with deadline():
        end.handshake()
        sock = shaking.get()
        end.sendall(b"!")
        assert sock.recv(1) == b"!"  # behind session tickets, which unread would make a close a reset
    return end, sock
