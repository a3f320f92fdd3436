"""Log lines on their way out of the process, which nothing that happens to them may stop."""

from __future__ import annotations

import logging
import os
import select
import sys
from typing import Any, Final, TextIO

PIECE: Final = 512
"""Bytes written at once. What is "writable" takes as many without waiting (POSIX's smallest PIPE_BUF)."""

PATIENCE: Final = 50
"""Milliseconds for a reader who is a little behind; everybody's traffic waits meanwhile."""


class LineHandler(logging.Handler):
    """Writes each record as a line to a descriptor; a line that cannot leave is lost, and counted.

    A full disk must not raise, and a pipe that nobody reads must not block. When lines can be written
    again, the first one says how many are missing, and why.
    """

    def __init__(self, descriptor: int) -> None:
        """``descriptor`` stays its owner's, blocking or not: other programs may have it too."""
        super().__init__()
        self._descriptor = descriptor
        self._lost = 0
        self._reason = ""
        #: Whether the last thing written was the beginning of a line.
        self._torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one line. Never raises, blocks for :data:`PATIENCE` at most."""
        try:
            line = self.format(record)
        except Exception as error:  # a mistake in a log call must not end what it tells of
            line = self._notice(f"a log line could not be put together: {type(error).__name__}")
        missing = f"{self._lost} log lines are missing: {self._reason}"
        if self._lost and not self._write(self._notice(missing)):
            self._lost += 1
            return
        self._lost = 0 if self._write(line) else 1

    def _notice(self, text: str) -> str:
        """A line of our own, in the form that the others have."""
        form = getattr(self.formatter, "notice", None)
        return text if form is None else str(form(text))

    def _write(self, line: str) -> bool:
        """Whether all of a line could be written."""
        data = memoryview((("\n" if self._torn else "") + line + "\n").encode(errors="backslashreplace"))
        try:
            while data:
                if not self._is_writable():
                    self._reason = "nobody read them"
                    return False
                data = data[os.write(self._descriptor, data[:PIECE]) :]
                self._torn = bool(data)
        except OSError as error:
            self._reason = error.strerror or str(error)
            return False
        return True

    def _is_writable(self) -> bool:
        """Whether the next piece leaves without waiting; there is no patience while lines are being lost."""
        if not hasattr(select, "poll"):  # Windows
            return True
        poll = native_poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(0) or (not self._lost and poll.poll(PATIENCE)))


def line_handler(stream: TextIO | None) -> logging.Handler:
    """A handler for ``stream``; one of the standard library's where no descriptor is behind it."""
    try:
        return LineHandler((stream or sys.stderr).fileno())
    except (OSError, ValueError, AttributeError):
        return logging.StreamHandler(stream)


def native_poll() -> Any:
    """The system's own poll object: gevent's would run other greenlets, who log too."""
    monkey = sys.modules.get("gevent.monkey")
    return (select.poll if monkey is None else monkey.get_original("select", "poll"))()
