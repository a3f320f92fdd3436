"""How many tunnels the clients of one address have: counted, and on an open server limited.

Strangers have nothing in common but where they come from. A tunnel counts from its CONNECT until its name is
free, so one that was lost counts while its name waits for its owner, also in the next process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from tinytun_gevent.errors import TryLaterError
from tinytun_gevent.rare import Rare
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.addresses import source_of
from tinytun_gevent.server.budgets import TUNNEL_AGAIN
from tinytun_gevent.server.tally import Refusal, Tally

log = logging.getLogger("tinytun_gevent.server")

SAY_AGAIN: Final = 60.0
"""Seconds for which the log says nothing more of it: anybody can ask as often as he likes."""

rare = Rare(log, 1, SAY_AGAIN)


class Sources:
    """The tunnels of each source address; of IPv6 addresses, of each /64."""

    def __init__(self, most: int, exempt: Callable[[str], bool], tally: Tally) -> None:
        """``most`` tunnels of one address at once; 0 is no limit.

        ``exempt`` addresses are not counted: behind a proxy are many clients.
        """
        self._most = most
        self._exempt = exempt
        self._tally = tally
        #: Ids of tunnels by source; never empty ones.
        self._tunnels: dict[str, set[str]] = {}

    def __len__(self) -> int:
        """Addresses that have tunnels."""
        return len(self._tunnels)

    def count(self, source: str) -> int:
        """Tunnels of a source."""
        return len(self._tunnels.get(source, ()))

    def source_of(self, ip: str) -> str:
        """What the tunnels of ``ip`` count for; blank if they do not count."""
        return "" if self._exempt(ip) else source_of(ip)

    def check(self, source: str) -> None:
        """Raises TryLaterError (429) if ``source`` may not have another tunnel now."""
        if not source or not 0 < self._most <= self.count(source):
            return
        self._tally.refuse(Refusal.TUNNELS)
        rare.info("%s has reached a limit: tunnels", source)
        reason = f"The limit of tunnels at once is reached: your address has {self._most}"
        raise TryLaterError(reason, 429, TUNNEL_AGAIN)

    def hold(self, tunnel: Tunnel, source: str) -> None:
        """The tunnel counts for ``source`` from now on, and for no other. Idempotent."""
        self.close(tunnel)
        tunnel.source = source
        if source:
            self._tunnels.setdefault(source, set()).add(tunnel.id)

    def close(self, tunnel: Tunnel) -> None:
        """The tunnel has no name any more. Idempotent."""
        ids = self._tunnels.get(tunnel.source)
        if ids is None:
            return
        ids.discard(tunnel.id)
        if not ids:
            del self._tunnels[tunnel.source]
