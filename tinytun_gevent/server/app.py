"""A whole server: its listening sockets, what serves them, how it starts and stops.

`Serving` is a server in the hub that runs it; gunicorn's worker uses it with the master's
sockets. `TunnelServer` is the same without gunicorn, inside any program.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import gevent
from gevent import socket

from ..background import run_in_hub
from ..errors import TunnelError
from ..rare import Rare, sum_up
from ..registry import Record, Registry
from ..sockets import keep_alive
from . import tokens
from .accepting import Acceptor
from .accesslog import AccessLog
from .addresses import listen_all, plain
from .config import ServerConfig, metadata_url, server_url
from .core import ServerCore
from .edge import Edge
from .entrance import Entrance
from .handover import Predecessor, Successor
from .https import HttpsPort
from .leases import Leases
from .listener import Listener
from .metadata import MetadataApp
from .sight import Sight
from .tcp import TcpFront
from .tunnels import Tunnels

if TYPE_CHECKING:
    from .metadata_host import MetadataHost
    from .metadata_plain import PlainHost

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

LAST_WORDS: Final = 0.25
"""Seconds that connections get to end by themselves when everything is over, and again when told to."""

Handler = Callable[[socket.socket, tuple[str, int]], None]


class Serving:
    """One server on sockets that listen already, in the order of `ServerConfig.listeners`.

    The sockets belong to it from now on. Create it in the hub that serves; `start` it, and
    `stop` it once.
    """

    def __init__(self, config: ServerConfig, sockets: Sequence[socket.socket]) -> None:
        ports = [int(sock.getsockname()[1]) for sock in sockets]
        #: The configuration with the real ports.
        self.config = config.with_ports(ports)
        self.core = core = ServerCore(self.config)
        entrance = Entrance(core)
        tunnels = self._tunnels = Tunnels(core)
        listener, edge, tcp = Listener(core, entrance, tunnels), Edge(core), TcpFront(core)
        core.fronts = [listener, edge, tcp]
        self._edge, self._tcp = edge, tcp
        self._https = HttpsPort(core, entrance, edge)
        self._following: gevent.Greenlet[[Predecessor], None] | None = None
        self._leases = Leases(core.registry, core.storage, tunnels.release)
        self._access_log = AccessLog(config.access_log) if config.access_log else None
        #: What the operator sees.
        self.sight = Sight(core, self._connections, self._accepts)
        self._metadata = _metadata_host(MetadataApp(self.sight))
        handlers: list[Handler] = [
            partial(self._metadata.serve, sockets[0]),
            listener.handle,
            edge.handle,
            tcp.handle,
        ]
        raw = [False, False, True, True]
        if config.tls_dir:
            handlers.append(self._https.handle)
            raw.append(True)
        for visitors in (sockets[2], *sockets[4:]):
            keep_alive(visitors)
        self._servers: list[Acceptor] = []
        for sock, handler, is_raw in zip(sockets, handlers, raw, strict=True):
            sock.setblocking(False)
            serve = partial(_serve, handler)
            self._servers.append(Acceptor(sock, serve, core.workers, config.max_connections, raw=is_raw))

    def start(self, predecessor: Predecessor | None = None, *, strict: bool = False) -> None:
        """Begins to accept connections; does not block.

        ``strict``: raises UsageError where a file says nothing now that another process, which serves, has
        read: who has access, or a certificate. So it is with a ``predecessor``.

        The names of the last process wait for their owners, and so do the visitors who ask for them;
        the ports of TCP tunnels are its own where it is still there to pass them on.
        """
        self.core.start()
        if (strict or predecessor is not None) and (problem := self.core.problem()) is not None:
            raise problem
        records, ports = (predecessor.records, predecessor.ports) if predecessor else (None, {})
        self._tunnels.restore(self._leases.start(records), ports)
        self.core.auth.on_change = self._tunnels.review
        self._tunnels.review(spares=not self.core.auth.is_settled)
        self.core.clock.watch(self._leases)
        self.sight.lag.start()
        if self._access_log is not None:
            self._access_log.file.reopen()  # so that whoever cannot be written is told of at once
            self.core.observers.append(self._access_log)
            self.core.clock.watch(self._access_log.file)
        for server in self._servers:
            server.start()

    # -- what the operator sees -------------------------------------------------

    def _connections(self) -> dict[str, int]:
        """Connections that are served now, by port."""
        names = [variable.lower().removesuffix("_port") for variable, _, _ in self.config.listeners()]
        counts = [server.connections for server in self._servers]
        return {**dict(zip(names, counts, strict=True)), "tcp": self._tunnels.ports.connections}

    def _accepts(self) -> bool:
        """Whether everybody gets in on all ports; the metadata API's own is not asked for."""
        return all(server.accepts for server in self._servers[1:])

    def reopen_logs(self) -> None:
        """The files have been moved away: goes on with new ones."""
        if self._access_log is not None:
            self._access_log.file.reopen()

    def close_logs(self) -> None:
        """Writes what has not been written yet; idempotent."""
        if self._access_log is not None:
            self._access_log.file.close()

    # -- from one process to the next -----------------------------------------

    def follow(self, predecessor: Predecessor) -> None:
        """Goes on with the visitors of the process before, for as long as it passes any on; never blocks."""
        self._following = gevent.spawn(self._welcome, predecessor)

    def _welcome(self, predecessor: Predecessor) -> None:
        for sock, moved in predecessor.visitors():
            front = self._edge if moved.port is None else self._tcp
            self.core.workers.spawn(front.go_on, sock, moved)

    def pause(self) -> tuple[list[Record], dict[int, int]]:
        """Stops accepting; see `handover.Old`."""
        for server in self._servers:
            server.pause()
        return self.core.registry.records(), self._tunnels.ports.pause()

    def resume(self) -> None:
        """Accepts again."""
        for server in self._servers:
            server.resume()
        self._tunnels.ports.resume()

    def hand_over(self, successor: Successor) -> None:
        """Says goodbye to the clients, and lets visitors move when their exchanges are over."""
        self._leases.abandon()
        self.core.successor = successor
        for server in self._servers:
            server.close()
        self.core.begin_drain()

    def stop(self, deadline: float) -> bool:
        """Stops accepting at once, drains until ``deadline`` (monotonic seconds), closes everything.

        Blocks. Returns whether all exchanges ended by themselves. The metadata API answers to the end,
        unless another process does already: a load balancer is to hear that this one is not ready.
        """
        metadata, *others = self._servers
        for server in others:
            server.close()
        self._leases.freeze()
        ended = self.core.drain(deadline)
        if self.core.successor is not None:  # those that are moving count as nothing that runs
            if self._following is not None:
                self._following.join(max(0.0, deadline - time.monotonic()))
            self._https.wait_arrived(deadline - time.monotonic())
            self._edge.wait_gone(deadline - time.monotonic())
        metadata.close()
        self._metadata.close()
        self.sight.lag.stop()
        self.core.workers.join(LAST_WORDS)
        self.core.workers.kill()
        self.core.workers.join(LAST_WORDS)
        self.close_logs()
        sum_up()
        return ended


def _metadata_host(app: MetadataApp) -> MetadataHost | PlainHost:
    """What speaks HTTP for the metadata API: gunicorn, or where it cannot be imported a stand-in."""
    if os.name == "posix":
        from .metadata_host import MetadataHost as Host
    else:
        from .metadata_plain import PlainHost as Host  # type: ignore[assignment]
    return Host(app)


def _serve(handler: Handler, sock: socket.socket, address: Any) -> None:
    """Runs a handler; an error of ours ends that connection only."""
    try:
        handler(sock, plain(address))
    except TunnelError as error:
        rare.warning("connection from %s: %s", plain(address)[0], error)
    except Exception:
        rare.exception("connection from %s failed", plain(address)[0])


class TunnelServer:
    """A server inside this program, open for the length of a ``with`` block::

        with TunnelServer(bind="127.0.0.1", connection_port=0, proxy_port=0, tcp_proxy_port=0,
                          metadata_port=0, base_domains="localhost") as server:
            print(server.url)            # for clients: Tunnel(3000, server=server.url)

    Works in a program that gevent has monkey-patched and in one that it has not; there,
    everything runs in one background thread. A port of 0 is chosen by the system.
    """

    def __init__(self, config: ServerConfig | None = None, **overrides: Any) -> None:
        """``overrides`` are fields of `ServerConfig`, as values or as text; environment
        variables are not read. Raises UsageError for what makes no sense; binds nothing yet.
        """
        self.config = dataclasses.replace(config or ServerConfig(), **overrides)
        self._serving: Serving | None = None

    def start(self) -> Self:
        """Binds the ports and serves. Raises UsageError, with nothing left bound, if one cannot be, or if
        ``auth_file`` cannot be read."""
        if self._serving is None:
            run_in_hub(self._start)
        return self

    def _start(self) -> None:
        if self.config.auth_file:
            tokens.read(self.config)
        native = listen_all(self.config.listeners(), self.config.backlog)
        sockets = [socket.socket(sock.family, sock.type, sock.proto, sock.detach()) for sock in native]
        serving = Serving(self.config, sockets)
        serving.start()
        self._serving, self.config = serving, serving.config

    def stop(self, drain: float = 0.0) -> None:
        """Stops accepting, lets running exchanges finish for up to ``drain`` seconds, closes all.

        Blocks; idempotent.
        """
        serving, self._serving = self._serving, None
        if serving is not None:
            run_in_hub(serving.stop, time.monotonic() + drain)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def core(self) -> ServerCore:
        """What the server's parts share. In a program that is not patched, only to be read."""
        if self._serving is None:
            raise RuntimeError("the server has not been started")
        return self._serving.core

    @property
    def registry(self) -> Registry:
        """The tunnels that are open."""
        return self.core.registry

    @property
    def connection_port(self) -> int:
        """The port that clients connect to; like the others the real one, once started."""
        return self.config.connection_port

    @property
    def proxy_port(self) -> int:
        return self.config.proxy_port

    @property
    def tcp_proxy_port(self) -> int:
        return self.config.tcp_proxy_port

    @property
    def proxy_tls_port(self) -> int:
        """Nobody listens on it without TLS_DIR."""
        return self.config.proxy_tls_port

    @property
    def metadata_port(self) -> int:
        return self.config.metadata_port

    @property
    def url(self) -> str:
        """The server's URL for a client on this machine, such as ``http://127.0.0.1:5554``."""
        return server_url(self.config)

    @property
    def metadata_url(self) -> str:
        """Where the metadata API is reached on this machine, without a trailing slash."""
        return metadata_url(self.config)

    def url_of(self, name: str) -> str:
        """The public URL of the HTTP tunnel ``name``."""
        return self.config.url_of(name)
