"""What an agent is doing, and who is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .observe import Asked, Exchange


class State(StrEnum):
    """What the agent is doing."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSING = "closing"
    CLOSED = "closed"


class Listener:
    """What an agent reports; override what you want. Nothing in it may block."""

    #: Whether `exchange` is wanted: watching costs a little on each request.
    wants_exchanges = False

    def url(self, url: str) -> None:
        """The tunnel is reachable at ``url``; called first, and when it becomes another one."""

    def state(self, state: State, reason: str) -> None:
        """The state is another one, or its reason is: why the last attempt failed."""

    def warning(self, text: str) -> None:
        """Something that the user should know and that does not stop the tunnel."""

    def local_down(self, problem: str) -> None:
        """The local service stopped answering; said once, not once a visitor."""

    def local_up(self) -> None:
        """The local service answers again."""

    def asked(self, asked: Asked) -> None:
        """An HTTP request has begun; only if exchanges are wanted."""

    def over(self, asked: Asked) -> None:
        """That request waits no longer: it is answered, or its visitor has left."""

    def exchange(self, exchange: Exchange) -> None:
        """An HTTP request was answered."""

    def bad_answer(self, problem: str) -> None:
        """A visitor could not be given what the local service answered."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What has passed: visitors now and ever (streams), and bytes towards and from the service."""

    visitors: int
    total: int
    bytes_in: int
    bytes_out: int
