"""Asking clients for tokens: who is let in, and who is sent away when the file of tokens changes."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

import gevent

from ..errors import RefusedError, TryLaterError, UsageError
from ..registry import Permit, Registry, Tunnel
from ..wire.handshake import OpenRequest
from .account import ANYBODY, Account, Limits
from .config import ServerConfig
from .penalties import MISSING, WRONG, Penalties, source_of
from .tally import Refusal, Tally
from .tokens import Rules, Token, TokenPermit, read_tokens

log = logging.getLogger("tinytun_gevent.server")

NO_TOKEN: Final = "This server asks for a token; whoever runs it can give you one"
WRONG_TOKEN: Final = "This token is not known here; it may have been revoked"
EXPIRED: Final = "This token has expired"
REVOKED: Final = "the token was revoked"

Signature = tuple[int, int, int, int]


class Gate:
    """Decides on every CONNECT, and follows AUTH_FILE. It is watched by the server's clock.

    Without AUTH_FILE everybody is let in. With one, what was read last stays in force while the file is
    missing or makes no sense, and the log says so once for each time that it changed.
    """

    def __init__(
        self,
        config: ServerConfig,
        registry: Registry,
        tally: Tally,
        is_trusted: Callable[[str], bool],
        *,
        anybody: Account = ANYBODY,
        limits: Limits | None = None,
    ) -> None:
        """Reads the file; raises UsageError if it is not as it must be.

        ``anybody`` opens tunnels where nobody is asked for a token; his ``each``, and ``limits``, are for
        what the file does not say. Addresses that ``is_trusted`` are a proxy's: what comes from there are
        many people, who do not pay for one another.
        """
        self._path = config.auth_file
        self._reserved = config.reserved_names
        self._registry = registry
        self._tally = tally
        self._is_trusted = is_trusted
        self._anybody = anybody
        self._limits = limits or Limits()
        self._penalties = Penalties()
        self._signature = self._look()
        self._rules = Rules(self._read(), self._reserved)
        #: From when on, in seconds since the epoch, a tunnel may have to end; 0: at the next look.
        self._review_at = 0.0
        self._reading: gevent.Greenlet[[], None] | None = None
        #: Gets each tunnel whose opener may not have it any more, with the reason; must not block.
        self.end: Callable[[Tunnel, str], None] = _nothing

    @property
    def is_open(self) -> bool:
        """Whether everybody is let in."""
        return not self._path

    # -- who is let in --------------------------------------------------------

    def admit(self, request: OpenRequest, ip: str) -> Account:
        """Who sends ``request`` from ``ip`` (unmapped). Raises RefusedError: 401, or 429 for who has guessed.

        While an address is turned away a right token does not help either, or guessing would be as fast as
        before; but whoever has come with it from there already is let in, so that one broken client does
        not shut out an office. Nor does the answer, or the time to wait, tell whether a token was right.
        """
        if self.is_open:
            return self._anybody
        token = None if request.token is None else self._rules.find(request.token)
        source = None if self._is_trusted(ip) else source_of(ip)
        now = time.monotonic()
        if source is not None and not (token and self._penalties.is_friend(source, token.id)):
            self._turn_away(source, MISSING if request.token is None else WRONG, now)
        if token is not None and not token.has_expired(datetime.now(UTC)):
            if source is not None:
                self._penalties.befriend(source, token.id)
            return token.account
        if source is not None:
            guessed = token is None and request.token is not None
            self._penalties.add(source, WRONG if guessed else MISSING, now)
        self._tally.refuse(Refusal.TOKEN)
        if request.token is None:
            raise RefusedError(NO_TOKEN, 401)
        raise RefusedError(EXPIRED if token is not None else WRONG_TOKEN, 401)

    def _turn_away(self, source: str, cost: float, now: float) -> None:
        """Raises TryLaterError while ``source`` has to wait, to which this attempt adds ``cost`` seconds."""
        if self._penalties.left(source, now):
            self._penalties.add(source, cost, now)
            self._tally.refuse(Refusal.PENALTY)
            wait = math.ceil(self._penalties.left(source, now))
            raise TryLaterError(f"Too many attempts without a good token; wait {wait} s", 429, wait)

    def permit(self, account: Account) -> Permit:
        """Which names the account may have."""
        return TokenPermit(self._rules, self._rules.get(account.id))

    def account_of(self, opener: str) -> Account | None:
        """Who the opener of a tunnel is that was remembered; None if he is not known (any more)."""
        token = self._rules.get(opener)
        return token.account if token is not None else None

    # -- the file -------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Looks whether the file has changed, and whose time is over."""
        if self.is_open:
            return
        if self._reading is None:
            signature = self._look()
            if signature != self._signature:
                self._signature = signature
                self._reading = gevent.spawn(self._reload)
        if time.time() >= self._review_at:
            self._review()

    def _look(self) -> Signature | None:
        """What tells one state of the file from another; None if there is no file."""
        if self.is_open:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[Token, ...]:
        """Blocks its thread."""
        return () if self.is_open else read_tokens(self._path, self._limits, self._anybody.each)

    def _reload(self) -> None:
        """The greenlet that reads a file that has changed, in a thread."""
        try:
            tokens = gevent.get_hub().threadpool.apply(self._try_to_read)
        finally:
            self._reading = None
        if isinstance(tokens, UsageError):
            log.error("%s; the tokens that were read before stay in force", tokens)
            return
        self._rules = Rules(tokens, self._reserved)
        log.info("AUTH_FILE=%s: tokens in force: %d", self._path, len(tokens))
        self._review()

    def _try_to_read(self) -> tuple[Token, ...] | UsageError:
        """As `_read`, but an error is returned: one that leaves a thread is printed with its stack."""
        try:
            return self._read()
        except UsageError as error:
            return error

    def _review(self) -> None:
        """Ends what may not go on, and lets the rest have what the file says now."""
        now = datetime.now(UTC)
        following = self._rules.next_expiry(now)
        self._review_at = math.inf if following is None else following.timestamp()
        for tunnel in list(self._registry.tunnels.values()):
            if not tunnel.opener:
                continue  # from when nobody was asked: his name waits for him until its lease is over
            token = self._rules.get(tunnel.opener)
            if token is None:
                reason = REVOKED
            elif token.has_expired(now):
                reason = "the token has expired"
            else:
                reason = self._rules.why_not(token, tunnel.name)
                tunnel.account = token.account
            if reason:
                self.end(tunnel, reason)


def _nothing(tunnel: Tunnel, reason: str) -> None:
    """Nobody serves tunnels yet."""
