"""Who may open a tunnel: everybody, or on a server with a file of tokens who has one of those."""

from __future__ import annotations

import hmac
import logging
import math
import time
from collections.abc import Callable
from typing import Final

import gevent

from ..background import in_a_thread
from ..errors import RefusedError, TryLaterError, UsageError
from ..filechange import EMPTY_SECONDS, FileChange, Mark, Verdict, mark_of
from ..rights import Names, Reservations, Rights
from . import authfile, tokens
from .account import Account
from .authfile import Grant
from .config import ServerConfig
from .former import LATELY, Former
from .penalties import Penalties
from .tally import Refusal, Tally

log = logging.getLogger("tinytun_gevent.server")

NO_TOKEN: Final = "This server asks for a token"
WRONG_TOKEN: Final = "The token is not valid here"
EXPIRED_TOKEN: Final = "The token has expired"
NOT_READY: Final = "This server does not know its tokens at the moment"

TRY_AGAIN: Final = 5.0
"""Seconds after which a client comes back to a server that could not read its tokens: somebody repairs that
by hand."""

YOUNG: Final = 2.0
"""Seconds for which a file that is found at the start may still be being written: two looks."""


class Auth:
    """Tells who asks for a tunnel, by his token.

    It is watched by the server's clock, and so follows changes of the file, as `filechange` has them: within
    three seconds, because a tick comes each second. A file that makes no sense leaves everything as it was.
    """

    def __init__(self, config: ServerConfig, tally: Tally, exempt: Callable[[str], bool]) -> None:
        """``exempt`` addresses are never made to wait: behind a proxy are many."""
        self._config = config
        self._tally = tally
        self._exempt = exempt
        self._path = config.auth_file
        self._penalties = Penalties()
        self._former = Former()
        reserved = Rights(Reservations(Names(config.reserved_names)))
        self._anybody = Account(each=config.tunnel_limits, rights=reserved)
        #: By the SHA-256 of the token, and by the account's id.
        self._grants: dict[str, Grant] = {}
        self._accounts: dict[str, Grant] = {}
        self._change = FileChange()
        self._reading: gevent.Greenlet[[Mark | None], None] | None = None
        #: What the file was when it was read at the start, if another look has to tell whether that was all.
        self._first: Mark | None = None
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

    @property
    def is_settled(self) -> bool:
        """Whether what was read at the start is known to be the whole file.

        Until then nobody who is not in it has lost anything; `on_change` is called when it is.
        """
        return self._first is None

    def load(self) -> None:
        """Reads the file for the first time; blocks on the disk.

        With a :attr:`problem` nobody has access, and whoever asks is to come back: so it is with a file that
        is empty, and was changed within the last `EMPTY_SECONDS`.
        """
        if not self._path:
            return
        mark, wall = mark_of(self._path), time.time()
        if mark is not None and mark.is_empty and mark.is_new(wall, EMPTY_SECONDS):
            self._change.look(mark, time.monotonic())
            self.problem = UsageError(f"AUTH_FILE={self._path}: it is empty since a moment ago")
            log.error("%s; nobody has access", self.problem)
            return
        if mark is not None and mark.is_new(wall, YOUNG):
            self._first = mark
            self._change.look(mark, time.monotonic())
        else:
            self._change.take(mark)
        try:
            read = self._try(lambda: tokens.read_settled(self._config, mark))
        except tokens.UnsteadyFileError as error:
            self.problem = UsageError(f"AUTH_FILE={self._path}: {error}")
            log.error("%s; nobody has access", self.problem)
        else:
            if read and mark is not None and mark.is_empty:
                log.warning("AUTH_FILE=%s is empty; nobody has access", self._path)

    def tick(self, now: float) -> None:
        """Looks whether the file has changed, and whether a token has expired."""
        if not self._path:
            return
        if self._reading is None:
            self._look(mark_of(self._path), now)
        wall, before = time.time(), self._wall
        self._wall = wall
        if wall > self._next_expiry:
            self._plan_expiry()
            self._changed()
        elif wall < before:  # what had expired is valid again, and expires again
            self._plan_expiry()

    def _look(self, mark: Mark | None, now: float) -> None:
        verdict = self._change.look(mark, now)
        if verdict is Verdict.EMPTY:
            text = "AUTH_FILE=%s is empty; %s, and it counts if it stays so for %.0f s"
            log.warning(text, self._path, self._meanwhile, EMPTY_SECONDS)
        elif verdict is Verdict.READ and mark is not None and mark == self._first:
            self._first = None
            self._change.take(mark)
            self._changed()
        elif verdict is Verdict.READ:
            self._reading = gevent.spawn(self._reload, mark)

    def _reload(self, mark: Mark | None) -> None:
        try:
            # TOML is read at about a megabyte a second. Who is shut out is not to wait for other threads.
            read = self._try(
                lambda: in_a_thread(lambda: tokens.read_settled(self._config, mark), of_its_own=True)
            )
            self._change.take(mark)
            self._first = None
            if read and mark is not None and mark.is_empty:
                log.warning("AUTH_FILE=%s has been empty for a while; nobody has access", self._path)
            elif read:
                log.info("AUTH_FILE=%s: read again, %d tokens", self._path, len(self._grants))
            if read:
                self._changed()
        except tokens.UnsteadyFileError:
            pass  # the next look begins anew
        finally:
            self._reading = None

    def _try(self, read: Callable[[], list[Grant]]) -> bool:
        try:
            grants = read()
        except UsageError as error:
            self.problem = error
            log.error("%s; %s", error, self._meanwhile)
            return False
        self.problem, self.is_ready = None, True
        before = self._accounts
        self._grants = {grant.sha256: grant for grant in grants}
        self._accounts = {grant.account.id: grant for grant in grants}
        for id in before.keys() - self._accounts.keys():
            self.remember(id)
        self._plan_expiry()
        return True

    @property
    def _meanwhile(self) -> str:
        """What holds while the file cannot be used, for the log."""
        return "what it said before goes on" if self._grants else "nobody has access"

    def _plan_expiry(self) -> None:
        # Expiry is a date of the calendar's, which only the wall clock knows.
        now = time.time()
        ahead = (grant.expires for grant in self._grants.values() if grant.expires is not None)
        self._next_expiry = min((expires for expires in ahead if expires >= now), default=math.inf)

    def _changed(self) -> None:
        if self.on_change is not None and self.is_settled:
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
        if not exempt and not self._is_former(token, grant):
            (self._penalties.guessed if token and grant is None else self._penalties.lapsed)(ip)
        raise RefusedError(NO_TOKEN if token is None else EXPIRED_TOKEN if grant else WRONG_TOKEN, 401)

    def account_of(self, id: str) -> Account | None:
        """The account that is called ``id``; None if it has no access (any more)."""
        if self.is_open:
            return self._anybody if not id else None
        grant = self._accounts.get(id)
        return None if grant is None or _expired(grant) else grant.account

    def remember(self, id: str) -> None:
        """The account that is called ``id`` had access until now, also if that is not known any more: a
        tunnel of its own was open when another process served."""
        self._former.add(id)

    def _is_former(self, token: str | None, grant: Grant | None) -> bool:
        """Whether a token that is not valid was until lately: showing it is neither guess nor lapse."""
        if token is None:
            return False
        if grant is not None and grant.expires is not None and time.time() - grant.expires < LATELY:
            return True
        return self._former.has(authfile.account_id(authfile.digest(token)))

    def _find(self, token: str) -> Grant | None:
        """The grant of a token. How long the search takes depends on the token's hash alone, which tells
        nobody how to get nearer to one that is valid."""
        digest = authfile.digest(token)
        grant = self._grants.get(digest)
        return grant if grant is not None and hmac.compare_digest(grant.sha256, digest) else None


def _expired(grant: Grant) -> bool:
    return grant.expires is not None and time.time() > grant.expires
