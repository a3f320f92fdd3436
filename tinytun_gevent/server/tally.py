"""What the server counts of itself: plain numbers that cost nothing to raise and are read elsewhere."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Refusal(StrEnum):
    """Why something was refused; a fixed set, for no stranger may choose what is counted."""

    #: A tunnel: its name or port is another's, reserved, or not allowed to this token.
    NAME = "name"
    #: A tunnel: no token, a wrong one, or one that has expired.
    TOKEN = "token"
    #: A tunnel: the address has guessed before and has to wait.
    PENALTY = "penalty"
    #: A tunnel: the request was malformed or came too slowly.
    HANDSHAKE = "handshake"
    #: A tunnel: the server is stopping or full.
    SERVER = "server"
    #: A TLS handshake that failed or took too long.
    TLS = "tls"
    #: A PROXY header that came from somebody untrusted, or was malformed.
    PROXY_HEADER = "proxy_header"
    #: A visitor's request that was malformed.
    REQUEST = "request"
    #: Limits: see `account.Limits`.
    TUNNELS = "limit_tunnels"
    VISITORS = "limit_visitors"
    REQUESTS = "limit_requests"
    #: A visitor's address that connects too often.
    CONNECTS = "limit_connects"


class Tally:
    """The counters of one server, since it began."""

    def __init__(self) -> None:
        self.refusals: Counter[Refusal] = Counter()

    def refuse(self, reason: Refusal) -> None:
        """Counts a refusal."""
        self.refusals[reason] += 1
