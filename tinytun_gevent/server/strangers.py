"""Whoever speaks for others without being trusted to: refused, counted, and named in the log now and then."""

from __future__ import annotations

import logging
from typing import Final

from tinytun_gevent.server.logs import Seldom
from tinytun_gevent.server.tally import Refusal, Tally

log = logging.getLogger(__name__)

SAY_AGAIN: Final = 10.0
"""Seconds between two lines in the log about one port: enough to find a load balancer that was forgotten in
TRUSTED_PROXIES, and anybody can connect as often as he likes."""

REASON: Final = "A PROXY header is taken only from this server's TRUSTED_PROXIES, and only once"
"""What the other side is told, where it can be told anything."""


class Strangers:
    """Counts PROXY headers that are not believed, and connections that only a proxy may open."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._log = Seldom(SAY_AGAIN)
        #: How many were refused since the last line, by port.
        self._unsaid: dict[str, int] = {}

    def refuse(self, ip: str, port: str) -> None:
        """Counts one from the address ``ip``. ``port`` is a word for the port, one of a few of our own."""
        self._tally.refuse(Refusal.PROXY_HEADER)
        if not self._log.due(port):
            self._unsaid[port] = self._unsaid.get(port, 0) + 1
            return
        others = self._unsaid.pop(port, 0)
        more = f", and {others} more before" if others else ""
        log.info("refused %s as a proxy on the %s port: not in TRUSTED_PROXIES%s", ip, port, more)
