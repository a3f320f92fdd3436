"""Serving the metadata API by gunicorn's own request handling, with and without its arbiter."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import gevent
from gevent import socket
from gunicorn.config import Config
from gunicorn.workers.base_async import AsyncWorker

from ..rare import Rare

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

CONNECTION_LIFE: Final = 30.0
"""Seconds a connection to the API lives at most: nobody holds one by reading slowly."""

HEAD_TIMEOUT: Final = 5.0
"""Seconds for a request's head, and for the pause before the next one."""


class _Log(logging.LoggerAdapter[logging.Logger]):
    """Our logger as gunicorn's request handling wants it: it would install handlers of its own.

    What it says of a request quotes it, with all that may be secret in it, so others say it.
    """

    def debug(self, msg: object, *args: object, **kwargs: Any) -> None:
        self.logger.debug("a caller of the metadata API has left")

    def warning(self, msg: object, *args: object, **kwargs: Any) -> None:
        rare.warning("a request to the metadata API was not understood")

    def exception(self, msg: object, *args: object, **kwargs: Any) -> None:
        rare.exception("a request to the metadata API failed")

    def access(self, *args: Any) -> None:
        """No access log: peers ask all the time."""


class MetadataHost(AsyncWorker):  # type: ignore[misc]
    """gunicorn's own request handling without its arbiter: one object serves any number of sockets.

    It stands where a gunicorn worker would, so the API is parsed and answered by the same code
    in the worker process and in an in-process server.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        # The base constructor would make the temporary file that the arbiter watches.
        self.cfg = Config()
        self.cfg.set("limit_request_line", 2048)
        self.cfg.set("limit_request_fields", 50)
        self.log = _Log(log)
        self.wsgi = app
        self.alive = True
        self.nr = 0
        self.max_requests = sys.maxsize

    def timeout_ctx(self) -> gevent.Timeout:
        return gevent.Timeout(HEAD_TIMEOUT, False)  # type: ignore[arg-type]  # False: just leave the block

    def serve(self, listener: socket.socket, client: socket.socket, address: tuple[str, int]) -> None:
        """Answers the requests of one connection and closes it; blocks, raises nothing."""
        client.setblocking(True)
        watchdog = gevent.get_hub().loop.timer(CONNECTION_LIFE)
        watchdog.start(_cut, client)
        try:
            self.handle(listener, client, address)
        finally:
            watchdog.close()

    def close(self) -> None:
        """Lets connections end after the request they are in."""
        self.alive = False


def _cut(client: socket.socket) -> None:
    """Wakes whoever reads or writes ``client``, with an error."""
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("a metadata connection had ended")
