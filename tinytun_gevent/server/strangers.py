"""Rejects PROXY headers from untrusted addresses; says once which forwarding fields were dropped."""

from __future__ import annotations

import logging
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

from tinytun_gevent.rare import Rare
from tinytun_gevent.server.tally import Refusal, Tally

if TYPE_CHECKING:
    from tinytun_gevent.wire.fields import Fields

log = logging.getLogger(__name__)
rare = Rare(log)

REASON: Final = "A PROXY header is taken only from this server's TRUSTED_PROXIES, and only once"
"""What the other side is told, where it can be told anything."""

FORWARDING: Final = {
    name.lower().encode(): name
    for name in ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Port", "Forwarded")
}
"""What a proxy says of its visitor, by the name in lower case."""


class Strangers:
    """Counts PROXY headers that are not believed, and connections that only a proxy may open."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        #: The kinds of addresses whose forwarding fields were dropped, and that the log has been told of.
        self._told: set[str] = set()

    def refuse(self, ip: str, port: str) -> None:
        """Counts one from the address ``ip``. ``port`` is a word for the port, one of a few of our own."""
        self._tally.refuse(Refusal.PROXY_HEADER)
        rare.info("refused %s as a proxy on the %s port: not in TRUSTED_PROXIES", ip, port, kind=port)

    def drop(self, ip: str, claims: Fields) -> None:
        """Says in the log, once for each kind of address, that forwarding fields from ``ip`` are dropped.

        ``claims`` are a request's. A visitor may send them too, so it is a line and no warning.
        """
        if len(self._told) == len(KINDS):
            return
        kind = kind_of(ip)
        name = next((FORWARDING[key] for name, _ in claims if (key := name.lower()) in FORWARDING), None)
        if name is None or kind in self._told:
            return
        self._told.add(kind)
        log.info(
            "dropped %s from %s, which is not in TRUSTED_PROXIES; if it is a proxy of yours, set "
            "TRUSTED_PROXIES=%s (said once for %s addresses)",
            name,
            ip,
            ip,
            kind,
        )


KINDS: Final = ("loopback", "private", "public")
"""Where a forgotten proxy may be."""


def kind_of(ip: str) -> str:
    """One of :data:`KINDS`: on this machine, in this network or elsewhere."""
    address = ip_address(ip)
    if address.is_loopback:
        return "loopback"
    return "private" if address.is_private or address.is_link_local else "public"
