"""Two ends, both directions: a stream of a session on one side, a socket on the other.

Half-close travels, an abort stays an abort: FIN becomes END_STREAM and RST becomes
RST_STREAM, and the other way round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import Event

from tinytun_gevent.errors import SessionError
from tinytun_gevent.sockets import End
from tinytun_gevent.stream import CANCEL, Stream

GATHER: Final = 64
"""Buffers sent in one system call at most, well under every platform's IOV_MAX."""


class SocketSink:
    """Delivers a stream's bytes to a socket: the receiver of that stream.

    The session's reader writes at once what the kernel takes; only the rest is copied, and
    a greenlet that lives as long as there is a rest sends it in blocking style. Credit goes
    to the peer as bytes are delivered, so the backlog never exceeds the stream's window.

    Without a socket yet (the local service is being dialed) everything is backlog.
    """

    __slots__ = ("_backlog", "_draining", "_eof", "_on_lost", "done", "end", "stream")

    def __init__(self, stream: Stream, end: End | None = None, on_lost: Callable[[], None] | None = None):
        """``on_lost`` is called when the socket takes no more; without it the stream is reset."""
        self.stream = stream
        self.end = end
        #: Set when nothing more will be delivered: all of it was, or the rest was dropped.
        self.done = Event()
        self._on_lost = on_lost
        self._backlog: deque[bytes] = deque()
        self._draining = False
        self._eof = False

    def attach(self, end: End) -> None:
        """Gives the socket later than the first bytes."""
        self.end = end
        self._start_draining()
        self._finish_if_idle()

    # Receiver

    def data(self, view: memoryview) -> None:
        self.write(view)

    def eof(self) -> None:
        self.finish()

    def aborted(self, error: SessionError) -> None:
        self._backlog.clear()
        self.done.set()
        if self.end is not None:
            self.end.abort()

    # For receivers that transform what passes

    def write(self, view: bytes | memoryview) -> None:
        """Delivers bytes of the stream, now or as soon as the socket takes them."""
        if self.done.is_set():
            return
        if not self._backlog and not self._draining and self.end is not None:
            try:
                sent = self.end.send_now(view)
            except OSError:
                self._lost()
                return
            if sent:
                self.stream.consumed(sent)
            if sent == len(view):
                return
            view = view[sent:]
        self._backlog.append(bytes(view))
        self._start_draining()

    def finish(self) -> None:
        """Half-closes the socket once everything is delivered."""
        self._eof = True
        self._finish_if_idle()

    def _start_draining(self) -> None:
        if self._backlog and not self._draining and self.end is not None:
            self._draining = True
            gevent.spawn(self._drain)

    def _drain(self) -> None:
        assert self.end is not None
        try:
            while self._backlog:
                self._send_some(self.end)
        except OSError:
            self._lost()
        finally:
            self._draining = False
        self._finish_if_idle()

    def _send_some(self, end: End) -> None:
        """Sends from the front of the backlog; blocks until the kernel took something."""
        if not end.direct:
            piece = self._backlog.popleft()
            end.sendall(piece)
            self.stream.consumed(len(piece))
            return
        pieces = [self._backlog[i] for i in range(min(len(self._backlog), GATHER))]
        sent = end.sendmsg_now(pieces)
        if not sent:
            end.wait_writable()
            return
        left = sent
        while left:
            piece = self._backlog.popleft()
            if len(piece) > left:
                self._backlog.appendleft(piece[left:])
                left = 0
            else:
                left -= len(piece)
        self.stream.consumed(sent)

    def _finish_if_idle(self) -> None:
        if not self._eof or self._backlog or self._draining or self.end is None or self.done.is_set():
            return
        try:
            self.end.finish_writing()
        except OSError:
            pass
        self.done.set()

    def _lost(self) -> None:
        self._backlog.clear()
        self.done.set()
        if self._on_lost is not None:
            self._on_lost()
        else:
            self.stream.reset(CANCEL)


def relay(stream: Stream, sink: SocketSink) -> None:
    """Moves bytes both ways until both directions have ended; blocks, then closes the socket.

    ``sink`` is the stream's receiver, with its socket attached. Raises nothing: an abort on
    one side has become an abort on the other.
    """
    end = sink.end
    assert end is not None
    try:
        pump(stream, end)
        sink.done.wait()
    except SessionError:
        end.abort()
    except OSError:
        stream.reset(CANCEL)
        end.abort()
    except BaseException:
        stream.reset(CANCEL)
        end.abort()
        raise
    end.close()


def pump(stream: Stream, source: End) -> None:
    """Moves what ``source`` has to the stream until it ends, then half-closes the stream."""
    while stream.send_from(source):
        pass
    stream.shutdown()
