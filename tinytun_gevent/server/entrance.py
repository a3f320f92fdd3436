"""Where TLS begins: the handshake of one connection, how long it may take, and what becomes of bad ones."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from tinytun_gevent.background import in_a_thread
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.sockets import End, PlainEnd
from tinytun_gevent.tls import TlsEnd
from tinytun_gevent.wire import clienthello

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)

MOST: Final = 4096
"""Handshakes under way at once, of about 20 KiB each. Of more, the oldest is given up: whoever means it
needs a few round trips, and whoever does not is the first to go."""

READ: Final = 4096
"""Bytes read at once while a ClientHello is awaited; most have less than two thousand."""


_SPOKEN: Final = frozenset(name.encode() for name in clienthello.SPOKEN)


class RefusedHelloError(OSError):
    """A handshake that did not begin; the other side has been told."""


class Entrance:
    """Shakes hands on the connections of one server."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self._under_way: dict[Shaking, None] = {}

    def shake(self, shaking: Shaking, received: bytes, *, strict: bool) -> TlsEnd:
        """TLS on ``shaking.end``, whose first bytes, a ClientHello's, have been ``received``. Blocks.

        ``strict``: whoever offers protocols must offer one of ours. Raises ``OSError`` for whatever goes
        wrong, which has been counted then; the caller closes ``shaking.end``.
        """
        if len(self._under_way) >= MOST:
            oldest = next(iter(self._under_way))
            del self._under_way[oldest]
            oldest.end.close()
        self._under_way[shaking] = None
        try:
            return self._shake(shaking, bytearray(received), strict)
        except OSError as error:
            shaking.counted = True
            self._core.tally.refuse(Refusal.TLS)
            log.debug("a TLS handshake failed: %s", error)
            raise
        finally:
            self._under_way.pop(shaking, None)

    def _shake(self, shaking: Shaking, hello: bytearray, strict: bool) -> TlsEnd:
        certificates, plain = self._core.certificates, shaking.end
        assert certificates is not None
        assert isinstance(plain, PlainEnd)
        while clienthello.missing(hello):
            data = plain.recv(READ)
            if not data:
                raise RefusedHelloError("closed within its ClientHello")
            hello += data
        offered = clienthello.protocols(hello)
        if strict and offered is not None and not set(offered) & _SPOKEN:
            plain.send_now(clienthello.NO_APPLICATION_PROTOCOL)
            raise RefusedHelloError("it offers no protocol that is spoken here")
        end = TlsEnd(plain, certificates.context, server_side=True, received=bytes(hello))
        shaking.end = end
        end.handshake(in_a_thread if certificates.slow else None)
        shaking.tls = end
        return end


class Shaking:
    """A connection until its handshake is over, for `Clock`: it is closed after ``patience`` seconds."""

    def __init__(self, end: End, patience: float) -> None:
        #: What there is of it now.
        self.end = end
        self._until = time.monotonic() + patience
        #: Whether it took too long, and whether it has been counted as refused.
        self.late = False
        self.counted = False
        #: What there is when the handshake has come to its end.
        self.tls: TlsEnd | None = None

    def tick(self, now: float) -> None:
        if now >= self._until:
            self.late = True
            self.end.close()


def say_last(end: End, answer: bytes) -> None:
    """Sends a last answer and lets it arrive: blocks until the other side has closed. The caller closes."""
    end.sendall(answer)
    end.finish_writing()
    while end.recv(READ):
        pass
