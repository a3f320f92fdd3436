"""Who opens tunnels: what the server knows of a token's holder, and what he may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ..rights import ANYTHING, Rights


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be used at once, or each second; 0 is no limit."""

    #: Tunnels that are open at once.
    tunnels: int = 0
    #: Visitors at once: HTTP exchanges, and connections that are carried as they are.
    visitors: int = 0
    #: HTTP requests a second; so many may also come at once.
    requests: float = 0.0
    #: Bytes a second, both directions together.
    rate: int = 0

    @property
    def for_visitors(self) -> bool:
        """Whether anything here concerns visitors."""
        return bool(self.visitors or self.requests or self.rate)


@dataclass(frozen=True, slots=True)
class Account:
    """One who may open tunnels. On a server without tokens all are one without id, like :data:`ANYBODY`:
    strangers have no limits in common, only each of their tunnels has its own.
    """

    #: Part of what his resume tokens stand for, the same on all his machines and after a restart.
    id: str = ""
    #: What the operator calls him; safe to be logged and shown.
    label: str = ""
    #: For all of his tunnels together.
    limits: Limits = Limits()
    #: For each of them.
    each: Limits = Limits()
    #: Which names and ports he may take.
    rights: Rights = field(default=ANYTHING, compare=False, repr=False)


ANYBODY: Final = Account()
