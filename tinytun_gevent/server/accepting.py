"""Accepting connections, also when the process has no descriptor left for one."""

from __future__ import annotations

import errno
import logging
import os
from typing import Any, Final

from gevent.server import StreamServer

log = logging.getLogger("tinytun_gevent.server")

SCARCE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""What ``accept`` fails with when the process or the machine has run out of something."""

PAUSE: Final = 0.5
"""Seconds until it is tried again; whoever connects meanwhile waits in the kernel's backlog."""


class Acceptor(StreamServer):
    """A ``StreamServer`` that pauses with one line in the log, instead of a stack trace at each try."""

    _starved = False

    def do_read(self) -> Any:
        """A socket and its address, or None if there is none now. Raises ``OSError``."""
        try:
            accepted = super().do_read()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause(error)
            return None
        if accepted is not None:
            self._starved = False
        return accepted

    def _pause(self, error: OSError) -> None:
        if not self._starved:
            self._starved = True
            log.error("no connection can be accepted: %s", os.strerror(error.errno or 0))
        server: Any = self  # what follows is what StreamServer itself does after an error
        server.stop_accepting()
        server._timer = server.loop.timer(PAUSE)
        server._timer.start(server._start_accepting_if_started)
