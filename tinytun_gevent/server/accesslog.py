"""The access log: lines that are gathered and written together, to a file that may be taken away.

Nothing that happens to the file stops the traffic: what cannot be written waits, up to a limit, and is lost
and counted beyond it.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import time
from typing import Final

from .. import files
from ..lines import native_poll
from ..rare import Rare
from . import combined
from .observed import Observed

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

GATHER: Final = 32 * 1024
"""Bytes that are written at once: at 5,000 requests a second some twenty writes instead of 5,000."""

HOLD: Final = 1024 * 1024
"""Bytes that wait at most while nothing can be written: a second or two of much traffic."""

MODE: Final = 0o640
"""Who may read a new file: its owner and his group, as is usual for logs, which tell who visited what."""

PIECE: Final = getattr(select, "PIPE_BUF", 512)
"""Bytes that a pipe which is ready takes without waiting."""


class LogFile:
    """A file that lines are added to, also after another program has moved it away or cut it.

    Watched by the server's clock, which has it written once a second. Nothing in here raises.
    """

    def __init__(self, path: str) -> None:
        """``path`` is absolute, or ``-`` for standard output."""
        self._path = path
        self._descriptor: int | None = None
        #: Whether a write takes as much as there is, without waiting for anybody who reads.
        self._regular = False
        self._waiting = bytearray()
        #: Whether the last thing written was the beginning of a line.
        self._torn = False
        #: Whether the last attempt failed: the next one is the clock's.
        self._stuck = False
        #: What has been said to be wrong; ``""`` if nothing.
        self._reason = ""
        #: Lines that were lost since the file could last be written.
        self.lost = 0

    def write(self, line: str) -> None:
        """Adds a line, which ends with a line feed. Never blocks for long, never raises."""
        data = line.encode("ascii", "backslashreplace")
        if len(self._waiting) + len(data) > HOLD:
            self._lose(1)
            return
        self._waiting += data
        if len(self._waiting) >= GATHER and not self._stuck:
            self.flush()

    def tick(self, now: float) -> None:
        """Once a second: looks whether the file is still the one of that name, and writes what waits."""
        if self._is_gone():
            self.reopen()
        else:
            self.flush()

    def reopen(self) -> None:
        """Writes what waits, and goes on with whatever has that name now."""
        self.flush()
        self._close()
        if self._torn:  # the other half is in the file that was here before
            end = self._waiting.find(b"\n") + 1
            del self._waiting[: end or len(self._waiting)]
            self._torn = False
            self._lose(1)
        self.flush()
        if self._descriptor is None:  # nothing waited; but whoever moved it away may wait for a new one
            self._try_open()

    def close(self) -> None:
        """Writes what waits, and lets go of the file; a later line opens it again."""
        self.flush()
        self._close()

    def flush(self) -> None:
        """Writes what waits, as far as it can be."""
        if not self._waiting:
            return
        descriptor = self._try_open()
        if descriptor is None:
            return
        try:
            self._stuck = not self._send(descriptor)
        except OSError as error:
            self._fail(error.strerror or str(error))
        else:
            if not self._stuck:
                self._recover()

    def _send(self, descriptor: int) -> bool:
        """Writes what waits; False if whoever reads it is behind. Raises ``OSError``."""
        while self._waiting:
            piece = bytes(self._waiting if self._regular else self._waiting[:PIECE])
            if not self._regular and not _is_writable(descriptor):
                return False
            sent = os.write(descriptor, piece)
            self._torn = piece[sent - 1] != 0x0A
            del self._waiting[:sent]
        return True

    def _try_open(self) -> int | None:
        """The descriptor to write to; None if there is none now."""
        if self._descriptor is not None:
            return self._descriptor
        try:
            descriptor = os.dup(1) if self._path == "-" else files.open_to_append(self._path, MODE)
            self._regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        except OSError as error:
            self._fail(error.strerror or str(error))
            return None
        self._descriptor = descriptor
        return descriptor

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.close(descriptor)
            except OSError:
                pass  # what a disk says at last of what was written to it long ago

    def _is_gone(self) -> bool:
        """Whether the name means another file now, or none."""
        if self._descriptor is None or self._path == "-":
            return self._descriptor is None
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._descriptor))
        except OSError:
            return True

    # -- what goes wrong ------------------------------------------------------

    def _lose(self, lines: int) -> None:
        self.lost += lines
        if not self._reason:
            self._say("nobody reads it")

    def _fail(self, reason: str) -> None:
        self._stuck = True
        if not self._reason:
            self._say(reason)

    def _say(self, reason: str) -> None:
        self._reason = reason
        rare.warning("ACCESS_LOG=%s: %s; its lines wait for a moment and are then lost", self._path, reason)

    def _recover(self) -> None:
        if self._reason:
            rare.warning("ACCESS_LOG=%s can be written again; %d lines are missing", self._path, self.lost)
        self._reason, self.lost = "", 0


class AccessLog:
    """Writes a line about each exchange that is over; one of `ServerCore.observers`."""

    def __init__(self, path: str) -> None:
        self.file = LogFile(path)
        #: The second that was last put into words, and those.
        self._second = 0
        self._stamp = ""

    def __call__(self, exchange: Observed) -> None:
        now = time.time()
        if int(now) != self._second:
            self._second, self._stamp = int(now), combined.timestamp(now)
        self.file.write(combined.line(exchange, self._stamp, time.monotonic()))


def _is_writable(descriptor: int) -> bool:
    """Whether :data:`PIECE` bytes leave without waiting."""
    poll = native_poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))
