"""Log lines of the server's processes: the same form for gunicorn's and for ours, as text or as JSON.

Whatever is foreign in a line (a host, a name, a peer's words) can neither end it nor move a terminal's
cursor. Stack traces have no exception's own words, unless it is one of ours or the operating system's:
they may quote what a visitor has sent.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final

from ..errors import TunnelError
from ..lines import line_handler
from ..rare import Rare

rare = Rare(logging.getLogger("tinytun_gevent.server"))

FORMAT: Final = "%(asctime)s %(levelname)-7s %(message)s"
DATE_FORMAT: Final = "%Y-%m-%d %H:%M:%S%z"

LEVELS: Final = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
"""LOG_LEVEL's words as the standard library's numbers."""

CAUSES: Final = 8
"""Exceptions of one chain that are shown."""

_USUAL: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""What every record has; anything else is a field of the event."""


def visible(text: str) -> str:
    """``text`` on one line, with whatever is not printable in it as Python would write it."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def trace_of(error: BaseException) -> Iterator[str]:
    """The lines of an exception's stack trace, that of its causes behind it; see this module's docstring."""
    for _ in range(CAUSES):
        for entry in traceback.format_tb(error.__traceback__):
            yield from map(visible, entry.splitlines())
        yield f"{type(error).__name__}{_own_words(error)}"
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None:
            return
        error = cause
        yield "caused by"


def _own_words(error: BaseException) -> str:
    if isinstance(error, TunnelError):
        return visible(f": {error}")
    return visible(f": {error.strerror}") if isinstance(error, OSError) and error.strerror else ""


def _error_of(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


class TextFormatter(logging.Formatter):
    """One line an event; a stack trace follows, each of its lines indented."""

    def __init__(self) -> None:
        super().__init__(FORMAT, DATE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        record.message, record.asctime = visible(record.getMessage()), self.formatTime(record, self.datefmt)
        line = self.formatMessage(record)
        error = _error_of(record)
        return line if error is None else "\n    ".join([line, *trace_of(error)])


class JsonFormatter(logging.Formatter):
    """One object an event and a line: its fields are keys of their own."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": visible(record.getMessage()),
        }
        event |= {key: value for key, value in vars(record).items() if key not in _USUAL and key not in event}
        error = _error_of(record)
        if error is not None:
            event["trace"] = list(trace_of(error))
        return json.dumps(event, default=str).replace("\x7f", "\\u007f")

    def notice(self, text: str) -> str:
        """A line of the handler's own."""
        return self.format(
            logging.makeLogRecord({"levelname": "WARNING", "name": "tinytun_gevent", "msg": text})
        )


def formatter(log_format: str) -> logging.Formatter:
    """What LOG_FORMAT means."""
    return JsonFormatter() if log_format == "json" else TextFormatter()


def configure(level: str, log_format: str = "text") -> None:
    """Sends the package's log lines at ``level`` and above to standard error."""
    handler = line_handler(None)
    handler.setFormatter(formatter(log_format))
    logger = logging.getLogger("tinytun_gevent")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(LEVELS[level])


def adopt(hub: Any) -> None:
    """Has the errors of a hub's greenlets logged like others; gevent would print all their words."""

    def print_exception(
        context: object, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
    ) -> None:
        rare.error("a greenlet failed", exc_info=(kind, error if error is not None else kind(), trace))

    hub.print_exception = print_exception
