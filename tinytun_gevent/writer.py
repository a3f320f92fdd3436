"""The sending half of a session: control frames first, then DATA, one sender at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import Event

from tinytun_gevent.errors import SessionClosedError
from tinytun_gevent.sockets import Buffer, End, Source
from tinytun_gevent.turns import TurnLock
from tinytun_gevent.wire import http2

CHUNK: Final = 256 * 1024
"""DATA bytes sent at one turn when nobody else wants one."""

SHARED_CHUNK: Final = 64 * 1024
"""… and when somebody does, or something small was sent a moment ago: the next small answer is not to
wait behind a long turn. Bulk beside bulk has long turns; short ones cost it half as much CPU again."""

MOMENT: Final = 0.05
"""Seconds for which something small is expected to be followed by more."""

CONTROL_LIMIT: Final = 64 * 1024
"""Bytes of control frames that may wait unsent before the session stops reading."""

SMALL: Final = 16 * 1024
"""DATA bytes that are copied behind what is queued, to leave with others in one system call."""

JOIN_LIMIT: Final = 32 * 1024
"""Queued bytes to which more DATA is added; with :data:`SMALL` below :data:`CONTROL_LIMIT`,
so that what waits here because of visitors never stops the reader."""

_scratch: list[bytearray] = []
"""Buffers for one frame each; as many as senders were ever blocked at once."""


class Writer:
    """Owns the order of what a session's socket sends.

    The session's reader must never wait here: it calls :meth:`control` only, which queues
    and sends what the kernel takes at once. With a reader that waited for the lock, both
    ends deadlocked under load in both directions. What could not be sent goes out before
    the next DATA frame, or by a greenlet that lives as long as there is something left.
    """

    def __init__(self, end: End, failed: Callable[[OSError], None]) -> None:
        """``failed`` is called once when the socket cannot be written to any more."""
        self._end = end
        self._failed = failed
        self._control = bytearray()
        self._lock = TurnLock()
        self._drained = Event()
        self._loop = gevent.get_hub().loop
        #: Until when something small is expected beside what is long.
        self._brisk_until = 0.0
        self._flush_due = False
        #: Bytes handed to the kernel so far, and those that a frame under way still holds.
        self.sent = 0
        self.unsent = 0
        #: A sender was stopped inside a frame: whatever came next would be taken for its rest.
        self._torn = False

    @property
    def pending(self) -> int:
        """Bytes that wait: control frames, and small DATA frames on their way."""
        return len(self._control)

    @property
    def is_stuck(self) -> bool:
        """Whether more than :data:`CONTROL_LIMIT` bytes of control frames wait."""
        return len(self._control) > CONTROL_LIMIT

    def queue(self, frames: Buffer) -> None:
        """Queues whole control frames, to go with whatever is sent next. Never blocks."""
        self._control += frames

    def control(self, frames: Buffer = b"") -> None:
        """Queues whole control frames and sends what the kernel takes now. Never blocks."""
        if frames:
            self._control += frames
        if self._control and not self._lock.held:
            self._lock.held = True
            self._release()

    def soon(self, frames: Buffer = b"") -> None:
        """As :meth:`control`, when all greenlets that are ready now have run: one call for many frames."""
        self._control += frames
        if not self._flush_due:
            self._flush_due = True
            self._loop.run_callback(self._flush)

    def wait_drained(self, patience: float | None = None) -> bool:
        """Blocks while more than :data:`CONTROL_LIMIT` bytes of control frames wait.

        False after ``patience`` seconds within which they did not leave.
        """
        while self.is_stuck:
            self._drained.clear()
            if not self._drained.wait(patience) and self.is_stuck:
                return False
        return True

    def wait_empty(self) -> None:
        """Blocks until all that is queued or half sent is with the kernel, or cannot be sent."""
        self._wait_turn()
        self._drain()

    @property
    def takes_small(self) -> bool:
        """Whether :meth:`join` may be called."""
        return not self._lock.held and self._may_join()

    def join(self, stream_id: int, payload: Buffer) -> None:
        """Queues one DATA frame of at most :data:`SMALL` bytes, to leave with others like it. Never blocks.

        It goes when this round of the event loop is over; call it only while :attr:`takes_small`.
        """
        self._brisk_until = self._loop.now() + MOMENT
        control = self._control
        control += http2.data_head(len(payload), stream_id)
        control += payload
        if not self._flush_due:
            self._flush_due = True
            self._loop.run_callback(self._flush)

    def send_data(self, stream_id: int, payload: memoryview, allow: Callable[[int], int]) -> int:
        """Sends one DATA frame with as much of ``payload`` as is allowed; returns how much.

        ``allow`` gets the bytes wanted when the turn has come, and answers and charges what
        the windows permit, or raises. Blocks for the turn and until the kernel has the frame.
        """
        self._wait_turn()
        try:
            count = allow(min(len(payload), self._turn()))
            if count:
                self._send(http2.data_head(count, stream_id), payload[:count])
            return count
        finally:
            self._release()

    def send_data_from(
        self,
        stream_id: int,
        source: Source,
        allow: Callable[[int], int],
        charge: Callable[[int], None],
        gate: Callable[[memoryview], int] | None,
    ) -> int:
        """Reads once from ``source`` and sends that as one DATA frame, in one system call.

        Returns the bytes read: 0 at the end of the input, -1 if there was nothing. ``gate``
        says how many of the bytes may be passed on; it keeps the others and may raise.
        """
        self._wait_turn()
        try:
            buffer = _scratch.pop()
        except IndexError:
            buffer = bytearray(http2.FRAME_HEAD + CHUNK)
        joined = False
        try:
            count = allow(self._turn())
            if not count:
                return -1
            view = memoryview(buffer)
            got = source.recv_now(view[http2.FRAME_HEAD : http2.FRAME_HEAD + count])
            if got <= 0:
                return got
            passed = got if gate is None else gate(view[http2.FRAME_HEAD : http2.FRAME_HEAD + got])
            if passed:
                charge(passed)
                http2.pack_head(buffer, passed, http2.DATA, 0, stream_id)
                frame = view[: http2.FRAME_HEAD + passed]
                joined = passed <= SMALL and not self._lock.wanted and self._may_join()
                if joined:
                    self._brisk_until = self._loop.now() + MOMENT
                    self._control += frame
                else:
                    self._send(frame)
            return got
        finally:
            _scratch.append(buffer)
            if joined:
                self.soon()
                self._lock.release()
            else:
                self._release()

    def _wait_turn(self) -> None:
        """Blocks until it is this greenlet's turn."""
        try:
            self._lock.acquire()
        except BaseException:
            self.control()  # what was left to this sender's frame
            raise

    def _turn(self) -> int:
        """Bytes of DATA for the turn that begins."""
        brisk = self._lock.wanted or self._loop.now() < self._brisk_until
        return SHARED_CHUNK if brisk else CHUNK

    def _may_join(self) -> bool:
        """Whether a small frame may wait for company."""
        return len(self._control) <= JOIN_LIMIT and not self._torn

    def _flush(self) -> None:
        self._flush_due = False
        self.control()

    def _send(self, *parts: Buffer) -> None:
        """Sends the queued control frames and ``parts`` behind them. Blocks; needs the lock."""
        assert self._lock.held
        if self._control:
            control, self._control = self._control, bytearray()
            parts = (control, *parts)
            self._drained.set()
        self.unsent = sum(map(len, parts))
        try:
            while parts:
                single = len(parts) == 1
                sent = self._end.send_now(parts[0]) if single else self._end.sendmsg_now(parts)
                parts = self._rest(parts, sent)
        except OSError as error:
            self._failed(error)
            raise SessionClosedError(f"the session's connection was lost: {error}") from error
        except BaseException:
            self._torn = True
            self._failed(OSError(errno.ECONNABORTED, "a sender was stopped inside a frame"))
            raise

    def _rest(self, parts: tuple[Buffer, ...], sent: int) -> tuple[Buffer, ...]:
        """What of ``parts`` is left after ``sent`` bytes, once the kernel takes more. Blocks."""
        self.sent += sent
        self.unsent -= sent
        if not self.unsent:
            return ()
        rest: list[Buffer] = []
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                rest.append(memoryview(part)[sent:])
                sent = 0
        self._end.wait_writable()
        return tuple(rest)

    def _release(self) -> None:
        """Gives the turn on; with nobody waiting, sends queued control frames first."""
        assert self._lock.held
        if self._torn:
            self._forget()
        if self._control and not self._lock.wanted:
            try:
                sent = self._end.send_now(self._control)
            except OSError as error:
                self._forget()
                self._lock.release()
                self._failed(error)
                return
            self.sent += sent
            del self._control[:sent]
            if self._control:
                gevent.spawn(self._drain)
                return
            self._drained.set()
        self._lock.release()

    def _drain(self) -> None:
        """Sends the rest of the control queue in blocking style, holding the turn."""
        try:
            while self._control:
                self._send()
        except SessionClosedError:
            self._forget()
        finally:
            self._release()

    def _forget(self) -> None:
        """Drops what can no longer be sent."""
        self._control.clear()
        self._drained.set()
