"""Whether the counters add up, tunnel by tunnel.

Where nobody was killed and no visitor left early, all who count the same bytes must have the same number.
Elsewhere each hop may have got less than the one before it has sent, by what was in flight when a connection
was cut: at most `LARGEST` bytes for each connection, the largest transfer there is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .crowds import LARGEST

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Books:
    """Who counted one tunnel's bytes; ``server`` and ``client`` are None where a kill took the counts."""

    name: str
    kind: str
    visitors: Counts
    service: Counts
    server: Counts | None = None
    client: Counts | None = None
    #: Connections that may have been cut, apart from those that visitors cut or saw cut.
    cut: int = 0

    def hops(self) -> list[tuple[str, Sequence[tuple[str, int]]]]:
        """Both directions: who counted how many bytes, from the first sender to the last receiver."""
        up, down = [], []
        if self.kind == "tcp":
            up.append(("visitors sent", self.visitors.get("sent", 0)))
        if self.server is not None:
            up.append(("server to tunnel", self.server["written_bytes"]))
            down.append(("server from tunnel", self.server["read_bytes"]))
        if self.client is not None:
            up.append(("client to service", self.client["bytes_in"]))
            down.insert(0, ("client from service", self.client["bytes_out"]))
        up.append(("service received", self.service.get("received", 0)))
        down.insert(0, ("service sent", self.service.get("sent", 0)))
        if self.kind == "tcp":
            down.append(("visitors received", self.visitors.get("received", 0)))
            return [("up", up), ("down", down)]
        bodies = [
            ("bodies up", [("visitors", self.visitors.get("up", 0)), ("service", self.service.get("up", 0))]),
            (
                "bodies down",
                [("service", self.service.get("down", 0)), ("visitors", self.visitors.get("down", 0))],
            ),
        ]
        return [("up", up), ("down", down), *bodies]

    @property
    def in_flight(self) -> int:
        """Bytes that each direction may lack."""
        return (self.cut + self.visitors.get("left", 0) + self.visitors.get("failed", 0)) * LARGEST


def complaints(books: Books) -> list[str]:
    """What does not add up; empty if all does."""
    said = []
    if books.visitors.get("wrong", 0):
        said.append(f"{books.name}: {books.visitors['wrong']} wrong answers")
    if not books.cut and books.visitors.get("failed", 0):
        said.append(f"{books.name}: {books.visitors['failed']} visits failed though nobody was killed")
    for direction, hops in books.hops():
        for (before, sent), (after, got) in pairwise(hops):
            if not 0 <= sent - got <= books.in_flight:
                said.append(
                    f"{books.name}, {direction}: {before} {sent:,}, {after} {got:,}: "
                    f"{sent - got:,} in between, at most {books.in_flight:,} can be"
                )
    return said
