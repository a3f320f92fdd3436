"""The port where TLS comes first: a PROXY header perhaps, the handshake, then what was agreed on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gevent.event import Event

from tinytun_gevent.errors import ProxyHeaderError
from tinytun_gevent.server import proxied
from tinytun_gevent.server.addresses import plain
from tinytun_gevent.server.edge import Edge
from tinytun_gevent.server.entrance import READ, Entrance, Shaking, say_last
from tinytun_gevent.server.handover import Moved
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.sockets import End, Socket, end_of
from tinytun_gevent.wire import clienthello, handshake

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)

Address = tuple[str, int]

PROTOCOLS: Final[dict[str | None, Callable[[Edge, End, Moved], None]]] = {
    "http/1.1": Edge.serve,
    None: Edge.serve,
}
"""Who speaks what was agreed on by ALPN: the names are those of `clienthello.SPOKEN`."""

PLAIN_HERE: Final = handshake.build_refusal(400, "This is an HTTPS port: use https://")
"""What somebody is told who speaks no TLS."""


class HttpsPort:
    """Serves the connections of the HTTPS port, which are the edge's once they are encrypted."""

    def __init__(self, core: ServerCore, entrance: Entrance, edge: Edge) -> None:
        self._core = core
        self._entrance = entrance
        self._edge = edge
        #: Those who have not shaken hands yet.
        self._arriving: set[Shaking] = set()
        self._arrived = Event()

    def handle(self, sock: Socket, address: Address) -> None:
        """Serves one visitor's connection until it ends; closes the socket. Blocks."""
        connects = self._core.connects
        wait = connects.admit(plain(address)[0]) if connects is not None else 0
        if connects is not None and wait and not connects.tells:
            return  # in a flood: an answer would have to be encrypted first, which is what costs
        shaking = Shaking(end_of(sock), self._core.config.handshake_timeout)
        self._core.clock.watch(shaking)
        self._arriving.add(shaking)
        try:
            early = bytearray()
            port = self._core.config.proxy_tls_port
            address, port = proxied.who_comes(self._core, shaking.end, early, plain(address), port, "https")
            if not early:
                early += shaking.end.recv(READ)
            if early[:1] == clienthello.HELLO:
                self._entrance.shake(shaking, bytes(early), strict=True)
            elif early:
                self._core.tally.refuse(Refusal.TLS)
                say_last(shaking.end, PLAIN_HERE)
        except (OSError, ProxyHeaderError) as error:
            log.debug("%s did not come through TLS: %s", address[0], error)
        finally:
            self._core.clock.forget(shaking)
            self._arriving.discard(shaking)
            self._arrived.set()
            if shaking.tls is None:
                shaking.end.close()
        if shaking.tls is not None and connects is not None and wait:
            connects.turn_away(shaking.tls, wait)
            shaking.tls.close()
        elif shaking.tls is not None:
            known = Moved(None, address, port, b"", proto="https")
            PROTOCOLS[shaking.tls.protocol](self._edge, shaking.tls, known)

    def wait_arrived(self, timeout: float) -> None:
        """Blocks until nobody is on his way in, ``timeout`` seconds at most; he is the edge's then."""
        until = time.monotonic() + timeout
        while self._arriving and (left := until - time.monotonic()) > 0:
            self._arrived.clear()
            self._arrived.wait(left)
