"""Accepting connections, also when the process has no descriptor left for one."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from typing import Any, Final

from gevent import socket
from gevent.server import StreamServer

from tinytun_gevent.sockets import BareSocket
from tinytun_gevent.workers import Workers

log = logging.getLogger("tinytun_gevent.server")

SCARCE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""What ``accept`` fails with when the process or the machine has run out of something."""

PAUSE: Final = 0.5
"""Seconds until it is tried again; whoever connects meanwhile waits in the kernel's backlog."""


class Acceptor(StreamServer):
    """A ``StreamServer`` whose connections are served by :class:`Workers`, ``limit`` at once.

    While there are as many it accepts no more. When it runs out of descriptors it pauses, with
    one line in the log instead of a stack trace at each try.
    """

    def __init__(
        self,
        listener: socket.socket,
        handle: Callable[[Any, Any], None],
        workers: Workers,
        limit: int,
        *,
        raw: bool = False,
    ) -> None:
        """``handle`` blocks until the connection is over; its socket is closed then. With ``raw`` that
        has none of gevent's methods and is non-blocking: what ``sockets.end_of`` wants, quicker made.
        """
        super().__init__(listener, handle=handle)
        self._serve_one = handle
        self._workers = workers
        self._limit = limit
        self._raw = raw
        self._starved = False
        #: Connections that are being served.
        self.connections = 0

    def full(self) -> bool:
        """Whether there are as many connections as there may be."""
        return self.connections >= self._limit

    def do_handle(self, *args: Any) -> None:
        self.connections += 1
        self._workers.spawn(self._serve, *args)

    def _serve(self, sock: Any, address: Any) -> None:
        try:
            self._serve_one(sock, address)
        finally:
            sock.close()
            was_full = self.full()
            self.connections -= 1
            if was_full and self.started:
                self.start_accepting()

    def do_read(self) -> Any:
        """A socket and its address, or None if there is none now. Raises ``OSError``."""
        try:
            accepted = self._accept_raw() if self._raw else super().do_read()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause(error)
            return None
        if accepted is not None:
            self._starved = False
        return accepted

    def _accept_raw(self) -> Any:
        listener: Any = self.socket
        try:
            descriptor, address = listener._accept()
        except BlockingIOError:
            return None
        sock = BareSocket(listener.family, listener.type, listener.proto, descriptor)
        sock.setblocking(False)
        return sock, address

    def _pause(self, error: OSError) -> None:
        if not self._starved:
            self._starved = True
            log.error("no connection can be accepted: %s", os.strerror(error.errno or 0))
        server: Any = self  # what follows is what StreamServer itself does after an error
        server.stop_accepting()
        server._timer = server.loop.timer(PAUSE)
        server._timer.start(server._start_accepting_if_started)
