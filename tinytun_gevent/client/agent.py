"""Keeping one tunnel open: connect, serve its visitors, reconnect, stop.

::

    CONNECTING ──► CONNECTED ──► RECONNECTING ──► CONNECTED … ──► CLOSING ──► CLOSED
        └── a refusal that will not heal ends the agent with its error ──────────┘
"""

from __future__ import annotations

import time

import gevent
from gevent.event import Event

from ..errors import (
    NameTakenError,
    RefusedError,
    TryLaterError,
    TunnelError,
    UnreachableError,
)
from ..session import Session
from ..stream import REFUSED_STREAM, Stream
from ..wire.handshake import OpenReply, OpenRequest
from .backoff import Backoff
from .config import ClientConfig
from .confirming import warnings
from .crowd import Crowd
from .ending import why_ended
from .events import Counters, Listener, State
from .joining import Team
from .link import open_session
from .opening import is_final
from .patience import Patience
from .reasons import without_ids
from .sessions import Sessions
from .state import Claim
from .text import clean

#: Seconds that running exchanges get to finish when the agent stops.
GRACE = 5.0

#: Seconds for which a random name is asked for again while it is taken. The server notices
#: within 10 s that our old session is dead; what holds the name after a minute is not us.
RANDOM_NAME_PATIENCE = 60.0

#: Longest Retry-After that is honored, in seconds: what guessing at tokens costs an address at most. A server
#: that asks for more is wrong about it, and is asked again.
MAX_RETRY_AFTER = 300.0

#: Seconds after a loss for which a token that was good is shown again although the server refuses it: a file
#: of tokens that is being rewritten, or a server that reads a wrong one, is mended within moments.
TOKEN_PATIENCE = 60.0

#: Longest wait between two such tries, in seconds: a name is kept for its owner for 30.
TOKEN_PAUSE = 8.0


class StoppedError(TunnelError):
    """The agent was stopped before it was connected: nobody's fault."""


class Agent:
    """One tunnel's client. `run` blocks until `stop` is called or nothing can be done any more.

    ``url``, ``state``, ``since``, ``reason`` and `counters` may be read at any time, from
    any thread; everything else belongs to the hub that runs the agent.
    """

    def __init__(self, config: ClientConfig, events: Listener | None = None) -> None:
        """Connects to nothing yet. Raises UsageError for a target that cannot be reached at all."""
        self.config = config
        self._events = events or Listener()
        self._backoff = Backoff()
        self._patience = Patience(config)
        self._crowd = Crowd(config, self._events)
        self.local = self._crowd.local
        name = config.subdomain or config.port
        #: What says that the name is ours.
        self._claim = Claim(config.state_dir, config.server.authority, config.kind, name)
        #: Where the public reaches the tunnel; None until it was connected once.
        self.url: str | None = None
        self.state = State.CONNECTING
        #: When `state` began, on the monotonic clock.
        self.since = time.monotonic()
        #: Why the state is not CONNECTED, one line, empty if there is nothing to say.
        self.reason = ""
        #: The error that ended the agent, if one did.
        self.error: Exception | None = None
        #: Set while the tunnel is connected.
        self.connected = Event()
        #: What the server granted last: the name or port to ask for again.
        self._granted: OpenReply | None = None
        #: Since when that has been somebody else's, on the monotonic clock; None while it is not known to be.
        self._taken_since: float | None = None
        self._sessions = Sessions(config)
        #: Those of the tunnel that was opened last.
        self._team: Team | None = None
        self._stopping = False
        #: Whether the tunnel was connected when it was stopped.
        self._had_name = False
        self._ended = Event()
        self._warned: set[str] = set()
        self._main: gevent.Greenlet[[], None] | None = None

    # -- running ------------------------------------------------------------

    def start(self) -> None:
        """Begin to connect, in a greenlet of its own. Returns at once."""
        self._main = gevent.spawn(self._keep_connected)

    def run(self) -> None:
        """Serve until stopped; blocks. Raises the error that ended the agent, if one did."""
        self.start()
        self.wait()

    def wait(self) -> None:
        """Block until the agent has ended; raises as `run` does."""
        self._ended.wait()
        if self.error is not None:
            raise self.error

    def wait_connected(self, timeout: float | None = None) -> None:
        """Block until the tunnel is connected, at most ``timeout`` seconds.

        Raises the error that ended the agent, StoppedError if it was stopped, UnreachableError with
        what has failed until now.
        """
        gevent.wait([self.connected, self._ended], timeout, count=1)
        if self.error is not None:
            raise self.error
        if self._stopping:
            raise StoppedError("stopped before it was connected")
        if not self.connected.is_set():
            reason = self.reason or "no answer"
            raise UnreachableError(f"no tunnel through {self.config.server.authority}: {reason}")

    def stop(self, grace: float = GRACE) -> None:
        """Take no new visitors, let running ones finish for ``grace`` seconds, say goodbye; blocks.

        The name is free when this returns. Idempotent; a second call with no grace cuts a
        first one short.
        """
        self._had_name = self._had_name or self.connected.is_set()
        self._stopping = True
        if self._main is not None:
            self._main.kill()  # before the sessions are counted: it may have begun another one
        if self._team is not None:
            self._team.close()
        if self._sessions:
            self._enter(State.CLOSING, "")
        heard = self._sessions.dissolve(grace, self._crowd.idle)
        self._crowd.disperse()
        self._claim.release(freed=self._had_name and heard)
        self._enter(State.CLOSED, "")
        self._ended.set()

    @property
    def tries_for(self) -> float | None:
        """Seconds for which the server is tried yet; None while connected, or for ever."""
        return self._patience.left() if self.state in (State.CONNECTING, State.RECONNECTING) else None

    @property
    def counters(self) -> Counters:
        """What has passed until now."""
        return self._crowd.counters

    # -- connecting ---------------------------------------------------------

    def _keep_connected(self) -> None:
        try:
            self._connect_and_serve()
        except Exception as error:  # raised again by `wait`; a greenlet would print it
            self.error = error
            self._claim.release(freed=False)
            self._enter(State.CLOSED, clean(str(error), 300))
            self._ended.set()

    def _connect_and_serve(self) -> None:
        """Connect, serve, reconnect, until an error is final; raises it."""
        lost_at = time.monotonic()
        while True:
            self._patience.begin()
            try:
                session = self._connect()
            except TunnelError as error:
                self._note_failure(error, lost_at)
                delay = max(self._delay_after(error), self._pause_after(error, lost_at))
            else:
                began = time.monotonic()
                stops = self._serve(session)
                lost_at = time.monotonic()
                self._patience.lost()
                if session.keep_alive.first_answer.is_set():
                    self._backoff.served(lost_at - began)
                delay = self._backoff.hand_over() if stops else self._backoff.next()
            left = self._patience.left()
            gevent.sleep(delay if left is None else min(delay, left))
            self._patience.check(self.reason)

    def _connect(self) -> Session:
        """One attempt; returns a session that has begun. Raises TunnelError; blocks."""
        with gevent.Timeout(self._patience.left(), UnreachableError(self.reason or "no answer")):
            request = self._request()
            session, self._granted, url = open_session(self.config, request, self._on_stream)
        self._patience.connected()
        self._claim.keep(self._granted.resume)
        for text in warnings(request, self._granted):
            self._warn_once(text)
        self._taken_since = None
        if self.url is None:
            self._crowd.look_at_service()
        if url != self.url:
            self.url = url
            self._events.url(url)
        return session

    def _serve(self, session: Session) -> bool:
        """Blocks until the tunnel takes no further visitors; whether that is because the server stops."""
        assert self._granted is not None
        team = self._team = Team(self.config, session, self._granted, self._on_stream, self._sessions)
        self.connected.set()
        try:
            self._enter(State.CONNECTED, "")
            team.over.wait()
        finally:
            self.connected.clear()
            team.close()
        reason = why_ended(team.last, self.config.server.authority, team.said, team.stops)
        if team.replaced:
            reason = "another client that has the same token took the name"
            self._claim.drop()  # shown again, it would take the name from the other, and so on for ever
            self._warn_once(f"{reason}; are there two with copies of one state directory?")
        if not self._stopping:
            self._enter(State.RECONNECTING, clean(reason))
        return team.stops

    def _note_failure(self, error: TunnelError, lost_at: float) -> None:
        """After a failed attempt: raises if no other one is to follow."""
        if is_final(error, first=self.url is None) and not self._may_pass(error, lost_at):
            raise error
        if isinstance(error, NameTakenError):
            now = time.monotonic()
            self._taken_since = now if self._taken_since is None else self._taken_since
            if now - self._taken_since >= RANDOM_NAME_PATIENCE:
                self._granted = None  # asks for any name, unless the user wants this one
                self._claim.drop()
        self._patience.failed(error)
        state = State.CONNECTING if self.url is None else State.RECONNECTING
        self._enter(state, clean(str(error), 300))
        self._patience.check(self.reason)

    def _may_pass(self, error: TunnelError, lost_at: float) -> bool:
        """Whether ``error`` refuses a token that was good until ``lost_at``, which may be a mistake."""
        team = self._team
        return (
            isinstance(error, RefusedError)
            and error.status == 401
            and team is not None
            and not team.access_ended
            and time.monotonic() - lost_at < TOKEN_PATIENCE
        )

    def _pause_after(self, error: TunnelError, lost_at: float) -> float:
        """Seconds at least until a refused token is shown again: as many as have passed since the loss.

        A server that has forgotten it counts such tries as guesses, for which its address has to wait.
        """
        return min(time.monotonic() - lost_at, TOKEN_PAUSE) if self._may_pass(error, lost_at) else 0.0

    def _delay_after(self, error: TunnelError) -> float:
        """Seconds until the next attempt: at least as many as the server asked for."""
        delay = self._backoff.next()
        if isinstance(error, TryLaterError) and error.retry_after is not None:
            delay = max(delay, min(error.retry_after, MAX_RETRY_AFTER))
        return delay

    def _request(self) -> OpenRequest:
        """The same name or port as last time, a random one too."""
        config, granted = self.config, self._granted
        return OpenRequest(
            config.kind,
            config.server.authority,
            subdomain=config.subdomain or (granted.subdomain if granted else None),
            port=config.port or (granted.port if granted else None),
            host_header=config.host_header,
            options=config.options,
            reset_codes=True,
            resume=self._claim.show(),
            token=config.token,
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._events.warning(text)

    def _enter(self, state: State, reason: str) -> None:
        if state is self.state and without_ids(reason) == without_ids(self.reason):
            return
        if state is not self.state:
            self.since = time.monotonic()
        self.state, self.reason = state, reason
        self._events.state(state, reason)

    def _on_stream(self, stream: Stream) -> None:
        """A visitor has come. Called by the session's reader: must not block."""
        if self._sessions.has_room_for(stream):
            self._crowd.admit(stream)
        else:
            stream.reset(REFUSED_STREAM)
