"""Whoever speaks for others without being trusted to: refused, counted, and named in the log."""

from __future__ import annotations

import logging
from typing import Final

from tinytun_gevent.rare import Rare
from tinytun_gevent.server.tally import Refusal, Tally

log = logging.getLogger(__name__)
rare = Rare(log)

REASON: Final = "A PROXY header is taken only from this server's TRUSTED_PROXIES, and only once"
"""What the other side is told, where it can be told anything."""


class Strangers:
    """Counts PROXY headers that are not believed, and connections that only a proxy may open."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def refuse(self, ip: str, port: str) -> None:
        """Counts one from the address ``ip``. ``port`` is a word for the port, one of a few of our own."""
        self._tally.refuse(Refusal.PROXY_HEADER)
        rare.info("refused %s as a proxy on the %s port: not in TRUSTED_PROXIES", ip, port, kind=port)
