"""Peers of a session that break its rules or flood it: the attacks of the test suite on the real programs."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..processes import Process
from ..services import SMALL_PAGE
from .base import Group, Measured
from .peak import Peak
from .site import Site
from .suite import malice, support
from .watch import Watch

if TYPE_CHECKING:
    from support import Peer

group = Group("malice")

MIB = 1 << 20
ENDED = 1.5  # seconds, promised
MEMORY = 8 * MIB
SLOWEST = 2.0  # seconds for a request of somebody else's
PAUSE = 0.05  # seconds between two of them


@dataclass
class Tally:
    """What all attacks together have brought."""

    attacks: int = 0
    slowest: float = 0.0
    memory: int = 0
    wrong: list[str] = field(default_factory=list)

    def play(self, attack: malice.Attack, link: malice.Link, victim: Process) -> None:
        """One attack, watched."""
        peak = Peak({"victim": victim.pid})
        try:
            with link:
                end = malice.play(attack, link)
        except (AssertionError, OSError) as error:
            self.wrong.append(f"{attack.name}: {error}")
            return
        grown = max(peak.growth().values())
        self.attacks += 1
        self.slowest, self.memory = max(self.slowest, end.after), max(self.memory, grown)
        if end.after > ENDED or grown > MEMORY or end.code not in (None, *attack.codes):
            self.wrong.append(f"{attack.name}: code {end.code}, {end.after:.1f} s, {grown / MIB:.1f} MiB")

    def summary(self) -> str:
        """For the table."""
        text = f"{self.attacks} attacks, the slowest took {self.slowest:.2f} s, +{self.memory / MIB:.1f} MiB"
        return "; ".join([text, *self.wrong[:3]])


def _page_or_nothing(peer: Peer) -> None:
    """A service that answers a request, and of everything else takes nothing.

    What is taken becomes credit: into one that reads, DATA beyond the window has to win a race first.
    """
    if peer.sock.recv(1, socket.MSG_PEEK) == b"G":
        peer.read_request()
        peer.sendall(support.respond(b"page", b"Connection: close"))
        return
    ended = select.poll()
    ended.register(peer.sock, select.POLLRDHUP)
    ended.poll(10_000)


def _attacks(role: str) -> Iterator[malice.Attack]:
    return (attack for attack in malice.ATTACKS.values() if role in attack.roles)


@group.case(
    "a malicious tunnel client: floods, broken frames, HPACK bombs, one attack after the other",
    f"each ended within {ENDED:g} s and for {MEMORY // MIB} MiB at most; requests for another tunnel, "
    f"every {PAUSE * 1000:g} ms, none slower than {SLOWEST:g} s",
    seconds=40,
)
def malicious_client(site: Site) -> Measured:
    site.start_server()
    site.open_tunnel("app")
    site.until_served("app")
    tally = Tally()
    with Watch(site.endpoint("app"), PAUSE) as others, ExitStack() as stack:

        def visit() -> None:
            visitor = stack.enter_context(support.connect(site.ports["proxy"]))
            visitor.sendall(site.endpoint("evil").request(SMALL_PAGE))

        for attack in _attacks(malice.CLIENT):
            link = malice.as_client(site.ports["connection"], "evil", visit)
            tally.play(attack, link, site.server)
            stack.close()
    text = f"{tally.summary()}; {others.summary()}, the slowest took {others.slowest:.2f} s"
    return Measured(text, not tally.wrong and not others.wrong and others.slowest <= SLOWEST)


@contextmanager
def _evil_server() -> Iterator[malice.FakeServer]:
    evil = malice.FakeServer()
    try:
        yield evil
    finally:
        evil.close()


@group.case(
    "a malicious tunnel server: the same on a client",
    f"each ended within {ENDED:g} s and for {MEMORY // MIB} MiB at most, and the client comes back",
    seconds=80,
)
def malicious_server(site: Site) -> Measured:
    with _evil_server() as evil, support.Service(_page_or_nothing) as service:
        tally = Tally()
        port = int(evil.url.rpartition(":")[2])
        client = site.start_client("evil", service.port, port=port)
        for attack in _attacks(malice.SERVER):
            tally.play(attack, evil.accept(), client)
            if client.ended():
                return Measured(f"{attack.name}: the client has ended: {client.last_words()}", False)
        with evil.accept() as link:
            link.greet()
            stream = link.open()
            link.send(malice.frame(malice.DATA, site.endpoint("evil").request(SMALL_PAGE), 0, stream))
            serves = link.data().startswith(b"HTTP/1.1 200 ")
    came = "came back after each, and serves" if serves else "does not serve any more"
    return Measured(f"{tally.summary()}; the client {came}", not tally.wrong and serves)
