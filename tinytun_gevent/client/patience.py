"""How long a server that does not answer is tried.

At the first start a name may be wrong, or a server not be there: whoever sits before it wants to know soon.
A tunnel that was up once is opened again however long that takes, and a service (``--wait``) from the start.
``--connect-timeout`` bounds every stretch without a tunnel instead.
"""

from __future__ import annotations

import time

from ..errors import TunnelError, UnreachableError
from .config import ClientConfig

#: Seconds for which a server is tried at the first start while it cannot be reached.
FIRST_START = 30.0


class Patience:
    """What is left of it, from `begin` on. Monotonic clock; touches nothing else."""

    def __init__(self, config: ClientConfig) -> None:
        self._server = config.server.authority
        self._limit = config.connect_timeout
        self._hint = ""
        #: Whether only a server that cannot be reached uses it up.
        self._first = config.connect_timeout is None and not config.wait
        if self._first:
            self._limit, self._hint = FIRST_START, " (--wait tries for ever)"
        self._since: float | None = None

    def begin(self) -> None:
        """An attempt begins, perhaps the first one of a stretch."""
        if self._since is None:
            self._since = time.monotonic()

    def connected(self) -> None:
        """The tunnel is up: from now on there is no first start."""
        if self._first:
            self._first, self._limit, self._hint = False, None, ""

    def lost(self) -> None:
        """The tunnel was lost just now."""
        self._since = time.monotonic()

    def failed(self, error: TunnelError) -> None:
        """An attempt came to ``error``: a server that says no for now is there, and may be waited for."""
        if self._first and not isinstance(error, UnreachableError):
            self._since = None

    def left(self) -> float | None:
        """Seconds until it is at an end; None for never, or not before another attempt."""
        if self._limit is None or self._since is None:
            return None
        return max(0.0, self._since + self._limit - time.monotonic())

    def check(self, reason: str) -> None:
        """Raises UnreachableError, with ``reason``, once it is at an end."""
        if self.left() == 0:
            raise UnreachableError(
                f"no tunnel through {self._server} within {self._limit:g} s: {reason}{self._hint}"
            )
