"""Log lines of the server's processes: the same plain form for gunicorn's and for ours."""

from __future__ import annotations

import logging
from typing import Final

from ..lines import line_handler

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


def configure(level: str) -> None:
    """Sends the package's log lines at ``level`` and above to standard error."""
    handler = line_handler(None)
    handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT))
    logger = logging.getLogger("tinytun_gevent")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(LEVELS[level])
