"""Why a tunnel takes no visitors any more, in words: what is known, and no more."""

from __future__ import annotations

from ..errors import PeerSilentError
from ..liveness import PATIENCE, QUIET, waking_time
from ..session import Session
from ..wire.goodbye import SILENT
from .text import clock_time


def why_ended(session: Session, server: str, said: str, stops: bool) -> str:
    """Why ``session``, the last one with ``server``, has ended.

    ``said`` is the server's own reason, if it gave one; ``stops``: it has said goodbye without a fault. So
    does one that got no answer, and a computer that was asleep reads it when it wakes.
    """
    if said:
        return said
    paused = session.keep_alive.pauses.since(waking_time())
    if paused:
        return f"no answer from {server} for {clock_time(paused)}: this computer was asleep or offline"
    if isinstance(session.error, PeerSilentError):
        return f"no answer from {server} for {clock_time(QUIET + PATIENCE)}"
    if stops and session.goaway_reason == SILENT.encode():
        return f"{server} got no answer from this computer: one of them was offline"
    return "the server is stopping" if stops else str(session.error or "the server closed the tunnel")
