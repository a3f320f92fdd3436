"""A stand-in for the original's tunnel server, byte for byte as our client meets it.

It is written on plain sockets and threads, shares no code with the package, and works in
a test process whether that is monkey-patched or not. What it sends:

- the 101 as hyper writes it: lower-case fields, no ``Upgrade``, no extension of ours;
- then, as the HTTP/2 *client*: the preface, an empty SETTINGS frame, so windows of 65,535
  bytes, credited only as a test reads (from half a window on, like the Rust library);
- streams opened by a HEADERS frame of the three bytes ``82 86 84``;
- a PING every 10 s, whose answer may take 15 s.

A test is the visitor: `OriginalSession.visit` opens a stream, whose `Visit` it writes to
and reads from by hand. An abort by the client looks like a FIN to a visitor, as it does in
the original; `Visit.reset_code` tells the difference. Every wait has a deadline.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from queue import Queue
from types import TracebackType

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST_BLOCK = b"\x82\x86\x84"  # :method GET, :scheme http, :path /; no :authority
PING_PAYLOAD = bytes.fromhex("3b7cdb7a0b8716b4")  # the Rust library's
WINDOW = 65535
MAX_FRAME = 16384
DEADLINE = 60.0  # seconds; for whatever a test waits for

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
CANCEL = 8
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE = 1, 2, 3, 4


class Broken(AssertionError):
    """The client did something that the original's server would not survive."""


class Visit:
    """One visitor: a stream's two byte streams, and how they ended."""

    def __init__(self, session: OriginalSession, stream_id: int) -> None:
        self.session = session
        self.id = stream_id
        self.status: str | None = None  # of the client's answer; "200" once it has accepted
        self.reset_code: int | None = None  # the RST_STREAM that the client sent
        self.received = bytearray()  # arrived, not yet read by the test
        self.total = 0  # bytes that ever arrived
        self.ended = False  # END_STREAM, RST_STREAM, or the session's end
        self.send_window = session.peer_settings.get(INITIAL_WINDOW_SIZE, WINDOW)
        self.receive_window = WINDOW
        self.unclaimed = 0  # read by the test, not yet given back as credit

    def send(self, data: bytes) -> None:
        """Sends visitor bytes, within both windows; blocks for credit, `Broken` after the deadline."""
        view = memoryview(data)
        while view:
            size = self.session._take_credit(self, min(len(view), MAX_FRAME))
            self.session._send(DATA, 0, self.id, bytes(view[:size]))
            view = view[size:]

    def finish(self) -> None:
        """The visitor's FIN."""
        self.session._send(DATA, END_STREAM, self.id)

    def abort(self) -> None:
        """The visitor's RST."""
        self.session._send(RST_STREAM, 0, self.id, struct.pack("!L", CANCEL))
        with self.session._changed:
            self.session._abandon(self)

    def recv(self, most: int = 65536) -> bytes:
        """Blocks for some bytes; b"" at the end, which an abort by the client looks like too."""
        with self.session._changed:
            self.session._wait(lambda: bool(self.received) or self.ended, "bytes for the visitor")
            data = bytes(self.received[:most])
            del self.received[:most]
        self.session._credit(self, len(data))
        return data

    def read(self, size: int) -> bytes:
        """Blocks for exactly ``size`` bytes; fewer only at the end."""
        data = bytearray()
        while len(data) < size and (more := self.recv(size - len(data))):
            data += more
        return bytes(data)

    def read_to_end(self) -> bytes:
        """Blocks for everything up to the client's END_STREAM or RST_STREAM."""
        data = bytearray()
        while more := self.recv():
            data += more
        return bytes(data)

    def wait_end(self) -> None:
        """Blocks for the end without reading, so without giving credit."""
        with self.session._changed:
            self.session._wait(lambda: self.ended, "the stream's end")

    def wait_status(self) -> str | None:
        """Blocks for the client's answer; the original gives up after 10 s as well."""
        with self.session._changed:
            self.session._wait(lambda: self.status is not None or self.ended, "the answer's :status")
            return self.status


class OriginalSession:
    """The server's half of one tunnel's HTTP/2 session; made by `OriginalServer`."""

    def __init__(
        self, sock: socket.socket, fields: dict[str, str], received: bytes, ping_every: float
    ) -> None:
        self.fields = fields  # of the CONNECT request, names in lower case
        self.peer_settings: dict[int, int] = {}
        self.settings_seen = threading.Event()  # the client's first SETTINGS are in
        self.settings_acked = threading.Event()  # it has acknowledged our empty ones
        self.pongs = 0
        self.pings_received = 0
        self.goaway_code: int | None = None  # of the client's GOAWAY
        self.gone = threading.Event()  # the session is over, for whatever reason
        self._dropped = False
        self.broken: str | None = None  # the first rule that the client broke
        self.visits: dict[int, Visit] = {}
        self._sock = sock
        self._buffer = bytearray(received)
        self._decoder = Decoder()
        self._next_id = 1
        self._send_window = WINDOW
        self._receive_window = WINDOW
        self._unclaimed = 0
        self._write_lock = threading.Lock()
        self._changed = threading.Condition()  # guards everything above
        self._write(PREFACE + _frame(SETTINGS, 0, 0))
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._ping_forever, args=(ping_every,), daemon=True).start()

    def visit(self, data: bytes = b"") -> Visit:
        """Opens a stream, and sends ``data`` without waiting for the client's 200."""
        with self._changed:
            visit = Visit(self, self._next_id)
            self.visits[self._next_id] = visit
            self._next_id += 2
            # Under the lock: stream ids must appear on the wire in order.
            self._send(HEADERS, END_HEADERS, visit.id, REQUEST_BLOCK)
        visit.send(data)
        return visit

    def ping(self, timeout: float = DEADLINE) -> None:
        """Sends a PING and blocks for its answer."""
        with self._changed:
            before = self.pongs
        self._send(PING, 0, 0, PING_PAYLOAD)
        with self._changed:
            self._wait(lambda: self.pongs > before, "the answer to a PING", timeout)

    def goaway(self, code: int = 0) -> None:
        """Says GOAWAY; streams that are open may go on."""
        with self._changed:
            last = max(self.visits, default=0)
        self._send(GOAWAY, 0, 0, struct.pack("!LL", last, code))

    def drop(self) -> None:
        """The server dies: the socket closes, nothing is said."""
        self._dropped = True
        self._over()

    def wait_gone(self) -> None:
        """Blocks until the client has ended the session."""
        if not self.gone.wait(DEADLINE):
            raise Broken("the client did not end the session")

    # Everything below runs under the rules that the protocol and RFC 9113 give the original.

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float = DEADLINE) -> None:
        if not self._changed.wait_for(lambda: condition() or self.gone.is_set(), timeout):
            raise Broken(f"waited {timeout:g} s for {what}")
        if not condition():
            raise Broken(f"the session ended before {what}: {self.broken or 'closed'}")

    def _write(self, data: bytes) -> None:
        with self._write_lock:
            try:
                self._sock.sendall(data)
            except OSError as error:
                raise Broken(f"the client has gone: {error}") from None

    def _send(self, kind: int, flags: int, stream_id: int, payload: bytes = b"") -> None:
        self._write(_frame(kind, flags, stream_id, payload))

    def _take_credit(self, visit: Visit, wanted: int) -> int:
        with self._changed:
            self._wait(lambda: min(self._send_window, visit.send_window) > 0 or visit.ended, "credit to send")
            if visit.ended and visit.reset_code is not None:
                raise Broken(f"the client reset the stream with code {visit.reset_code}")
            size = min(wanted, self._send_window, visit.send_window)
            self._send_window -= size
            visit.send_window -= size
            return size

    def _credit(self, visit: Visit, size: int) -> None:
        """Gives ``size`` read bytes back: a window is credited when half of it has been read."""
        with self._changed:
            visit.unclaimed += size
            self._unclaimed += size
            updates = b""
            if visit.unclaimed > WINDOW // 2 and not visit.ended:
                updates += _frame(WINDOW_UPDATE, 0, visit.id, struct.pack("!L", visit.unclaimed))
                visit.receive_window += visit.unclaimed
                visit.unclaimed = 0
            if self._unclaimed > WINDOW // 2:
                updates += _frame(WINDOW_UPDATE, 0, 0, struct.pack("!L", self._unclaimed))
                self._receive_window += self._unclaimed
                self._unclaimed = 0
        if updates:
            with contextlib.suppress(Broken):
                self._write(updates)

    def _abandon(self, visit: Visit) -> None:
        """The stream is over and nobody will read the rest: only the connection gets its credit back."""
        visit.ended = True
        size = len(visit.received)
        visit.received.clear()
        self._changed.notify_all()
        self._credit(visit, size)

    def _read(self) -> None:
        try:
            while True:
                length, kind, flags, stream_id = self._header()
                self._dispatch(kind, flags, stream_id, self._exactly(length))
        except (Broken, OSError, EOFError, struct.error) as error:
            if isinstance(error, Broken) and not self._dropped:  # an answer that was under way is no fault
                self.broken = str(error)
        finally:
            self._over()

    def _header(self) -> tuple[int, int, int, int]:
        high, low, kind, flags, stream_id = struct.unpack("!BHBBL", self._exactly(9))
        length = high << 16 | low
        if length > MAX_FRAME:
            raise Broken(f"a frame of {length} bytes")
        return length, kind, flags, stream_id & 0x7FFFFFFF

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self._sock.recv(65536)
            if not data:
                raise EOFError
            self._buffer += data
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _dispatch(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if not self.settings_seen.is_set() and kind != SETTINGS:
            raise Broken("the client's first frame is not SETTINGS")
        if kind == PING:
            self._on_ping(flags, payload)
            return
        with self._changed:
            if kind == SETTINGS:
                self._on_settings(flags, payload)
            elif kind == WINDOW_UPDATE:
                self._on_window_update(stream_id, payload)
            elif kind == GOAWAY:
                self.goaway_code = struct.unpack_from("!L", payload, 4)[0]
                # The original ends the tunnel on the spot; its socket closes.
                raise EOFError
            elif kind in (DATA, HEADERS, RST_STREAM):
                self._on_stream(kind, flags, stream_id, payload)
            elif kind <= CONTINUATION and kind != PRIORITY:
                raise Broken(f"a frame of type {kind} from the client")
            self._changed.notify_all()

    def _on_ping(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            with self._changed:
                self.pongs += payload == PING_PAYLOAD
                self._changed.notify_all()
        else:
            self.pings_received += 1
            self._send(PING, ACK, 0, payload)

    def _on_settings(self, flags: int, payload: bytes) -> None:
        if flags & ACK:
            self.settings_acked.set()
            return
        new = dict(struct.iter_unpack("!HL", payload))
        delta = new.get(INITIAL_WINDOW_SIZE, 0) - self.peer_settings.get(INITIAL_WINDOW_SIZE, WINDOW)
        if INITIAL_WINDOW_SIZE in new:
            for visit in self.visits.values():
                visit.send_window += delta
        if ENABLE_PUSH in new and new[ENABLE_PUSH] != 0:
            raise Broken("an HTTP/2 server must not enable push (RFC 9113 6.5.2)")
        self.peer_settings.update(new)
        self._send(SETTINGS, ACK, 0)
        self.settings_seen.set()

    def _on_window_update(self, stream_id: int, payload: bytes) -> None:
        size = struct.unpack("!L", payload)[0]
        window = self._send_window if stream_id == 0 else 0
        if stream_id == 0:
            self._send_window += size
        elif stream_id in self.visits:
            self.visits[stream_id].send_window += size
            window = self.visits[stream_id].send_window - size
        if size == 0 or window + size > 0x7FFFFFFF:
            raise Broken(f"a WINDOW_UPDATE by {size}")

    def _on_stream(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        visit = self.visits.get(stream_id)
        if visit is None:
            raise Broken(f"a frame of type {kind} on stream {stream_id}, which is not open")
        if kind == RST_STREAM:
            visit.reset_code = struct.unpack("!L", payload)[0]
            visit.ended = True
        elif kind == HEADERS:
            if not flags & END_HEADERS or visit.status is not None:
                raise Broken("an answer in several frames, or a second one")
            fields = [(str(name), str(value)) for name, value in self._decoder.decode(payload)]
            visit.status = dict(fields).get(":status", "")
        else:
            self._on_data(visit, payload)
        if flags & END_STREAM and kind != RST_STREAM:
            visit.ended = True

    def _on_data(self, visit: Visit, payload: bytes) -> None:
        self._receive_window -= len(payload)
        if self._receive_window < 0:
            raise Broken("more DATA than the connection's window")
        if visit.ended:  # sent before our RST_STREAM arrived
            self._credit(visit, len(payload))
            return
        if visit.status is None:
            raise Broken("DATA before HEADERS")
        visit.receive_window -= len(payload)
        if visit.receive_window < 0:
            raise Broken("more DATA than the stream's window")
        visit.received += payload
        visit.total += len(payload)

    def _ping_forever(self, every: float) -> None:
        while not self.gone.wait(every):
            try:
                self.ping(timeout=15.0)
            except Broken as error:
                self.broken = self.broken or str(error)
                self._over()

    def _over(self) -> None:
        with self._changed:
            self.gone.set()
            for visit in self.visits.values():
                visit.ended = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class OriginalServer:
    """Listens on loopback; a context manager. ``sessions`` gets every session that opens."""

    def __init__(self, port: int = 0, ping_every: float = 10.0) -> None:
        self.base_domain = "local.tinytun.com"
        self.heads: list[bytes] = []  # every request head, as it came
        self.sessions: Queue[OriginalSession] = Queue()
        self.taken: set[str] = set()  # names and ports that are answered with 409
        self._open: list[OriginalSession] = []
        self._ping_every = ping_every
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> OriginalServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening and drops every session."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not end accept()
        self._listener.close()
        for session in self._open:
            session.drop()

    def session(self) -> OriginalSession:
        """Blocks for the next tunnel, until its client has sent SETTINGS."""
        session = self.sessions.get(timeout=DEADLINE)
        if not session.settings_seen.wait(DEADLINE):
            raise Broken(f"no SETTINGS from the client: {session.broken}")
        return session

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(DEADLINE)
        received = b""
        while b"\r\n\r\n" not in received:
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                sock.close()
                return
            received += data
        head, _, rest = received.partition(b"\r\n\r\n")
        self.heads.append(head)
        self._answer(sock, head.decode("latin-1"), rest)

    def _answer(self, sock: socket.socket, head: str, rest: bytes) -> None:
        request_line, *lines = head.split("\r\n")
        pairs = (line.split(":", 1) for line in lines)
        fields = {name.lower(): value.strip() for name, value in pairs}
        if not request_line.startswith("CONNECT "):
            sock.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            sock.close()
            return
        tcp = fields.get("x-tinytun-type") in ("tcp", "tcp_port")
        if tcp:
            name = fields.get("x-tinytun-port") or str(20000 + secrets.randbelow(40001))
            says = f"x-tinytun-port: {name}\r\n"
        else:
            name = fields.get("x-tinytun-subdomain") or secrets.token_hex(4)
            says = f"x-tinytun-domain: {name}.{self.base_domain}\r\nx-tinytun-subdomain: {name}\r\n"
        if name in self.taken:
            self._refuse(sock, f"{'Port' if tcp else 'Subdomain'} not available")
            return
        sock.sendall(
            f"HTTP/1.1 101 Switching Protocols\r\nx-tinytun-connection-id: {secrets.token_hex(16)}\r\n{says}"
            "date: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n".encode()
        )
        sock.settimeout(None)
        session = OriginalSession(sock, fields, rest, self._ping_every)
        self._open.append(session)
        self.sessions.put(session)

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        """The original leaves the connection open after a refusal: the client must not wait for its end."""
        sock.sendall(
            f"HTTP/1.1 409 Conflict\r\ncontent-length: {len(reason)}\r\n"
            f"date: Mon, 01 Jan 2024 00:00:00 GMT\r\n\r\n{reason}".encode()
        )
        with contextlib.suppress(OSError):
            sock.recv(1)
        sock.close()


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return struct.pack("!BHBBL", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream_id) + payload
