"""What the end-to-end tests share: a scripted local service, raw visitors, readers of messages.

Everything here is plain sockets and threads of the standard library, none of the code under
test. Every wait has a deadline: sockets carry a timeout, :func:`eventually` gives up.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self, TypeVar

DEADLINE = 60.0
"""Seconds after which anything that should happen counts as failed; only a failure takes so long."""

Fields = list[tuple[bytes, bytes]]


def connect(port: int, host: str = "127.0.0.1", timeout: float = DEADLINE) -> socket.socket:
    """A TCP connection whose every call fails after ``timeout`` seconds; the caller closes it."""
    sock = socket.create_connection((host, port), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def eventually(predicate: Callable[[], object], timeout: float = DEADLINE, what: str = "") -> None:
    """Waits until ``predicate`` is true; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what or predicate}")
        time.sleep(0.005)


T = TypeVar("T")


def in_time(function: Callable[[], T], timeout: float = DEADLINE) -> T:
    """What ``function`` returns; fails when it has not after ``timeout`` seconds, and leaves it to itself."""
    box: list[T | BaseException] = []

    def run() -> None:
        try:
            box.append(function())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout)
    assert box, f"it still goes on after {timeout:g} s"
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def reset(sock: socket.socket) -> None:
    """Closes with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# -- messages --------------------------------------------------------------------------------------


@dataclass
class Message:
    """One HTTP/1 message as it came, its body decoded."""

    head: bytes
    body: bytes = b""
    trailers: Fields = field(default_factory=list)
    raw_body: bytes = b""
    """The body as it was framed."""

    @property
    def start(self) -> bytes:
        return self.head.split(b"\r\n", 1)[0]

    @property
    def fields(self) -> Fields:
        return parse_fields(self.head.split(b"\r\n")[1:-2])

    def all(self, name: bytes) -> list[bytes]:
        """The values of every field line with that name."""
        return [value for key, value in self.fields if key.lower() == name.lower()]

    def get(self, name: bytes) -> bytes | None:
        """The value of a field that occurs once; None if it is absent."""
        values = self.all(name)
        assert len(values) <= 1, f"{name!r} occurs {len(values)} times"
        return values[0] if values else None


class Request(Message):
    @property
    def method(self) -> bytes:
        return self.start.split(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.start.split(b" ")[1]


class Response(Message):
    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])


def parse_fields(lines: Iterable[bytes]) -> Fields:
    return [(name, value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines)]


class Source:
    """Reads exact pieces from a socket without taking a byte more than asked for."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def take(self, count: int) -> bytes:
        """At least one byte, at most ``count``; ``b""`` at the end."""
        return self.sock.recv(count)

    def until(self, mark: bytes, limit: int = 1 << 20) -> bytes:
        """Everything up to and with ``mark``; what there is if the connection ends before it."""
        got = b""
        while mark not in got:
            seen = self.sock.recv(65536, socket.MSG_PEEK)
            if not seen:
                return got
            end = (got + seen).find(mark)
            got += self.take(len(seen) if end < 0 else end + len(mark) - len(got))
            assert len(got) < limit
        return got

    def exactly(self, count: int) -> bytes:
        pieces = []
        while count:
            piece = self.take(min(count, 1 << 20))
            if not piece:
                raise EOFError(f"{count} bytes are missing")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)

    def rest(self) -> bytes:
        """Everything up to the end of the connection; raises what a reset raises."""
        pieces = []
        while piece := self.take(1 << 20):
            pieces.append(piece)
        return b"".join(pieces)

    def chunks(self, message: Message) -> None:
        """Reads a chunked body with its trailers into ``message``."""
        raw: list[bytes] = []
        body: list[bytes] = []
        while True:
            raw.append(self.until(b"\r\n"))
            size = int(raw[-1].split(b";")[0], 16)
            if not size:
                break
            raw.append(self.exactly(size + 2))
            body.append(raw[-1][:-2])
        lines = []
        while (line := self.until(b"\r\n")) != b"\r\n":
            assert line, "the connection ended in the trailers"
            lines.append(line)
        message.raw_body, message.body = b"".join([*raw, *lines, line]), b"".join(body)
        message.trailers = parse_fields(line[:-2] for line in lines)

    def body_of(self, message: Message) -> bool:
        """Reads the body that a head declares; False if it declares none."""
        if (coding := message.get(b"transfer-encoding")) is not None:
            assert coding.lower() == b"chunked"
            assert message.get(b"content-length") is None
            self.chunks(message)
        elif (length := message.get(b"content-length")) is not None:
            message.body = message.raw_body = self.exactly(int(length))
        else:
            return False
        return True


def read_head(sock: socket.socket) -> Response:
    """The head of the next response, interim ones too, without its body."""
    head = Source(sock).until(b"\r\n\r\n")
    assert head.endswith(b"\r\n\r\n"), f"no whole head came: {head!r}"
    return Response(head)


def read_response(sock: socket.socket, method: bytes = b"GET") -> Response:
    """The next response with its body, interim ones too; bytes behind it stay in the socket.

    Without a length the body is what comes until the end. Fails if the connection ends early.
    """
    response = read_head(sock)
    source = Source(sock)
    if response.status < 200 or response.status in (204, 304) or method == b"HEAD":
        return response
    if not source.body_of(response):
        response.body = source.rest()
    return response


def read_rest(sock: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    return Source(sock).rest()


def get(
    port: int,
    name: str = "demo",
    target: str = "/",
    *fields: bytes,
    method: bytes = b"GET",
    body: bytes = b"",
) -> Response:
    """One request on a connection of its own."""
    with connect(port) as sock:
        sock.sendall(request(name, target, *fields, method=method, body=body))
        return read_response(sock, method)


def request(
    name: str = "demo",
    target: str = "/",
    *fields: bytes,
    method: bytes = b"GET",
    body: bytes = b"",
    minor: int = 1,
) -> bytes:
    """The bytes of a request for ``<name>.localhost``; with a body also its Content-Length."""
    lines = [b"%b %b HTTP/1.%d" % (method, target.encode(), minor), b"Host: %b.localhost" % name.encode()]
    if body:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, *fields, b"", body])


def respond(body: bytes = b"ok", *fields: bytes, status: bytes = b"200 OK") -> bytes:
    """The bytes of a response with a Content-Length."""
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *fields]
    return b"\r\n".join([*lines, b"", body])


# -- the local service -----------------------------------------------------------------------------


class Peer(Source):
    """One connection that the local service has accepted: what its script talks to."""

    def __init__(self, service: Service, sock: socket.socket, number: int) -> None:
        super().__init__(sock)
        self.service = service
        #: 0 for the first connection of the service.
        self.number = number
        #: Every byte that came.
        self.received = bytearray()
        #: The requests that were read, in order.
        self.requests: list[Request] = []
        #: Set when the script has returned and the connection is closed.
        self.ended = threading.Event()

    def take(self, count: int) -> bytes:
        data = self.sock.recv(count)
        self.received += data
        return data

    def read_head(self) -> Request | None:
        """The next request's head; None if the connection ended cleanly before it."""
        head = self.until(b"\r\n\r\n")
        if not head:
            return None
        assert head.endswith(b"\r\n\r\n"), f"the connection ended inside a head: {head!r}"
        request = Request(head)
        self.requests.append(request)
        return request

    def read_request(self) -> Request | None:
        """The next request with its body; None if the connection ended cleanly before it."""
        request = self.read_head()
        if request is not None:
            self.body_of(request)
        return request

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data)

    def wait_end(self) -> bool:
        """Reads to the end; True if it was clean, False after a reset."""
        try:
            self.rest()
        except ConnectionError:
            return False
        return True

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        reset(self.sock)


Script = Callable[[Peer], None]


def answering(answer: Callable[[Request], bytes]) -> Script:
    """A script that answers every request of a connection with ``answer(request)``."""

    def script(peer: Peer) -> None:
        while (got := peer.read_request()) is not None:
            peer.sendall(answer(got))

    return script


def echo(got: Request) -> bytes:
    """What came, as the answer's body: start line, fields and body."""
    return respond(got.head + got.body)


class Service:
    """A TCP server on loopback that runs ``script`` in a thread for each connection.

    Every received byte is kept (:attr:`log`). A connection is closed when its script returns.
    What a script raises, other than network errors, is raised by :meth:`close`.
    """

    def __init__(self, script: Script | None = None) -> None:
        self.script: Script = script or answering(lambda _: respond())
        self.peers: list[Peer] = []
        self.errors: list[BaseException] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> bytes:
        """All bytes of all connections, one connection after the other."""
        return b"".join(bytes(peer.received) for peer in self.peers)

    @property
    def requests(self) -> list[Request]:
        """All requests of all connections."""
        return [request for peer in self.peers for request in peer.requests]

    def wait_peer(self, number: int = 0) -> Peer:
        """The connection with that number, as soon as there is one."""
        eventually(lambda: len(self.peers) > number, what=f"connection {number} of the service")
        return self.peers[number]

    def stop_listening(self) -> None:
        """Refuses connections from now on."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()

    def close(self) -> None:
        """Closes everything and waits for the scripts."""
        self.stop_listening()
        for peer in self.peers:
            try:
                peer.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in list(self._threads):
            thread.join(DEADLINE)
            assert not thread.is_alive(), "a script of the service did not end"
        if self.errors:
            raise self.errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(2 * DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(self, sock, len(self.peers))
            self.peers.append(peer)
            thread = threading.Thread(target=self._run, args=(peer,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run(self, peer: Peer) -> None:
        try:
            self.script(peer)
        except (OSError, EOFError):
            pass  # the other side left, or the test is over
        except BaseException as error:
            self.errors.append(error)
        finally:
            peer.sock.close()
            peer.ended.set()
