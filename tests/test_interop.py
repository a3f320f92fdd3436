"""Both programs beside the original's: our client at a stand-in of its server, its client at ours."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import pytest
from original_server import (
    CANCEL,
    DEADLINE,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    WINDOW,
    OriginalServer,
    OriginalSession,
    Visit,
)

from tinytun_gevent import Tunnel
from tinytun_gevent.client.events import Listener
from tinytun_gevent.errors import NameTakenError

MIB = 1024 * 1024
REFUSED_STREAM = 7
GET = b"GET / HTTP/1.1\r\nHost: demo.local.tinytun.com\r\n\r\n"


class Service:
    """A local TCP service on loopback; each connection is one thread that runs ``serve(sock)``."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not end accept()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(DEADLINE)
            self._serve(sock)


def echo(sock: socket.socket) -> None:
    """Every byte comes back; the visitor's end is answered with ours."""
    while data := sock.recv(65536):
        sock.sendall(data)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def eventually(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """For state that has no event of its own to wait for."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.01)


# Our client at the original's server


@pytest.fixture
def original() -> Iterator[OriginalServer]:
    with OriginalServer() as server:
        yield server


@contextlib.contextmanager
def tunnel_to(
    original: OriginalServer,
    target: int,
    *,
    kind: str = "http",
    subdomain: str | None = None,
    port: int | None = None,
    concurrency: int = 100,
    host_header: str | None = None,
    events: Listener | None = None,
) -> Iterator[tuple[Tunnel, OriginalSession]]:
    """Our client, connected; at the end it must have broken no rule."""
    tunnel = Tunnel(
        f"127.0.0.1:{target}",
        kind=kind,
        server=original.url,
        subdomain=subdomain,
        port=port,
        concurrency=concurrency,
        host_header=host_header,
        proxy="",
        timeout=DEADLINE,
        events=events,
    )
    with tunnel:
        session = original.session()
        yield tunnel, session
    assert session.broken is None


def test_our_client_opens_an_http_tunnel(original: OriginalServer) -> None:
    with (
        Service(echo) as service,
        tunnel_to(original, service.port, subdomain="demo", concurrency=7) as (
            tunnel,
            session,
        ),
    ):
        assert tunnel.url == "http://demo.local.tinytun.com"
        line, *fields = original.heads[0].decode().split("\r\n")
        assert line == f"CONNECT 127.0.0.1:{original.port} HTTP/1.1"
        assert "x-tinytun-type: http" in fields
        assert "x-tinytun-subdomain: demo" in fields
        assert session.peer_settings[MAX_CONCURRENT_STREAMS] == 7
        assert session.settings_acked.wait(DEADLINE)


def test_our_client_opens_a_tcp_tunnel(original: OriginalServer) -> None:
    with (
        Service(echo) as service,
        tunnel_to(original, service.port, kind="tcp", port=30123) as (
            tunnel,
            session,
        ),
    ):
        assert session.fields["x-tinytun-type"] == "tcp"
        assert session.fields["x-tinytun-port"] == "30123"
        assert tunnel.url == "tcp://127.0.0.1:30123"
        visit = session.visit(b"ping")
        assert visit.read(4) == b"ping"


def test_bytes_pass_in_both_directions_before_and_after_the_200(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit(b"early ")  # behind HEADERS, no 200 yet
        assert visit.wait_status() == "200"
        visit.send(b"late")
        assert visit.read(10) == b"early late"
        visit.finish()
        assert visit.read_to_end() == b""
        assert visit.reset_code is None


def test_a_visitor_is_accepted_before_he_says_anything(original: OriginalServer) -> None:
    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 ready\r\n")
        echo(sock)

    with Service(greet) as service, tunnel_to(original, service.port, kind="tcp") as (_, session):
        visit = session.visit()
        assert visit.wait_status() == "200"
        assert visit.read(11) == b"220 ready\r\n"


def test_half_close_travels_from_the_visitor(original: OriginalServer) -> None:
    def count(sock: socket.socket) -> None:
        total = 0
        while data := sock.recv(65536):
            total += len(data)
        sock.sendall(b"%d" % total)  # only after his FIN

    with Service(count) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit(b"x" * 100_000)
        visit.finish()
        assert visit.read_to_end() == b"100000"


def test_half_close_travels_from_the_service(original: OriginalServer) -> None:
    got: list[bytes] = []
    done = threading.Event()

    def speak_first(sock: socket.socket) -> None:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(65536):
            got.append(data)
        done.set()

    with Service(speak_first) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit()
        assert visit.read_to_end() == b"bye"
        assert visit.reset_code is None
        visit.send(b"still here")
        visit.finish()
        assert done.wait(DEADLINE)
        assert b"".join(got) == b"still here"


def test_a_visitors_abort_reaches_the_service_as_one(original: OriginalServer) -> None:
    outcome: list[object] = []
    done = threading.Event()

    def expect_reset(sock: socket.socket) -> None:
        try:
            while data := sock.recv(65536):
                sock.sendall(data)
            outcome.append("a clean end")
        except ConnectionResetError as error:
            outcome.append(error)
        done.set()

    with Service(expect_reset) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit(b"hello")
        assert visit.read(5) == b"hello"
        visit.abort()
        assert done.wait(DEADLINE)
        assert isinstance(outcome[0], ConnectionResetError)


def test_a_services_abort_reaches_the_server_as_one(original: OriginalServer) -> None:
    def abort(sock: socket.socket) -> None:
        sock.recv(5)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Service(abort) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit(b"hello")
        visit.wait_end()
        assert visit.reset_code == CANCEL


def test_a_refused_http_service_is_a_page(original: OriginalServer) -> None:
    with tunnel_to(original, free_port()) as (_, session):
        for _ in range(2):
            visit = session.visit(GET)
            page = visit.read_to_end()
            assert visit.status == "200"
            assert page.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
            head, _, body = page.partition(b"\r\n\r\n")
            assert f"Content-Length: {len(body)}".encode() in head


def test_a_refused_tcp_service_is_cancel_without_data(original: OriginalServer) -> None:
    with tunnel_to(original, free_port(), kind="tcp") as (_, session):
        visit = session.visit(b"hello")
        visit.wait_end()
        assert visit.reset_code == CANCEL
        assert visit.total == 0


def test_8_mib_each_way_at_once_through_64_kib_windows(original: OriginalServer) -> None:
    up, down = os.urandom(8 * MIB), os.urandom(8 * MIB)
    arrived: list[str] = []

    def exchange(sock: socket.socket) -> None:
        sender = threading.Thread(target=sock.sendall, args=(down,))
        sender.start()
        digest = hashlib.sha256()
        while data := sock.recv(65536):
            digest.update(data)
        arrived.append(digest.hexdigest())
        sender.join()

    with Service(exchange) as service, tunnel_to(original, service.port) as (_, session):
        assert session.peer_settings.get(INITIAL_WINDOW_SIZE, WINDOW) >= WINDOW
        visit = session.visit()

        def upload() -> None:
            visit.send(up)
            visit.finish()

        sender = threading.Thread(target=upload)
        sender.start()
        assert hashlib.sha256(visit.read_to_end()).digest() == hashlib.sha256(down).digest()
        sender.join(DEADLINE)
        assert visit.reset_code is None
        eventually(lambda: bool(arrived), "the upload's end at the service")
        assert arrived == [hashlib.sha256(up).hexdigest()]


def test_a_stalled_visitor_gets_no_more_than_his_window(original: OriginalServer) -> None:
    body = os.urandom(MIB)

    def push(sock: socket.socket) -> None:
        sock.sendall(body)

    with Service(push) as service, tunnel_to(original, service.port) as (_, session):
        visit = session.visit()
        eventually(lambda: visit.total >= WINDOW, "a full window of bytes")
        session.ping()  # whatever was sent beyond the window would be before its answer
        assert visit.total == WINDOW
        assert visit.read_to_end() == body


def test_50_visitors_at_once(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port) as (_, session):
        visits = [session.visit(b"visitor %d" % number) for number in range(50)]
        for number, visit in enumerate(visits):
            expected = b"visitor %d" % number
            assert visit.read(len(expected)) == expected
            visit.finish()
        assert all(visit.read_to_end() == b"" for visit in visits)


def test_streams_over_the_limit_are_refused_and_half_closed_ones_count(original: OriginalServer) -> None:
    release = threading.Event()

    def wait(sock: socket.socket) -> None:
        release.wait(DEADLINE)
        echo(sock)

    with Service(wait) as service, tunnel_to(original, service.port, concurrency=2) as (_, session):
        visits = [session.visit(b"a"), session.visit(b"b")]
        visits[0].finish()  # half-closed: our side has ended, the service's has not
        assert [visit.wait_status() for visit in visits] == ["200", "200"]
        refused = session.visit()
        refused.wait_end()
        assert refused.reset_code == REFUSED_STREAM
        release.set()
        assert visits[0].read_to_end() == b"a"
        visits[1].finish()
        assert visits[1].read_to_end() == b"b"
        assert session.visit(b"c").read(1) == b"c"


def test_pings_are_answered_both_ways(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port) as (_, session):
        session.ping()
        session.ping()
        eventually(lambda: session.pings_received > 0, "our client's own PING")


def test_a_taken_name_is_reported_while_the_server_keeps_the_connection(original: OriginalServer) -> None:
    original.taken |= {"demo", "30123"}
    for kind, name, port, reason in (
        ("http", "demo", None, "Subdomain not available"),
        ("tcp", None, 30123, "Port not available"),
    ):
        start = time.monotonic()
        with (
            pytest.raises(NameTakenError, match=reason) as caught,
            Tunnel("1", kind=kind, server=original.url, subdomain=name, port=port, proxy=""),
        ):
            pass
        assert (name or str(port)) in str(caught.value)
        assert time.monotonic() - start < 5


def test_an_unknown_host_header_is_a_warning(original: OriginalServer) -> None:
    warnings: list[str] = []

    class Watcher(Listener):
        def warning(self, text: str) -> None:
            warnings.append(text)

    with (
        Service(echo) as service,
        tunnel_to(original, service.port, host_header="localhost:3000", events=Watcher()) as (_, session),
    ):
        assert session.fields["x-tinytun-host-header"] == "localhost:3000"
        assert len(warnings) == 1
        assert "host-header" in warnings[0]


def test_closing_says_goaway_so_that_the_name_is_free(original: OriginalServer) -> None:
    with Service(echo) as service:
        with tunnel_to(original, service.port) as (_, session):
            pass
        session.wait_gone()
        assert session.goaway_code == 0


def test_a_lost_server_is_asked_for_the_same_random_name(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port) as (tunnel, first):
        assert "x-tinytun-subdomain" not in first.fields
        url = tunnel.url
        first.drop()
        second = original.session()
        assert second.fields["x-tinytun-subdomain"] == url.removeprefix("http://").split(".")[0]
        assert second.visit(b"back").read(4) == b"back"
        assert tunnel.url == url


def test_a_name_that_is_taken_on_reconnecting_is_asked_for_again(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port, subdomain="demo") as (tunnel, first):
        original.taken.add("demo")  # the server has not noticed yet that the first session is dead
        first.drop()
        eventually(lambda: len(original.heads) >= 3, "a second attempt after a 409")
        original.taken.discard("demo")
        second = original.session()
        assert second.fields["x-tinytun-subdomain"] == "demo"
        assert second.visit(b"back").read(4) == b"back"
        assert tunnel.url == "http://demo.local.tinytun.com"


def test_after_goaway_open_visits_finish_and_the_client_comes_back(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port, subdomain="demo") as (_, first):
        visit = first.visit(b"before")
        assert visit.read(6) == b"before"
        first.goaway()
        visit.send(b" after")
        assert visit.read(6) == b" after"
        visit.finish()
        assert visit.read_to_end() == b""
        assert visit.reset_code is None
        first.drop()
        second = original.session()
        assert second.fields["x-tinytun-subdomain"] == "demo"
        assert second.visit(b"back").read(4) == b"back"


def test_a_visitor_who_leaves_at_once_costs_nothing(original: OriginalServer) -> None:
    with Service(echo) as service, tunnel_to(original, service.port, concurrency=3) as (tunnel, session):
        for _ in range(30):
            visit: Visit = session.visit(b"gone")
            visit.abort()
            session.ping()  # the abort has been dealt with, so its place is free
        assert session.visit(b"still there").read(11) == b"still there"
        eventually(lambda: tunnel.counters.visitors <= 1, "the end of the aborted visitors")
