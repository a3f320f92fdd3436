"""Two ends, both directions: a stream of a session on one side, a socket on the other.

Half-close travels, an abort stays an abort: FIN becomes END_STREAM and RST becomes
RST_STREAM, and the other way round. What came before an abort is delivered before it.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import ClassVar, Final

import gevent
from gevent.event import Event

from tinytun_gevent import sockets
from tinytun_gevent.errors import SessionError, StreamResetError
from tinytun_gevent.rate import Rate
from tinytun_gevent.sockets import End, Interrupted, Source
from tinytun_gevent.stream import CANCEL, LOOK, Gate, Stream, Upstream

GATHER: Final = 64
"""Buffers sent in one system call at most, well under every platform's IOV_MAX."""

JOIN: Final = 16 * 1024
"""Bytes up to which what waits is kept in one piece: a piece of one byte takes a hundred."""

LAST_WORDS: Final = 1.0
"""Seconds to pass on what came from a socket that takes no more bytes: a service that answers 413
and closes has said so before its reset."""


LAST_DELIVERY: Final = 0.5
"""Seconds for a local service to take what came from a visitor that has left: it is to be told within one."""

FIRST_LOOK: Final = 0.002
"""Seconds after which the kernel is asked whether the peer has acknowledged everything; no event tells it."""

LONGEST_LOOK: Final = 0.25
"""… and at most, for each look waits twice as long as the one before."""


class SocketSink:
    """Delivers a stream's bytes to a socket; by itself it is the receiver of that stream.

    The session's reader writes at once what the kernel takes; only the rest is copied, and
    a greenlet that lives as long as there is a rest sends it in blocking style. Credit goes
    to the peer as bytes are delivered, so the backlog never exceeds the stream's window.

    After an abort by the peer the backlog is still delivered, at the socket's pace, and then the
    socket is reset, so that what arrived cannot be taken for the whole (:meth:`cut`).

    Without a socket yet (the local service is being dialed) everything is backlog. A visitor
    of the HTTP edge keeps one sink and sets ``stream`` anew for each exchange.
    """

    #: Seconds for the delivery of what is left after an abort; None: whoever owns the socket has the limit.
    last_delivery: ClassVar[float | None] = None

    __slots__ = (
        "_backlog",
        "_cut",
        "_draining",
        "_ended",
        "_eof",
        "_owed",
        "_settled",
        "end",
        "on_drained",
        "on_lost",
        "rate",
        "refused",
        "stream",
        "waits_turn",
    )

    def __init__(self, stream: Upstream | None = None, end: End | None = None) -> None:
        #: Who gets credit for what is delivered.
        self.stream = stream
        self.end = end
        #: Called when the socket takes no more; by default the stream is reset.
        self.on_lost: Callable[[], None] = self._reset_stream
        #: Called when a backlog has been delivered.
        self.on_drained: Callable[[], None] | None = None
        #: Set by a subclass when the socket is to go on with another stream.
        self.refused = False
        #: What limits how fast bytes are delivered, and those that the socket sends; None if nothing does.
        self.rate: Rate | None = None
        #: Whether it is that limit that is waited for, and not the socket.
        self.waits_turn = False
        #: What waits, in pieces, each with the credit that it still stands for.
        self._backlog: deque[tuple[bytearray | memoryview, int]] = deque()
        #: The credit for all that waits, but for the first so many pieces, for which it was given already.
        self._owed = 0
        self._settled = 0
        self._draining = False
        self._eof = False
        self._cut = False
        self._ended: Event | bool = False

    @property
    def idle(self) -> bool:
        """Whether everything written so far was delivered."""
        return not self._draining and not self._backlog

    @property
    def done(self) -> bool:
        """Whether nothing more will be delivered: all of it was, or the rest was dropped."""
        return self._ended is True

    @property
    def cutting(self) -> bool:
        """Whether what is left is being delivered before the socket is reset."""
        return self._cut and self._ended is not True

    def waiting(self, limit: int) -> bytes:
        """The first ``limit`` bytes of what was not delivered yet."""
        begun = bytearray()
        for piece, _ in self._backlog:
            begun += piece[: limit - len(begun)]
            if len(begun) >= limit:
                break
        return bytes(begun)

    def wait_done(self, timeout: float | None = None) -> bool:
        """Blocks until :attr:`done`, for ``timeout`` seconds at most; whether it is."""
        if self._ended is True:
            return True
        if self._ended is False:
            self._ended = Event()
        return bool(self._ended.wait(timeout))

    def attach(self, end: End) -> None:
        """Gives the socket later than the first bytes."""
        self.end = end
        self._start_draining()
        self._finish_if_idle()

    def data(self, view: memoryview) -> None:
        self.write(view, len(view))

    def eof(self) -> None:
        self.finish()

    def aborted(self, error: SessionError) -> None:
        if isinstance(error, StreamResetError) and not error.remote:
            self.abort()
        else:
            self.cut()

    def abort(self) -> None:
        """Drops what is left and resets the socket. Idempotent, never blocks."""
        self._drop()
        self._set_done()
        if self.end is not None:
            self.end.abort()

    def cut(self) -> None:
        """Delivers what is left of an aborted stream, and then resets the socket. Idempotent, never blocks.

        A reset makes the kernels drop what they hold, so it waits until the peer's has acknowledged
        everything. What waits here still counts as the session's backlog; it is dropped if that is over its
        limit.
        """
        if self._ended is True or self._cut:
            return
        end = self.end
        done = end is None or end.closed or (self.idle and not sockets.queued(end.sock))
        if done or not self.keep():
            self.abort()
            return
        self._cut = True
        if self.last_delivery is not None:
            gevent.spawn_later(self.last_delivery, self.abort)
        if not self._draining:
            self._draining = True
            gevent.spawn(self._drain)

    def keep(self) -> bool:
        """Says that what waits is to be delivered although the stream is aborted; False if it is too much."""
        return self.stream is None or self.stream.keep(self._owed)

    def part(self) -> None:
        """Leaves its stream: what still waits is delivered, and credited to nobody, least the next one."""
        if self.cutting:
            return
        self._give(self._take_credit())
        self.stream = None

    def _take_credit(self) -> int:
        """The credit for all that waits, which will not be given again."""
        owed, self._owed = self._owed, 0
        self._settled = len(self._backlog)
        return owed

    def _pop(self) -> tuple[bytearray | memoryview, int]:
        """Takes the first piece that waits, and what is still owed for it."""
        piece, credit = self._backlog.popleft()
        if self._settled:
            self._settled -= 1
            return piece, 0
        self._owed -= credit
        return piece, credit

    def _put_back(self, rest: memoryview, credit: int) -> None:
        """Puts back what was not sent of the first piece."""
        self._backlog.appendleft((rest, credit))
        self._owed += credit
        if not credit:
            self._settled += 1

    def _append(self, data: bytes | memoryview, credit: int) -> None:
        """Adds to what waits; to its last piece, if that is short and unsent."""
        self._owed += credit
        if len(self._backlog) > self._settled:
            piece, before = self._backlog[-1]
            if isinstance(piece, bytearray) and len(piece) + len(data) <= JOIN:
                piece += data
                self._backlog[-1] = piece, before + credit
                return
        self._backlog.append((bytearray(data), credit))

    def write(self, data: bytes | memoryview, credit: int) -> None:
        """Delivers bytes, now or as soon as the socket takes them. Never blocks.

        ``credit`` is how many received bytes they stand for: a rewritten head has another length.
        """
        if self._ended is True or self._cut:
            return
        if not len(data):  # sending it would never make progress
            self._give(credit)
            return
        if (
            not self._backlog
            and not self._draining
            and self.end is not None
            and (self.rate is None or self.rate.take_now(len(data)))
        ):
            try:
                sent = self.end.send_now(data)
            except OSError:
                self._lost()
                return
            if sent == len(data):
                self._give(credit)
                return
            if self.rate is not None:
                self.rate.refund(len(data) - sent)
            given = min(sent, credit)
            self._give(given)
            credit -= given
            data = data[sent:]
        self._append(data, credit)
        self._start_draining()

    def finish(self) -> None:
        """Half-closes the socket once everything is delivered."""
        self._eof = True
        self._finish_if_idle()

    def _give(self, credit: int) -> None:
        if credit and self.stream is not None:
            self.stream.consumed(credit)

    def _start_draining(self) -> None:
        if self._backlog and not self._draining and self.end is not None:
            self._draining = True
            gevent.spawn(self._drain)

    def _drain(self) -> None:
        assert self.end is not None
        try:
            while self._backlog:
                if self.rate is None:
                    self._send_some(self.end)
                else:
                    self._send_turn(self.end, self.rate)
            if self._cut:
                _wait_acknowledged(self.end)
        except OSError:
            self._draining = False
            self._lost()
            return
        self._draining = False
        if self._cut:
            self.abort()
            return
        self._finish_if_idle()
        if self.on_drained is not None:
            self.on_drained()

    def _send_some(self, end: End) -> None:
        """Sends from the front of the backlog; blocks until the kernel takes something."""
        sent = end.sendmsg_now([piece for piece, _ in islice(self._backlog, GATHER)])
        if not sent:
            end.wait_writable()
            return
        given = 0
        while sent:
            piece, credit = self._pop()
            if len(piece) > sent:
                part = min(sent, credit)
                self._put_back(memoryview(piece)[sent:], credit - part)
                given += part
                break
            sent -= len(piece)
            given += credit
        self._give(given)

    def _send_turn(self, end: End, rate: Rate) -> None:
        """Sends from the front of the backlog as much as a turn allows; blocks for it, and for the kernel."""
        self.waits_turn = True
        try:
            granted = rate.take(len(self._backlog[0][0]))
        finally:
            self.waits_turn = False
        if not self._backlog:  # dropped meanwhile
            rate.refund(granted)
            return
        piece, credit = self._pop()
        count = min(granted, len(piece))
        sent = end.send_now(memoryview(piece)[:count])
        rate.refund(granted - sent)
        given = credit if sent == len(piece) else min(sent, credit)
        if sent < len(piece):
            self._put_back(memoryview(piece)[sent:], credit - given)
        self._give(given)
        if not sent:
            end.wait_writable()

    def _finish_if_idle(self) -> None:
        if not self._eof or self._cut or not self.idle or self.end is None or self._ended is True:
            return
        try:
            self.end.finish_writing()
        except OSError:
            pass
        self._set_done()

    def _set_done(self) -> None:
        waiting, self._ended = self._ended, True
        if isinstance(waiting, Event):
            waiting.set()

    def _lost(self) -> None:
        if self._ended is not True:
            self._set_done()
            self.on_lost()
            self._drop()

    def _drop(self) -> None:
        """Gives up what waits; it counts as delivered where the stream is over but not aborted."""
        self._give(self._take_credit())
        self._backlog.clear()
        self._settled = 0

    def _reset_stream(self) -> None:
        if self.stream is not None:
            self.stream.reset(CANCEL)


class ServiceSink(SocketSink):
    """Delivers a stream's bytes to the local service."""

    last_delivery = LAST_DELIVERY
    __slots__ = ()


def _wait_acknowledged(end: End) -> None:
    """Blocks until the peer's kernel has all bytes that ours was given. Raises ``OSError`` if it will not."""
    pause = FIRST_LOOK
    while not end.closed and sockets.queued(end.sock):
        end.check()
        if sockets.is_over(end.sock):  # whoever reads may have taken the error, which the kernel tells once
            raise ConnectionResetError(errno.ECONNRESET, "the peer has reset the connection")
        gevent.sleep(pause)
        pause = min(2 * pause, LONGEST_LOOK)


def relay(stream: Upstream, sink: SocketSink, gate: Gate | None = None) -> None:
    """Moves bytes both ways until both directions have ended; blocks, then closes the socket.

    ``sink`` is the stream's receiver, with its socket attached; ``gate`` is shown what the
    socket sends (:meth:`Stream.send_from`). Raises nothing: an abort on
    one side has become an abort on the other, behind what came before it. A socket whose
    stream was ``refused`` stays open for another one.
    """
    end = sink.end
    assert end is not None
    lost = False

    def last_words() -> None:
        """The socket takes no more, but may have sent an answer: there is a moment to pass it on."""
        nonlocal lost
        lost = True
        gevent.spawn_later(LAST_WORDS, _end_lost, stream, end)

    sink.on_lost = last_words
    try:
        while send_some(stream, end, sink.rate, 0, gate):
            pass
        if not lost:
            stream.shutdown()
        while not sink.wait_done(LOOK):
            end.check()  # nobody reads any more, so nothing else would tell of a reset
        if sink.refused:
            return
        if lost:
            raise ConnectionResetError(errno.ECONNRESET, "the socket takes no more")
    except (SessionError, Interrupted):
        if sink.refused:
            return
        try:
            if sink.cutting:
                sink.wait_done()
        finally:
            end.abort()
    except OSError:
        stream.reset(CANCEL)
        end.abort()
    except BaseException:
        stream.reset(CANCEL)
        end.abort()
        raise
    end.close()


def _end_lost(stream: Upstream, end: End) -> None:
    """Resets the stream of a socket that takes no more bytes, when what that had sent has been passed on.

    What a service had sent is passed on to its last byte, as fast as its visitor takes it.
    """
    if stream.answers and not stream.closed and not end.closed and end.unread:
        gevent.spawn_later(LAST_WORDS, _end_lost, stream, end)
    else:
        stream.reset(CANCEL)


def pump(stream: Upstream, source: Source, gate: Gate | None = None, rate: Rate | None = None) -> None:
    """Moves what ``source`` has to the stream until it ends, then half-closes the stream."""
    while send_some(stream, source, rate, 0, gate):
        pass
    stream.shutdown()


def send_some(stream: Upstream, source: Source, rate: Rate | None, limit: int, gate: Gate | None) -> int:
    """As :meth:`Stream.send_from`, not faster than ``rate``: until its turn nothing is read. Blocks."""
    if rate is None:
        return stream.send_from(source, limit, gate)
    source.wait_readable()
    if isinstance(stream, Stream):
        stream.wait_window(source)  # whoever cannot send takes no turn
    there = source.unread or 1
    granted, moved = rate.take(min(there, limit) if limit else there), 0
    try:
        moved = stream.send_from(source, granted, gate)
    finally:
        rate.refund(granted - moved)
    return moved
