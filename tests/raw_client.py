"""A tunnel client on the h2 library alone, whose every move the test decides."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import Self, TypeVar

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    Event,
    PingAckReceived,
    RequestReceived,
    StreamEnded,
    StreamReset,
)
from h2.settings import SettingCodes, Settings
from server_process import ServerProcess
from support import DEADLINE, Response, Source, connect, eventually

from tinytun_gevent import TunnelServer

E = TypeVar("E", bound=Event)

GOAWAY = bytes.fromhex("000008 07 00 00000000 7fffffff 00000000".replace(" ", ""))
"""GOAWAY(NO_ERROR) by hand: h2's own ends its connection."""


def wishes_of(
    subdomain: str, port: int | None, join: RawClient | None, resume: bytes | None, bearer: str | None
) -> bytes:
    """The fields of a CONNECT."""
    fields = [b"x-tinytun-type: http", b"x-tinytun-subdomain: " + subdomain.encode()]
    if port is not None:
        fields = [b"x-tinytun-type: tcp", b"x-tinytun-port: %d" % port]
    if join is not None:
        fields = [b"x-tinytun-join: %b %b" % (join.connection_id, join.key)]
    if bearer is not None:
        fields.append(b"Authorization: Bearer " + bearer.encode())
    if resume is not None:
        fields.append(b"x-tinytun-resume: " + resume)
    return b"".join(field + b"\r\n" for field in fields)


def proxy_header(source: str) -> bytes:
    """A PROXY header of version 1 that says from which address a client has come."""
    family, ours = ("TCP6", "::1") if ":" in source else ("TCP4", "127.0.0.1")
    return f"PROXY {family} {source} {ours} 40000 5554\r\n".encode()


class RawClient:
    """Opens an HTTP tunnel, or with ``port`` a TCP one, and does nothing but HTTP/2's housekeeping.

    Events come from :meth:`next` in order; streams are answered with :meth:`accept`,
    :meth:`send`, :meth:`end` and :meth:`reset`.
    """

    def __init__(
        self,
        server: TunnelServer | ServerProcess,
        subdomain: str = "demo",
        max_streams: int = 100,
        window: int = 65535,
        port: int | None = None,
        join: RawClient | None = None,
        waits: bool = True,
        resume: bytes | None = None,
        bearer: str | None = None,
        source: str | None = None,
        announces: bool = False,
    ) -> None:
        """``window`` is how many bytes the server may send on a stream before it must wait.

        With ``join`` it is another session of that client's tunnel; ``waits`` is whether to
        wait until the server counts it among the others. ``resume`` is the token to show, ``bearer`` the
        opener's. ``source`` is the address that a PROXY header gives it. ``announces``: that it knows our own
        error codes.
        """
        self.sock = connect(server.connection_port)
        wishes = wishes_of(subdomain, port, join, resume, bearer)
        if announces:
            wishes += b"x-tinytun-reset-codes: 1\r\n"
        if source is not None:
            self.sock.sendall(proxy_header(source))
        self.sock.sendall(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n%b\r\n" % (server.connection_port, wishes))
        head = Source(self.sock).until(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        #: What another session needs to join the tunnel.
        self.connection_id = Response(head).get(b"x-tinytun-connection-id") or b""
        self.key = Response(head).get(b"x-tinytun-join") or b""
        #: What to show to get the name back.
        self.token = Response(head).get(b"x-tinytun-resume") or b""
        self._conn = H2Connection(H2Configuration(client_side=False, header_encoding=None))
        self._conn.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
                SettingCodes.INITIAL_WINDOW_SIZE: window,
            },
        )
        self._grants_window = window == 65535
        self._lock = threading.Lock()
        #: What came; None is the end of the connection.
        self._events: queue.Queue[Event | None] = queue.Queue()
        with self._lock:
            self._conn.initiate_connection()
            self._flush()
        self.sock.settimeout(None)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        name = subdomain if port is None else port
        if isinstance(server, ServerProcess):
            listed = {"Subdomain": name} if port is None else {"PortNumber": name}
            eventually(lambda: any(tunnel["name"] == listed for tunnel in server.tunnels()))
            return
        eventually(lambda: name in server.registry.tunnels and server.registry.tunnels[name].ready)
        if join is not None and waits:
            eventually(lambda: not server.registry.tunnels[name].promised)

    def next(self, kind: type[E]) -> E:
        """The next event of that kind; earlier ones of other kinds are dropped.

        Raises EOFError at the end of the connection.
        """
        until = time.monotonic() + DEADLINE
        while (event := self._events.get(timeout=max(until - time.monotonic(), 0.001))) is not None:
            if isinstance(event, kind):
                return event
        raise EOFError

    def seen(self) -> list[Event | None]:
        """What has come and was not asked for yet, after a moment for what is under way."""
        events: list[Event | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get(timeout=0.2))
        return events

    def next_request(self) -> tuple[int, bytes]:
        """The next stream, accepted, and the request head that came on it."""
        stream_id = self.next(RequestReceived).stream_id or 0
        self.accept(stream_id)
        return stream_id, self.next_head()

    def next_head(self) -> bytes:
        """What comes next on a stream, up to the end of a head."""
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.next(DataReceived).data or b""
        return head

    def next_request_data(self) -> tuple[int, bytes]:
        """The next stream, accepted, and the first bytes that came on it."""
        stream_id = self.next(RequestReceived).stream_id or 0
        self.accept(stream_id)
        return stream_id, self.next_data(stream_id)

    def next_data(self, stream_id: int) -> bytes:
        """What comes next on a stream; what comes on others is dropped."""
        while (event := self.next(DataReceived)).stream_id != stream_id:
            pass
        return event.data or b""

    def accept(self, stream_id: int) -> None:
        with self._lock:
            self._conn.send_headers(stream_id, [(b":status", b"200")])
            self._flush()

    def send(self, stream_id: int, *parts: bytes, end: bool = False) -> None:
        """Sends ``parts``, each in frames of its own and all at once; they must fit the window."""
        with self._lock:
            for data in parts:
                for start in range(0, len(data), 16384):
                    self._conn.send_data(stream_id, data[start : start + 16384])
            if end:
                self._conn.end_stream(stream_id)
            self._flush()

    def open_window(self, stream_id: int, count: int) -> None:
        """Lets the server send ``count`` more bytes on a stream."""
        with self._lock:
            self._conn.increment_flow_control_window(count, stream_id)
            self._flush()

    def goaway(self) -> None:
        """Says goodbye, without closing anything."""
        with self._lock:
            self.sock.sendall(GOAWAY)

    def reset(self, stream_id: int, code: int) -> None:
        with self._lock:
            self._conn.reset_stream(stream_id, code)
            self._flush()

    def ended(self, stream_id: int) -> None:
        """Waits until the server has half-closed or reset the stream."""
        while True:
            event = self._events.get(timeout=DEADLINE)
            if isinstance(event, StreamEnded | StreamReset) and event.stream_id == stream_id:
                return

    def sync(self) -> None:
        """Returns when the server has taken everything that was sent until now."""
        with self._lock:
            self._conn.ping(b"so far ?")
            self._flush()
        self.next(PingAckReceived)

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._thread.join(DEADLINE)
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _flush(self) -> None:
        data = self._conn.data_to_send()
        if data:
            self.sock.sendall(data)

    def _read(self) -> None:
        while True:
            try:
                data = self.sock.recv(65536)
                if not data:
                    self._events.put(None)
                    return
                with self._lock:
                    for event in self._conn.receive_data(data):
                        if self._grants_window and isinstance(event, DataReceived):
                            self._conn.acknowledge_received_data(
                                event.flow_controlled_length or 0, event.stream_id or 0
                            )
                        self._events.put(event)
                    self._flush()
            except OSError:
                self._events.put(None)
                return
