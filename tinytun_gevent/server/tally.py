"""What the server counts of itself: plain numbers that cost nothing to raise and are read elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from h2.errors import ErrorCodes

if TYPE_CHECKING:
    from ..session import Session

EXCHANGE_BOUNDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
"""Seconds: from what an exchange on one machine takes up to what nobody waits for."""

GOAWAY_REASONS: Final = (*(code.name for code in ErrorCodes), "other")
"""HTTP/2's error codes in their order (RFC 9113 §7), and one word for whatever else a peer may say."""

NO_ANSWER: Final = 0
"""Where in `Tally.statuses` exchanges stand whose visitors left before they had the whole answer."""

UPGRADED: Final = 101
"""The status of an exchange that lasted as long as its connection: how long says nothing of the service."""


class Refusal(StrEnum):
    """Why something was refused; a fixed set, for no stranger may choose what is counted."""

    #: A tunnel: its name or port is another's, reserved, or not allowed to this token.
    NAME = "name"
    #: A tunnel: no token, a wrong one, or one that has expired.
    TOKEN = "token"  # nosec B105 # a reason, no token
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


class Histogram:
    """How often a value was how large: counts between fixed bounds, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """``bounds`` ascend; a value that is equal to one counts below it."""
        self.bounds = tuple(bounds)
        #: By bound; the last one for what is beyond all of them.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Tally:
    """The counters of one server, since it began."""

    def __init__(self) -> None:
        self.refusals: Counter[Refusal] = Counter()
        #: Exchanges that are over, by the first digit of their status; :data:`NO_ANSWER` for those without.
        self.statuses = [0] * 6
        #: How long they took, in seconds; without those that were upgraded.
        self.durations = Histogram(EXCHANGE_BOUNDS)
        #: Visitors' connections that are carried as they are, now.
        self.carried = 0
        #: Sessions that belong to a tunnel now, also where it has lost its name already.
        self.sessions: set[Session] = set()
        #: Tunnels whose first session was established; that came back; that went without a goodbye.
        self.tunnels_opened = 0
        self.tunnels_resumed = 0
        self.tunnels_lost = 0
        #: GOAWAY frames, by the index of their reason in :data:`GOAWAY_REASONS`.
        self.goaways_sent = [0] * len(GOAWAY_REASONS)
        self.goaways_received = [0] * len(GOAWAY_REASONS)
        #: Bytes of sessions that are gone: from visitors, and to them.
        self._past_in = 0
        self._past_out = 0

    def refuse(self, reason: Refusal) -> None:
        """Counts a refusal."""
        self.refusals[reason] += 1

    def exchange(self, status: int, seconds: float) -> None:
        """Counts an exchange that is over; ``status`` is 0 if the visitor left before it had all.

        What is beyond 5xx counts as that, as a visitor takes it (RFC 9110 §15).
        """
        self.statuses[min(status // 100, 5)] += 1
        if status != UPGRADED:
            self.durations.add(seconds)

    def opened(self, came_back: bool) -> None:
        """Counts a tunnel that is established: a new one, or one whose owner came back."""
        if came_back:
            self.tunnels_resumed += 1
        else:
            self.tunnels_opened += 1

    def part(self, session: Session) -> None:
        """Keeps the bytes of a session that leaves its tunnel; idempotent."""
        if session in self.sessions:
            self.sessions.discard(session)
            self._past_in += session.data_sent
            self._past_out += session.data_received

    def goaway_sent(self, code: int) -> None:
        self.goaways_sent[_reason(code)] += 1

    def goaway_received(self, code: int) -> None:
        self.goaways_received[_reason(code)] += 1

    @property
    def bytes_in(self) -> int:
        """Bytes from visitors to tunnels, those that are gone too."""
        return self._past_in + sum(session.data_sent for session in self.sessions)

    @property
    def bytes_out(self) -> int:
        """Bytes from tunnels to visitors, likewise."""
        return self._past_out + sum(session.data_received for session in self.sessions)


def _reason(code: int) -> int:
    return min(code, len(GOAWAY_REASONS) - 1)
