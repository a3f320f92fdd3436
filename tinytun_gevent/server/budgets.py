"""What everybody uses now of what he may: one state for each account, and one for each tunnel.

An account's state is one object for all of its tunnels, from the first one on until the last is gone and
nothing is owed any more.
"""

from __future__ import annotations

import logging
from typing import Final

from tinytun_gevent.errors import TryLaterError
from tinytun_gevent.rare import Rare
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.server.account import Account, Limits
from tinytun_gevent.server.tally import Refusal, Tally
from tinytun_gevent.server.usage import Holder, TunnelBudget

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

TUNNEL_AGAIN: Final = 10
"""Seconds after which a client that has all its tunnels tries again: somebody has to close one first."""


class Budgets:
    """The live state of everybody's limits on one server."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._holders: dict[str, Holder] = {}

    def __len__(self) -> int:
        """Accounts of which anything is remembered."""
        return len(self._holders)

    def open(self, tunnel: Tunnel, account: Account) -> None:
        """``tunnel`` is the account's from now on. Raises TryLaterError if it is one too many.

        One that the account has already, whose owner comes back, never is.
        """
        holder = self._hold(account.id, account.limits)
        if holder is not None:
            holder.scope.change(account.limits)
            most = account.limits.tunnels
            if tunnel.id not in holder.tunnels:
                if 0 < most <= len(holder.tunnels):
                    self._refuse_tunnel(account, most)
                holder.tunnels[tunnel.id] = tunnel
        self._apply(tunnel, account, holder)
        if holder is not None:
            holder.offer_room()  # there may be more of it than before

    def restore(self, tunnel: Tunnel) -> None:
        """Counts a tunnel that waits for its owner since a restart; figures come with him."""
        holder = self._hold(tunnel.opener, Limits())
        if holder is not None:
            holder.tunnels[tunnel.id] = tunnel

    def close(self, tunnel: Tunnel) -> None:
        """The tunnel is gone; its visitors may still be here. Idempotent."""
        for id in {tunnel.opener, tunnel.account.id if tunnel.account else ""}:
            holder = self._holders.get(id)
            if holder is not None:
                holder.tunnels.pop(tunnel.id, None)

    def update(self, account: Account) -> None:
        """Replaces an account's figures, also for what is open; what is used stays used.

        Who was let in while his bytes were not limited at all goes on without a limit.
        """
        holder = self._holders.get(account.id)
        if holder is None:
            return
        holder.scope.change(account.limits)
        for tunnel in holder.tunnels.values():
            if tunnel.account is not None:
                self._apply(tunnel, account, holder)

    def tick(self, now: float) -> None:
        """Forgets accounts of which nothing is open or owed; called about once a second."""
        for id, holder in list(self._holders.items()):
            if not holder.tunnels and holder.scope.rests:
                del self._holders[id]

    def _hold(self, id: str, limits: Limits) -> Holder | None:
        """The state of an account, made when there is none; strangers without a token have none in common."""
        if not id:
            return None
        holder = self._holders.get(id)
        if holder is None:
            holder = self._holders[id] = Holder(limits)
        return holder

    def _refuse_tunnel(self, account: Account, most: int) -> None:
        self._tally.refuse(Refusal.TUNNELS)
        rare.info("%s has reached a limit: tunnels", account.label or "an account")
        reason = f"The limit of tunnels at once is reached: your token has {most}"
        raise TryLaterError(reason, 429, TUNNEL_AGAIN)

    def _apply(self, tunnel: Tunnel, account: Account, holder: Holder | None) -> None:
        tunnel.account = account
        budget: TunnelBudget | None = tunnel.budget
        if budget is not None:
            budget.change(account.each)
        elif account.each.for_visitors or (holder is not None and account.limits.for_visitors):
            tunnel.budget = TunnelBudget(tunnel, holder, account.each, self._tally)
