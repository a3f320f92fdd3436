"""Messages that two programs might read differently: whatever they are, each goes where it belongs.

The messages are those of the test suite (``tests/framing_corpus.py``), through the real programs.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .base import Group, Measured
from .site import Site
from .suite import framing_corpus as corpus
from .suite import support

if TYPE_CHECKING:
    from support import Peer, Request, Service

group = Group("framing")

NAMES = ("demo", "other")
ALTERNATING = 500  # requests for each of the two on one connection
CLOSE = b"Connection: close"


@dataclass
class Pair:
    """Two services that say their name, each behind a tunnel of that name."""

    services: dict[str, Service] = field(default_factory=dict)
    #: What ``demo`` answers instead, to everything but ``/canary``.
    special: bytes | None = None

    def script(self, name: str) -> object:
        def run(peer: Peer) -> None:
            while (got := peer.read_request()) is not None:
                if self.special is None or name != "demo" or got.target.startswith(b"/canary"):
                    answer = support.respond(name.encode())
                    peer.sendall(answer.removesuffix(name.encode()) if got.method == b"HEAD" else answer)
                else:
                    peer.sendall(self.special)
                    return

        return run

    def misrouted(self) -> list[str]:
        """Requests that came to the wrong service, or that nobody has sent as one."""
        wrong = []
        for name, service in self.services.items():
            for got in service.requests:
                if not _is_for(got, name) or got.target.startswith(b"/smuggled"):
                    wrong.append(f"{name} got {got.start!r}")
        return wrong


def _is_for(got: Request, name: str) -> bool:
    host = (got.get(b"host") or b"").lower().partition(b":")[0].rstrip(b".")
    return bool(host == b"%b.localhost" % name.encode())


@contextmanager
def _pair(site: Site) -> Iterator[Pair]:
    pair = Pair()
    with ExitStack() as stack:
        for name in NAMES:
            pair.services[name] = stack.enter_context(support.Service(pair.script(name)))
        site.start_server()
        for name, service in pair.services.items():
            site.open_tunnel(name, service.port)
        yield pair


def _answers(port: int, data: bytes) -> list[tuple[int, bytes]]:
    """Status and body of all answers on one connection, until it ends.

    It half-closes: the last request needs :data:`CLOSE`, or that means that the visitor has left.
    """
    got = []
    with support.connect(port) as visitor, suppress(OSError, EOFError):
        with suppress(OSError):  # refused before its end
            visitor.sendall(data)
            visitor.shutdown(socket.SHUT_WR)
        while visitor.recv(1, socket.MSG_PEEK):
            response = support.read_response(visitor)
            got.append((response.status, response.body))
    return got


@group.case(
    "requests and responses that two programs might read differently, for two tunnels in turn",
    "0 misrouted",
    seconds=20,
)
def framing(site: Site) -> Measured:
    port, wrong = site.ports["proxy"], list[str]()
    requests = [(name, data) for name, data, *_ in (*corpus.VALID_REQUESTS, *corpus.INVALID_REQUESTS)]
    responses = [(name, data) for name, _, data, *_ in (*corpus.VALID_RESPONSES, *corpus.INVALID_RESPONSES)]
    with _pair(site) as pair:
        behind = support.request("other", "/behind", CLOSE)
        for name, data in requests:
            for position, (status, body) in enumerate(_answers(port, data + behind)):
                if status == 200 and body not in (b"", NAMES[position].encode()):
                    wrong.append(f"{name}: answer {position + 1} is {body!r}")
        alternating = b"".join(support.request(name) for name in NAMES) * ALTERNATING
        got = [body for _, body in _answers(port, alternating + behind)]
        if got != [*[name.encode() for name in NAMES] * ALTERNATING, b"other"]:
            wrong.append("alternating requests were not answered in turn")
        for name, data in responses:
            pair.special = data
            _answers(port, support.request("demo", "/", CLOSE))
            for canary in NAMES:
                if _answers(port, support.request(canary, "/canary", CLOSE)) != [(200, canary.encode())]:
                    wrong.append(f"{name}: a later visitor of {canary} got something else")
        wrong += pair.misrouted()
    count = len(requests) + len(responses) + 2 * ALTERNATING
    return Measured(f"{len(wrong)} of {count:,}" + "".join(f"; {text}" for text in wrong[:2]), not wrong)
