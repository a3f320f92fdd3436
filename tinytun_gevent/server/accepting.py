"""Accepting connections, also when the process has no descriptor left for one."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, Final, Protocol

from gevent import socket
from gevent.server import StreamServer

from tinytun_gevent.rare import Rare
from tinytun_gevent.sockets import BareSocket, tune
from tinytun_gevent.workers import Workers

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

SCARCE: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""What ``accept`` fails with when the process or the machine has run out of something."""

PAUSE: Final = 0.5
"""Seconds until it is tried again; whoever connects meanwhile waits in the kernel's backlog."""


RESERVE: Final = 32
"""Descriptors that visitors never get: a client that comes back needs one, so do the names' file and a
reload. Of a process that may have only few it is an eighth."""


def ceiling() -> int:
    """The lowest descriptor, which is always the next one, that belongs to :data:`RESERVE`."""
    if resource is None:
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else int(soft - min(RESERVE, soft // 8))


class Door(Protocol):
    """Decides whether an acceptor may accept, besides its own limit."""

    def is_shut(self, reopen: Callable[[], None]) -> bool:
        """Whether nothing may be accepted now; then ``reopen`` is called as soon as something may."""

    def enter(self) -> Callable[[], None] | None:
        """A connection was accepted; what is to be called when it is over, if anything."""


class Acceptor(StreamServer):
    """A ``StreamServer`` whose connections are served by :class:`Workers`, ``limit`` at once.

    While there are as many it accepts no more. When it runs out of descriptors it pauses, with
    one line in the log instead of a stack trace at each try; an acceptor of visitors does so while there
    are some left for what is more important.
    """

    def __init__(
        self,
        listener: socket.socket,
        handle: Callable[[Any, Any], None],
        workers: Workers,
        limit: int,
        *,
        raw: bool = False,
        door: Door | None = None,
    ) -> None:
        """``handle`` blocks until the connection is over; its socket is closed then. With ``raw`` that
        has none of gevent's methods and is non-blocking: what ``sockets.end_of`` wants, quicker made.
        Visitors get such ones.
        """
        super().__init__(listener, handle=handle)
        tune(listener)  # its connections inherit that
        self._serve_one = handle
        self._workers = workers
        self._limit = limit
        self._raw = raw
        self._door = door
        #: Where the reserve begins; a raw socket's number tells how many descriptors there are.
        self._ceiling = ceiling() if raw else sys.maxsize
        #: Whether that was reached: nothing is accepted until it has been found otherwise.
        self._scarce = False
        self._starved = False
        #: Connections that are being served.
        self.connections = 0
        #: Whether nothing is to be accepted for now, whatever there is room for.
        self.paused = False

    @property
    def accepts(self) -> bool:
        """Whether the next one who connects is served at once."""
        full = self.connections >= self._limit
        return bool(self.started) and not (self.paused or self._starved or full)

    def full(self) -> bool:
        """Whether there are as many connections as there may be."""
        if self.connections >= self._limit:
            return True
        return self._door is not None and self._door.is_shut(self._look_again)

    def pause(self) -> None:
        """Accepts nothing until :meth:`resume`; whoever connects waits in the kernel's backlog."""
        self.paused = True
        self.stop_accepting()

    def resume(self) -> None:
        """Accepts again."""
        self.paused = False
        self._look_again()

    def do_handle(self, *args: Any) -> None:
        self.connections += 1
        leave = None if self._door is None else self._door.enter()
        self._workers.spawn(self._serve, leave, *args)

    def _serve(self, leave: Callable[[], None] | None, sock: Any, address: Any) -> None:
        try:
            self._serve_one(sock, address)
        finally:
            sock.close()
            was_full = self.connections >= self._limit
            self.connections -= 1
            if leave is not None:
                leave()
            if was_full:
                self._look_again()

    def do_read(self) -> Any:
        """A socket and its address, or None if there is none now. Raises ``OSError``."""
        if self._scarce:
            self._pause(errno.EMFILE)
            return None
        try:
            accepted = self._accept_raw() if self._raw else super().do_read()
        except OSError as error:
            if error.errno not in SCARCE:
                raise
            self._pause(error.errno or 0)
            return None
        if accepted is not None and not self._scarce:
            self._starved = False
        return accepted

    def _accept_raw(self) -> Any:
        listener: Any = self.socket
        try:
            descriptor, address = listener._accept()
        except BlockingIOError:
            return None
        self._scarce = descriptor >= self._ceiling  # this one is served, and no other
        sock = BareSocket(listener.family, listener.type, listener.proto, descriptor)
        sock.setblocking(False)
        return sock, address

    def _pause(self, reason: int) -> None:
        """Accepts nothing for :data:`PAUSE`, because of the error number ``reason``."""
        if not self._starved:
            self._starved = True
            rare.error("no connection can be accepted: %s", os.strerror(reason))
        server: Any = self  # what follows is what StreamServer itself does after an error
        server.stop_accepting()
        server._timer = server.loop.timer(PAUSE)
        server._timer.start(self._look_again)

    def _look_again(self) -> None:
        """Goes on, unless visitors still have all that they may, or nothing is listened to any more."""
        if self.closed or self.paused:
            return
        if self._scarce and self._next_descriptor() >= self._ceiling:
            self._pause(errno.EMFILE)
            return
        self._scarce = False
        server: Any = self
        server._start_accepting_if_started()

    def _next_descriptor(self) -> int:
        try:
            descriptor = os.dup(self.socket.fileno())
        except OSError:
            return sys.maxsize
        os.close(descriptor)
        return descriptor
