"""Who may open a tunnel: everybody, or on a server with a file of tokens who has one of those."""

from __future__ import annotations

import hmac
import logging
import math
import os
import time
from collections.abc import Callable
from typing import Final

import gevent

from ..background import in_a_thread
from ..errors import RefusedError, TryLaterError, UsageError
from ..rights import Names, Reservations, Rights
from . import authfile, tokens
from .account import Account
from .authfile import Grant
from .config import ServerConfig
from .penalties import Penalties
from .tally import Refusal, Tally

log = logging.getLogger("tinytun_gevent.server")

_Signature = tuple[int, int, int, int] | None

NO_TOKEN: Final = "This server asks for a token"
WRONG_TOKEN: Final = "The token is not valid here"
EXPIRED_TOKEN: Final = "The token has expired"
NOT_READY: Final = "This server does not know its tokens at the moment"

TRY_AGAIN: Final = 5.0
"""Seconds after which a client comes back to a server that could not read its tokens: somebody repairs that
by hand."""


class Auth:
    """Tells who asks for a tunnel, by his token.

    It is watched by the server's clock, and so follows changes of the file: within two seconds, because a
    tick comes each second. A file that makes no sense leaves everything as it was.
    """

    def __init__(self, config: ServerConfig, tally: Tally, exempt: Callable[[str], bool]) -> None:
        """``exempt`` addresses are never made to wait: behind a proxy are many."""
        self._config = config
        self._tally = tally
        self._exempt = exempt
        self._path = config.auth_file
        self._penalties = Penalties()
        reserved = Rights(Reservations(Names(config.reserved_names)))
        self._anybody = Account(each=config.tunnel_limits, rights=reserved)
        #: By the SHA-256 of the token, and by the account's id.
        self._grants: dict[str, Grant] = {}
        self._accounts: dict[str, Grant] = {}
        self._seen: _Signature = None
        self._reading: gevent.Greenlet[[], None] | None = None
        #: When the next token expires, in seconds since the epoch.
        self._next_expiry = math.inf
        #: What the wall clock said last: it may be set back.
        self._wall = time.time()
        #: Whether it is known who has access. A server that starts with a broken file does not.
        self.is_ready = self.is_open
        #: What is wrong with the file, if that was found when it was last read.
        self.problem: UsageError | None = None
        #: Called when somebody may do less, or more, than before; must not block.
        self.on_change: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether everybody may open tunnels."""
        return not self._path

    def load(self) -> None:
        """Reads the file for the first time; blocks on the disk.

        With a :attr:`problem` nobody has access, and whoever asks is to come back.
        """
        if self._path:
            self._seen = _signature(self._path)
            self._try(lambda: tokens.read(self._config))

    def tick(self, now: float) -> None:
        """Looks whether the file has changed, and whether a token has expired."""
        if not self._path:
            return
        if self._reading is None and (signature := _signature(self._path)) != self._seen:
            self._seen = signature
            self._reading = gevent.spawn(self._reload)
        wall, before = time.time(), self._wall
        self._wall = wall
        if wall > self._next_expiry:
            self._plan_expiry()
            self._changed()
        elif wall < before:  # what had expired is valid again, and expires again
            self._plan_expiry()

    def _reload(self) -> None:
        try:
            # TOML is read at about a megabyte a second. Who is shut out is not to wait for other threads.
            if self._try(lambda: in_a_thread(lambda: tokens.read(self._config), of_its_own=True)):
                log.info("AUTH_FILE=%s: read again, %d tokens", self._path, len(self._grants))
                self._changed()
        finally:
            self._reading = None

    def _try(self, read: Callable[[], list[Grant]]) -> bool:
        try:
            grants = read()
        except UsageError as error:
            self.problem = error
            log.error(
                "%s%s", error, "; what it said before goes on" if self._grants else "; nobody has access"
            )
            return False
        self.problem, self.is_ready = None, True
        self._grants = {grant.sha256: grant for grant in grants}
        self._accounts = {grant.account.id: grant for grant in grants}
        self._plan_expiry()
        return True

    def _plan_expiry(self) -> None:
        # Expiry is a date of the calendar's, which only the wall clock knows.
        now = time.time()
        ahead = (grant.expires for grant in self._grants.values() if grant.expires is not None)
        self._next_expiry = min((expires for expires in ahead if expires >= now), default=math.inf)

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    # -- asked by the listener ------------------------------------------------

    def authenticate(self, token: str | None, ip: str) -> Account:
        """Who shows ``token``, from the address ``ip``. Raises RefusedError (401) or TryLaterError (429; 503
        while nobody can be told from anybody else, which a 401 would make the end of every client).

        An address that waits learns nothing of a token that was not let in from there before.
        """
        if self.is_open:
            return self._anybody
        if not self.is_ready:
            self._tally.refuse(Refusal.SERVER)
            raise TryLaterError(NOT_READY, 503, TRY_AGAIN)
        exempt = self._exempt(ip)
        grant = None if token is None else self._find(token)
        known = grant is not None and self._penalties.knows(ip, grant.account.id)
        if not exempt and not known and (wait := self._penalties.wait(ip)):
            self._tally.refuse(Refusal.PENALTY)
            raise TryLaterError("Too many attempts without a valid token", 429, math.ceil(wait))
        if grant is not None and not _expired(grant):
            if not exempt:
                self._penalties.welcome(ip, grant.account.id)
            return grant.account
        self._tally.refuse(Refusal.TOKEN)
        if not exempt:
            (self._penalties.guessed if token and grant is None else self._penalties.lapsed)(ip)
        raise RefusedError(NO_TOKEN if token is None else EXPIRED_TOKEN if grant else WRONG_TOKEN, 401)

    def account_of(self, id: str) -> Account | None:
        """The account that is called ``id``; None if it has no access (any more)."""
        if self.is_open:
            return self._anybody if not id else None
        grant = self._accounts.get(id)
        return None if grant is None or _expired(grant) else grant.account

    def _find(self, token: str) -> Grant | None:
        """The grant of a token. How long the search takes depends on the token's hash alone, which tells
        nobody how to get nearer to one that is valid."""
        digest = authfile.digest(token)
        grant = self._grants.get(digest)
        return grant if grant is not None and hmac.compare_digest(grant.sha256, digest) else None


def _expired(grant: Grant) -> bool:
    return grant.expires is not None and time.time() > grant.expires


def _signature(path: str) -> _Signature:
    """What changes whenever the file does; None if it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
