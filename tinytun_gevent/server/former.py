"""Accounts that had access until lately: showing their tokens is no guess.

A client whose token is refused right after it lost its tunnel tries again for a minute, because a file of
tokens that is being rewritten revokes for a moment (`client.agent.TOKEN_PATIENCE`). Those tries must not make
its address wait. Nothing is given to whoever guesses: an account's id is half of the token's SHA-256, so
nobody shows a token of that id who has not been given it.
"""

from __future__ import annotations

import time
from typing import Final

LATELY: Final = 90.0
"""Seconds: the minute for which a client tries, which begins when it notices its loss, up to 10 s late."""

MOST: Final = 16_384
"""Accounts that are remembered, more than a file of tokens can have; 2 MB."""


class Former:
    """Remembers account ids, each for `LATELY` seconds from the last time that it was added."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        #: By id the monotonic second at which it is forgotten, in that order.
        self._until: dict[str, float] = {}

    def add(self, account: str, now: float | None = None) -> None:
        """Remembers the account that is called so; blank is nobody's id."""
        if not account:
            return
        self._until.pop(account, None)
        if len(self._until) >= self._most:
            del self._until[next(iter(self._until))]
        self._until[account] = (time.monotonic() if now is None else now) + LATELY

    def has(self, account: str, now: float | None = None) -> bool:
        """Whether the account is one of them."""
        return self._until.get(account, 0.0) > (time.monotonic() if now is None else now)
