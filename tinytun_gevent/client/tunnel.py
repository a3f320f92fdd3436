"""The library's client: a tunnel as a context manager."""

from __future__ import annotations

import os
from dataclasses import replace
from types import TracebackType

from ..background import run_in_hub
from .agent import GRACE, Agent
from .config import DEFAULT_CONCURRENCY, DEFAULT_SESSIONS, ClientConfig, make_config
from .events import Counters, Listener, State


class Tunnel:
    """A tunnel that is open for the length of a ``with`` block::

        with Tunnel(3000, server="https://tunnel.example:5554", subdomain="app") as tunnel:
            print(tunnel.url)       # the public reaches localhost:3000 there
            ...

    Works in a program that is monkey-patched by gevent and in one that is not; there, everything runs
    in one background thread. It reconnects by itself for as long as it is open.
    """

    def __init__(
        self,
        target: str | int,
        *,
        kind: str = "http",
        server: str | None = None,
        subdomain: str | None = None,
        port: int | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
        sessions: int = DEFAULT_SESSIONS,
        host_header: str | None = None,
        forwarded_host: bool = True,
        rewrite_links: bool | None = None,
        ca: str | os.PathLike[str] | None = None,
        insecure: bool = False,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        proxy: str | None = None,
        verify_target: str = "auto",
        timeout: float | None = 30.0,
        events: Listener | None = None,
    ) -> None:
        """The arguments are the options of ``tinytun http`` and ``tinytun tcp`` (see README).

        ``server`` None means ``TINYTUN_SERVER_URL``, or the one that ``tinytun login`` has kept; ``proxy``
        None means ``HTTPS_PROXY``, ``token`` None
        ``TINYTUN_TOKEN`` or what ``tinytun login`` has kept. ``timeout`` is
        in seconds, for the first connection; None waits for ever. Raises UsageError for a value that makes
        no sense; connects to nothing yet.
        """
        config = make_config(
            str(target),
            kind=kind,
            server=server,
            subdomain=subdomain,
            port=port,
            concurrency=concurrency,
            sessions=sessions,
            host_header=host_header,
            forwarded_host=forwarded_host,
            rewrite_links=rewrite_links,
            ca=ca,
            insecure=insecure,
            token=token,
            token_file=token_file,
            proxy=proxy,
            verify_target=verify_target,
        )
        self._setup(config, timeout, events)

    @classmethod
    def from_config(
        cls, config: ClientConfig, *, timeout: float | None = 30.0, events: Listener | None = None
    ) -> Tunnel:
        """A tunnel for a config that is already checked."""
        tunnel = cls.__new__(cls)
        tunnel._setup(config, timeout, events)
        return tunnel

    def _setup(self, config: ClientConfig, timeout: float | None, events: Listener | None) -> None:
        self.config = config
        self._timeout = timeout
        self._events = events
        #: None until `open`; touched by the hub only, but for reading.
        self._agent: Agent | None = None

    def open(self) -> None:
        """Connect; blocks until the tunnel is up.

        Raises UnreachableError after ``timeout`` seconds, and at once what ends every
        attempt: RefusedError, NameTakenError, UsageError. Nothing is left running then.
        """
        if self._agent is not None:
            raise RuntimeError("the tunnel is already open")
        run_in_hub(self._open)

    def _open(self) -> None:
        agent = self._agent = Agent(replace(self.config, wait=True), self._events)
        agent.start()
        try:
            agent.wait_connected(self._timeout)
        except BaseException:
            self._agent = None
            agent.stop(grace=0)
            raise

    def close(self, grace: float = GRACE) -> None:
        """Let running exchanges finish for up to ``grace`` seconds, then disconnect; blocks. Idempotent."""
        agent, self._agent = self._agent, None
        if agent is not None:
            run_in_hub(agent.stop, grace)

    def wait(self) -> None:
        """Block until the tunnel ends for good; raises what ended it. `close` ends it, too."""
        run_in_hub(self._opened().wait)

    @property
    def url(self) -> str:
        """Where the public reaches the tunnel, without a trailing slash."""
        url = self._opened().url
        assert url is not None  # `open` returns when there is one
        return url

    @property
    def state(self) -> State:
        """What the tunnel is doing: connected, reconnecting, …"""
        return State.CLOSED if self._agent is None else self._agent.state

    @property
    def counters(self) -> Counters:
        """Visitors now and ever, and the bytes both ways."""
        return self._opened().counters

    def __enter__(self) -> Tunnel:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Agent:
        if self._agent is None:
            raise RuntimeError("the tunnel is not open")
        return self._agent
