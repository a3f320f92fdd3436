"""TCP tunnels: a listening port for each, and the front behind a PROXY protocol load balancer.

The stream is opened when the visitor connects, before he sends anything: ssh and SMTP
servers speak first.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gevent import socket

from tinytun_gevent.errors import (
    NameTakenError,
    ProxyHeaderError,
    SessionError,
    StreamLimitError,
)
from tinytun_gevent.rare import Rare
from tinytun_gevent.rate import Rate
from tinytun_gevent.registry import Tunnel
from tinytun_gevent.relay import SocketSink, relay
from tinytun_gevent.server import proxied
from tinytun_gevent.server.accepting import Acceptor
from tinytun_gevent.server.addresses import bracketed, listen, plain
from tinytun_gevent.server.handover import Moved
from tinytun_gevent.server.peers import Peer
from tinytun_gevent.server.routing import locate
from tinytun_gevent.server.tally import Refusal
from tinytun_gevent.server.upstream import PeerConnection
from tinytun_gevent.server.usage import TunnelBudget
from tinytun_gevent.server.watch import Reading
from tinytun_gevent.sockets import End, Socket, end_of
from tinytun_gevent.stream import Stream, Upstream
from tinytun_gevent.wire import proxyproto

if TYPE_CHECKING:
    from tinytun_gevent.server.core import ServerCore

log = logging.getLogger(__name__)
rare = Rare(log)

Address = tuple[str, int]

_TAKEN: Final = {
    errno.EADDRINUSE: "another program on the server's machine has it",
    errno.EACCES: "the server may not listen on it",
}
"""Why a port in the server's range cannot be had."""


class TcpPorts:
    """The listening ports of the TCP tunnels."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self._servers: dict[str, Acceptor] = {}
        self._visitors = TcpVisitors(core)
        #: Visitors' connections that came through these ports, those of tunnels that are closed too.
        self.connections = 0

    def listen(self, tunnel: Tunnel, descriptor: int | None = None) -> None:
        """Binds the tunnel's port, unless that is done or ``descriptor`` listens on it already.

        Raises ``NameTakenError`` if another program has it.
        """
        if tunnel.id in self._servers:
            return
        config = self._core.config
        sock = self._bind(tunnel) if descriptor is None else socket.socket(fileno=descriptor)
        sock.setblocking(False)

        def serve(visitor: Socket, address: Address) -> None:
            self.connections += 1
            try:
                end, source = end_of(visitor), plain(address)
                if self._core.connects is None or self._core.connects.wait_turn(source[0]):
                    self._visitors.serve(tunnel, end, source)
                else:
                    end.abort()
            finally:
                self.connections -= 1

        server = Acceptor(
            sock, serve, self._core.workers, config.max_connections, raw=True, door=_Door(tunnel)
        )
        server.start()
        self._servers[tunnel.id] = server

    def _bind(self, tunnel: Tunnel) -> socket.socket:
        config = self._core.config
        assert isinstance(tunnel.name, int)
        try:
            native = listen(config.bind, tunnel.name, config.backlog)
        except OSError as error:
            if error.errno in _TAKEN:
                raise NameTakenError(f"Port not available: {_TAKEN[error.errno]}") from error
            raise
        return socket.socket(native.family, native.type, native.proto, native.detach())

    def pause(self) -> dict[int, int]:
        """Stops accepting everywhere: the listening descriptors by port, which stay this process's."""
        for server in self._servers.values():
            server.pause()
        return {int(server.address[1]): server.socket.fileno() for server in self._servers.values()}

    def resume(self) -> None:
        """Accepts again."""
        for server in self._servers.values():
            server.resume()

    def close(self, tunnel: Tunnel) -> None:
        """Releases the tunnel's port at once; its visitors go on. Idempotent."""
        server = self._servers.pop(tunnel.id, None)
        if server is not None:
            server.close()

    def drain(self) -> None:
        """Stops listening everywhere."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()


class _Door:
    """Lets no more visitors in at a tunnel's port than it may have: others wait in the kernel's backlog."""

    def __init__(self, tunnel: Tunnel) -> None:
        self._tunnel = tunnel

    def is_shut(self, reopen: Callable[[], None]) -> bool:
        budget: TunnelBudget | None = self._tunnel.budget
        return budget is not None and budget.is_shut(reopen)

    def enter(self) -> Callable[[], None] | None:
        budget: TunnelBudget | None = self._tunnel.budget
        if budget is None:
            return None
        budget.enter()
        return budget.leave


class TcpFront:
    """Serves the TCP proxy port: a PROXY header names the tunnel by its destination port."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core
        self._visitors = TcpVisitors(core)

    def drain(self) -> None:
        """There is nothing idle here."""

    def go_on(self, sock: Socket, moved: Moved) -> None:
        """Serves a visitor who waited in another process for a tunnel's client. Blocks."""
        end = end_of(sock)
        tunnel = None if moved.port is None else self._core.registry.find_port(moved.port)
        if tunnel is None:
            end.abort()
        else:
            self._admit(tunnel, end, moved.address, moved.early)

    def handle(self, sock: Socket, address: Address) -> None:
        """Serves one connection until it ends; closes the socket. Blocks."""
        end = end_of(sock)
        caller = plain(address)[0]
        if not self._core.is_trusted(caller):
            self._core.strangers.refuse(caller, "TCP proxy")
            end.abort()
            return
        buffer = bytearray()
        watch = _HeaderWatch(end, self._core.config.proxy_header_timeout)
        self._core.clock.watch(watch)
        try:
            header = proxied.read(end, buffer)
        except (OSError, ProxyHeaderError) as error:
            self._core.tally.refuse(Refusal.PROXY_HEADER)
            rare.info("refused a connection of %s on the TCP proxy port: %s", caller, error)
            end.close()
            return
        finally:
            self._core.clock.forget(watch)
        if header.source is None or header.destination is None:
            end.close()
            return
        source, destination = plain(header.source), plain(header.destination)
        route = locate(self._core, destination[1], ask=not self._core.peers.is_peer(caller))
        if isinstance(route, Tunnel):
            self._admit(route, end, source, bytes(buffer))
        elif route is not None:
            self._send_to_peer(end, route, source, destination, bytes(buffer))
        else:
            end.abort()

    def _admit(self, tunnel: Tunnel, end: End, source: Address, early: bytes) -> None:
        """Serves a visitor as soon as his tunnel has room; nothing is read from him before. Blocks."""
        budget: TunnelBudget | None = tunnel.budget
        if budget is None:
            self._visitors.serve(tunnel, end, source, early)
        elif budget.wait_room(self._core.config.queue_timeout):
            try:
                self._visitors.serve(tunnel, end, source, early)
            finally:
                budget.leave()
        else:
            end.abort()

    def _send_to_peer(
        self, end: End, peer: Peer, source: Address, destination: Address, early: bytes
    ) -> None:
        try:
            upstream = PeerConnection((peer.host, peer.tcp_proxy_port))
        except SessionError:
            end.abort()
            return
        self._visitors.carry(upstream, end, proxyproto.build_v2(source, destination) + early)


class TcpVisitors:
    """Connections that are carried as they are."""

    def __init__(self, core: ServerCore) -> None:
        self._core = core

    def serve(self, tunnel: Tunnel, end: End, visitor: Address, early: bytes = b"") -> None:
        """Carries one visitor of a tunnel; blocks until he or the service is done, closes ``end``."""
        name = f"{bracketed(visitor[0])}:{visitor[1]}"
        began = time.monotonic()
        until = began + self._core.config.queue_timeout
        refused = False
        rate = None if tunnel.budget is None else tunnel.budget.rate
        try:
            while True:
                end.check()  # whoever has left meanwhile gets no stream
                stream = self._core.pool_of(tunnel).acquire(visitor=name, first=refused)
                refused = self.carry(stream, end, early, rate)
                if not refused:
                    return
                if time.monotonic() > until:
                    raise StreamLimitError("the client refuses every stream")
        except (SessionError, OSError):
            if not self._move(tunnel, end, visitor, early):
                end.abort()
        finally:
            if log.isEnabledFor(logging.DEBUG):
                seconds = time.monotonic() - began
                fields = {"tunnel": tunnel.name, "visitor": visitor[0], "duration": round(seconds, 6)}
                words = "connection over: tunnel %s, visitor %s, %.0f ms"
                log.debug(words, tunnel.name, visitor[0], seconds * 1000, extra=fields)

    def _move(self, tunnel: Tunnel, end: End, visitor: Address, early: bytes) -> bool:
        """Lets the process that serves now have a visitor for whom no client came here."""
        if not isinstance(tunnel.name, int) or end.closed:
            return False
        return self._core.move(end, Moved(tunnel.name, visitor, tunnel.name, early))

    def carry(self, stream: Upstream, end: End, early: bytes = b"", rate: Rate | None = None) -> bool:
        """Relays between ``stream`` and ``end``, ``early`` first, as fast as ``rate``; blocks, closes both.

        True, with ``end`` still open, if the stream was refused before it carried anything.
        """
        sink = _Doorway(stream, end, len(early))
        sink.rate = rate
        stream.receiver = sink
        watch = _VisitorWatch(self._core, stream, sink)
        self._core.begin()
        self._core.tally.carried += 1
        self._core.clock.watch(watch)
        try:
            if early:
                if rate is not None:
                    rate.pass_all(len(early))
                stream.sendall(early)
            elif isinstance(stream, Stream):
                stream.session.flush()
            relay(stream, sink)
        except SessionError:
            if not sink.refused:
                end.abort()
        finally:
            self._core.clock.forget(watch)
            self._core.tally.carried -= 1
            self._core.end()
        return sink.refused


class _Doorway(SocketSink):
    """The sink of a visitor whose stream may yet be refused (RFC 9113 §8.7)."""

    __slots__ = ("_early",)

    def __init__(self, stream: Upstream, end: End, early: int) -> None:
        """``early`` is how many bytes can be sent once more."""
        super().__init__(stream, end)
        self._early = early

    def aborted(self, error: SessionError) -> None:
        stream = self.stream
        replayable = isinstance(stream, Stream) and stream.sent <= self._early and not stream.received
        if replayable and error.is_refusal:
            self.refused = True
            self._set_done()  # the visitor may have half-closed: then that is what is waited for
            if self.end is not None:
                self.end.interrupt()
        else:
            super().aborted(error)


class _HeaderWatch:
    """The deadline of a PROXY header."""

    def __init__(self, end: End, patience: float) -> None:
        self._end = end
        self._until = time.monotonic() + patience

    def tick(self, now: float) -> None:
        if now >= self._until:
            self._end.close()


class _VisitorWatch:
    """The deadlines of one carried connection: to be accepted, to be used at all, to take the last bytes."""

    def __init__(self, core: ServerCore, stream: Upstream, sink: SocketSink) -> None:
        self._config = core.config
        self._stream = stream
        self._sink = sink
        self._reading = Reading(core.config.min_body_rate)
        self._moved = 0
        self._since = time.monotonic()

    def tick(self, now: float) -> None:
        stream, idle = self._stream, self._config.tunnel_idle_timeout
        if self._sink.cutting:
            if self._reading.is_over(self._sink, now):
                self._sink.abort()
        elif not stream.accepted:
            if now - self._since > self._config.stream_timeout:
                stream.reset()
        elif idle and isinstance(stream, Stream):
            moved = stream.received + stream.sent
            if moved != self._moved:
                self._moved, self._since = moved, now
            elif now - self._since > idle:
                stream.reset()
