"""Connected sockets as the data path wants them: raw and non-blocking both ways, and what blocks on top.

:class:`PlainEnd` is also the interface of a connection over TLS, which is in ``tls.py``.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket as native
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import gevent
from gevent import socket
from gevent.hub import Hub

try:
    import fcntl
    import termios
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

USER_TIMEOUT: Final = 10_000
"""Milliseconds that sent bytes may stay unacknowledged before the kernel gives up."""

NOTSENT_LOWAT: Final = 128 * 1024
"""Bytes that the kernel queues unsent, so that a small answer is not behind megabytes."""

Buffer = bytes | bytearray | memoryview

BareSocket = _socket.socket
"""What all other sockets are made of; gevent replaces every other name that it has."""

Socket = socket.socket | BareSocket
"""A connected socket: gevent's, or a bare one."""

KEEP_ALIVE: Final = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))
"""Seconds of silence before a visitor's kernel is asked whether it is there, seconds between two such
questions, and how many of them: one that has vanished without a word, as a telephone does, is noticed in two
minutes. Go asks after 15 seconds, which keeps telephones awake."""

SHORT: Final = 4096
"""Bytes of a read that may be a head whose body waits for an acknowledgement."""

_TCP_CLOSE: Final = 7
_TCP_CLOSE_WAIT: Final = 8
"""Linux's state of one whose other side has sent its FIN."""


def tune(sock: Socket) -> None:
    """Switches off Nagle's delay (40 ms a request where both ends wait for each other)."""
    if sock.family in (native.AF_INET, native.AF_INET6):
        sock.setsockopt(native.IPPROTO_TCP, native.TCP_NODELAY, 1)


def tune_session(sock: Socket) -> None:
    """Sets what a session's socket needs besides: a deadline for acknowledgements, a short queue."""
    tune(sock)
    if sock.family not in (native.AF_INET, native.AF_INET6):
        return
    for name, value in (("TCP_USER_TIMEOUT", USER_TIMEOUT), ("TCP_NOTSENT_LOWAT", NOTSENT_LOWAT)):
        option = getattr(native, name, None)
        if option is not None:
            sock.setsockopt(native.IPPROTO_TCP, option, value)


def keep_alive(listener: Socket) -> None:
    """Has the kernel notice peers of ``listener``'s connections that vanish: these inherit its options."""
    listener.setsockopt(native.SOL_SOCKET, native.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        option = getattr(native, name, None)
        if option is not None:
            listener.setsockopt(native.IPPROTO_TCP, option, value)


def peer_name(sock: Socket) -> str:
    """The peer's address for the log: ``ip:port``, IPv6 in brackets."""
    try:
        address = sock.getpeername()
    except OSError:
        return "a peer that has left"
    if not isinstance(address, tuple):
        return "a local socket"
    host = str(address[0]).removeprefix("::ffff:")
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def acknowledged(sock: Socket) -> int | None:
    """How many bytes the peer's kernel has acknowledged on this connection; None if unknown.

    Linux tells it as ``tcpi_bytes_acked`` (64 bits at offset 120 of ``struct tcp_info``).
    """
    if not sys.platform.startswith("linux"):
        return None
    try:
        info = sock.getsockopt(native.IPPROTO_TCP, native.TCP_INFO, 128)
    except OSError:
        return None
    return int(struct.unpack_from("=Q", info, 120)[0]) if len(info) >= 128 else None


def held_up(sock: socket.socket) -> tuple[int, float]:
    """What the kernel has and may not send yet, in bytes, and the round trip it sees now, in seconds.

    That includes queues on the way. (0, 0.0) where it does not tell.
    """
    if not sys.platform.startswith("linux"):
        return 0, 0.0
    try:
        info = sock.getsockopt(native.IPPROTO_TCP, native.TCP_INFO, 148)
    except OSError:
        return 0, 0.0
    if len(info) < 148:
        return 0, 0.0
    round_trip, unsent = struct.unpack_from("=I", info, 68)[0], struct.unpack_from("=I", info, 144)[0]
    return int(unsent), float(round_trip) / 1e6


def unread(sock: Socket) -> int:
    """Bytes that have come and are not read; 0 if unknown."""
    if fcntl is None:
        return 0
    answer = fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0" * 4)
    return int(struct.unpack("=i", answer)[0])


def queued(sock: Socket) -> int:
    """Bytes handed to the kernel that the peer's has not acknowledged; 0 if unknown."""
    if fcntl is None or not sys.platform.startswith("linux"):
        return 0
    answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("=i", answer)[0])


def half_closed(sock: Socket) -> bool:
    """Whether the other side's FIN has come, read or not; False where the kernel does not tell."""
    if not sys.platform.startswith("linux") or sock.family not in (native.AF_INET, native.AF_INET6):
        return False
    return sock.getsockopt(native.IPPROTO_TCP, native.TCP_INFO, 1)[0] == _TCP_CLOSE_WAIT


def is_over(sock: Socket) -> bool:
    """Whether the kernel has given the connection up (a reset came), also if its error was read already."""
    if not sys.platform.startswith("linux") or sock.family not in (native.AF_INET, native.AF_INET6):
        return False
    return sock.getsockopt(native.IPPROTO_TCP, native.TCP_INFO, 1)[0] == _TCP_CLOSE


class Interrupted(Exception):
    """Somebody called :meth:`PlainEnd.interrupt`; the socket is as it was."""


class PlainEnd:
    """One plain socket, non-blocking underneath, blocking its greenlet where it says so.

    At most one greenlet may wait for reading and one for writing. The socket belongs to
    this object from now on: :meth:`close` and :meth:`abort` close it, and make whoever
    waits on it raise ``OSError``.
    """

    #: Whether another process can go on with the socket: nothing of the connection is kept here.
    movable = True
    #: Whether bytes were taken from the kernel that nobody has read here yet.
    holds = False
    __slots__ = ("_hub", "_raw", "_reader", "_writer", "closed", "sock")

    def __init__(self, sock: Socket) -> None:
        sock.setblocking(False)
        self.sock: Any = sock
        # The one inside gevent's wrapper, whose own methods only add a third of a microsecond.
        self._raw: Any = getattr(sock, "_sock", sock)
        self.closed = False
        self._hub: Hub = gevent.get_hub()
        self._reader: Any = None
        self._writer: Any = None

    def wait_readable(self) -> None:
        """Blocks until there is something to read, or the end of it, or an error."""
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        if self._reader is None:
            self._reader = self._hub.loop.io(self.sock.fileno(), 1)
        self._hub.wait(self._reader)

    def wait_writable(self) -> None:
        """Blocks until the kernel takes more bytes, or there is an error."""
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        if self._writer is None:
            self._writer = self._hub.loop.io(self.sock.fileno(), 2)
        self._hub.wait(self._writer)

    def interrupt(self) -> None:
        """Makes a greenlet in :meth:`wait_readable` raise :class:`Interrupted`."""
        if self._reader is not None:
            self._hub.cancel_wait(self._reader, Interrupted())

    @property
    def unread(self) -> int:
        """Bytes that have come and are not read, or about as many; 0 if unknown."""
        return unread(self.sock)

    @property
    def awaited(self) -> bool:
        """Whether a greenlet waits for something to read, and nothing has come."""
        return self._reader is not None and bool(self._reader.active) and not unread(self.sock)

    @property
    def at_end(self) -> bool:
        """Whether the end of the peer's input has come and nothing unread lies before it; reads nothing.

        Raises ``OSError`` if the connection was reset.
        """
        try:
            return not self._raw.recv(1, native.MSG_PEEK)
        except BlockingIOError:
            return False

    def check(self) -> None:
        """Raises ``OSError`` if the connection was reset, which otherwise only reading would tell."""
        if error := self.sock.getsockopt(native.SOL_SOCKET, native.SO_ERROR):
            raise OSError(error, os.strerror(error))

    def recv_now(self, view: memoryview) -> int:
        """Reads what there is: its length, 0 at the end of the input, -1 if nothing came yet."""
        try:
            return self._raw.recv_into(view)  # type: ignore[no-any-return]
        except BlockingIOError:
            return -1

    def recv(self, size: int) -> bytes:
        """Blocks for at least one byte; ``b""`` is the end of the input."""
        while True:
            self.wait_readable()
            try:
                return self._raw.recv(size)  # type: ignore[no-any-return]
            except BlockingIOError:
                continue

    def send_now(self, data: Buffer) -> int:
        """Sends what the kernel takes at once, which may be nothing; never blocks."""
        try:
            return self._raw.send(data)  # type: ignore[no-any-return]
        except BlockingIOError:
            return 0

    def sendmsg_now(self, buffers: Sequence[Buffer]) -> int:
        """As :meth:`send_now`, gathering from several buffers in one call."""
        try:
            return self._raw.sendmsg(buffers)  # type: ignore[no-any-return]
        except BlockingIOError:
            return 0

    def sendall(self, data: Buffer) -> None:
        """Blocks until the kernel has taken all of ``data``."""
        sent = self.send_now(data)
        if sent == len(data):
            return
        with memoryview(data) as view:
            while sent < len(view):
                self.wait_writable()
                sent += self.send_now(view[sent:])

    def finish_writing(self) -> None:
        """Half-closes: the peer reads the end of the input, and may go on sending."""
        if not self.closed:
            self.sock.shutdown(native.SHUT_WR)

    def close(self) -> None:
        """Closes the socket; idempotent. Waiters on it raise ``OSError``."""
        if self.closed:
            return
        self.closed = True
        self._release(self.sock.close)

    def abort(self) -> None:
        """Closes with a reset, so that the peer cannot take what it has for the whole."""
        if not self.closed:
            set_reset(self.sock)
            self.close()

    def give_up(self) -> Socket:
        """The socket, open and no longer this object's; nobody may wait on it."""
        for watcher in (self._reader, self._writer):
            if watcher is not None:
                watcher.close()
        self._reader = self._writer = None
        self.closed = True
        return self.sock  # type: ignore[no-any-return]

    def _release(self, then: Callable[[], None]) -> None:
        error = OSError(errno.EBADF, "closed by this side")
        watchers = (self._reader, self._writer)
        self._reader = self._writer = None
        self._hub.cancel_waits_close_and_then(watchers, error, then)


class PromptEnd(PlainEnd):
    """A plain socket whose short messages are acknowledged at once, where the kernel lets us.

    A service that writes head and body apart, as many written in Python do, has its kernel
    wait with the body for the acknowledgement of the head (Nagle), which ours would delay for
    40 ms on a connection that has been used before. The kernel forgets the wish, so it is
    repeated.
    """

    __slots__ = ()

    def recv_now(self, view: memoryview) -> int:
        count = super().recv_now(view)
        if 0 < count <= SHORT:
            self._raw.setsockopt(native.IPPROTO_TCP, native.TCP_QUICKACK, 1)
        return count


End = PlainEnd
"""What carries bytes: a plain socket, or what behaves like one (``tls.py``)."""


class Source(Protocol):
    """Where bytes are read from: an :data:`End`, or something that passes on what one has read.

    See :class:`PlainEnd` for what each of these does.
    """

    @property
    def unread(self) -> int: ...
    def wait_readable(self) -> None: ...
    def check(self) -> None: ...
    def recv_now(self, view: memoryview) -> int: ...
    def recv(self, size: int) -> bytes: ...


def end_of(sock: Socket | End, *, prompt: bool = False) -> End:
    """Wraps a connected socket, which belongs to the result from now on; what is wrapped already stays so.

    ``prompt`` is for connections to a service: see :class:`PromptEnd`.
    """
    if isinstance(sock, PlainEnd):
        return sock
    over_tcp = sock.family in (native.AF_INET, native.AF_INET6)
    if prompt and over_tcp and hasattr(native, "TCP_QUICKACK"):
        return PromptEnd(sock)
    return PlainEnd(sock)


def set_reset(sock: Socket) -> None:
    """Makes the next close of ``sock`` a reset (RST) instead of a clean end (FIN)."""
    try:
        sock.setsockopt(native.SOL_SOCKET, native.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass
