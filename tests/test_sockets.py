"""Connected sockets as the data path sees them, plain, TLS and Unix."""

from __future__ import annotations

import contextlib
import errno
import socket as native
import sys
from typing import Any

import gevent
import pytest
import trustme
from gevent import socket, ssl
from helpers import MIB, deadline, socket_pair, tls_ends, tls_pair, wait_until

from tinytun_gevent import sockets
from tinytun_gevent.sockets import (
    NOTSENT_LOWAT,
    USER_TIMEOUT,
    PlainEnd,
    PromptEnd,
    end_of,
    set_reset,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by Linux only")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["plain", "unix", "tls"])
def pair(request: pytest.FixtureRequest, authority: trustme.CA) -> Any:
    """An end of ours, and the socket at the other side of it."""
    if request.param == "plain":
        one, other = socket_pair()
    elif request.param == "unix":
        one, other = socket.socketpair(native.AF_UNIX, native.SOCK_STREAM)
    else:
        one, other = tls_pair(authority)  # type: ignore[assignment]
    end = end_of(one)
    other.settimeout(60)
    yield end, other
    end.close()
    other.close()


# -- options ------------------------------------------------------------------


def test_every_tcp_socket_sends_at_once_and_a_session_s_gives_up_on_silence() -> None:
    one, other = socket_pair()
    sockets.tune(one)
    sockets.tune_session(other)
    assert one.getsockopt(native.IPPROTO_TCP, native.TCP_NODELAY)
    assert other.getsockopt(native.IPPROTO_TCP, native.TCP_NODELAY)
    if sys.platform.startswith("linux"):
        assert other.getsockopt(native.IPPROTO_TCP, native.TCP_USER_TIMEOUT) == USER_TIMEOUT
        assert other.getsockopt(native.IPPROTO_TCP, native.TCP_NOTSENT_LOWAT) == NOTSENT_LOWAT
    one.close()
    other.close()


def test_a_unix_socket_has_nothing_to_tune() -> None:
    one, other = socket.socketpair(native.AF_UNIX, native.SOCK_STREAM)
    sockets.tune(one)
    sockets.tune_session(one)
    assert sockets.acknowledged(one) is None
    one.close()
    other.close()


@linux_only
def test_the_kernel_tells_what_was_acknowledged_and_what_was_not() -> None:
    one, other = socket_pair()
    before = sockets.acknowledged(one)
    assert before is not None
    one.sendall(b"x" * 1000)
    wait_until(lambda: (sockets.acknowledged(one) or 0) - before == 1000)
    assert sockets.queued(one) == 0
    one.setblocking(False)
    other.setsockopt(native.SOL_SOCKET, native.SO_RCVBUF, 4096)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += one.send(b"x" * 65536)
    wait_until(lambda: (sockets.acknowledged(one) or 0) + sockets.queued(one) - before == sent + 1000)
    assert sockets.queued(one) > 0
    one.close()
    other.close()
    assert sockets.acknowledged(one) is None


# -- both kinds of end --------------------------------------------------------


def test_bytes_go_both_ways_and_the_end_is_an_empty_read(pair: Any) -> None:
    end, other = pair
    with deadline():
        end.sendall(b"question")
        assert other.recv(100) == b"question"
        other.sendall(b"answer")
        assert end.recv(100) == b"answer"
        buffer = memoryview(bytearray(100))
        other.sendall(b"again")
        end.wait_readable()
        assert end.recv_now(buffer) == 5
        other.close()
        assert end.recv(100) == b""


def test_sendall_waits_for_a_slow_reader(pair: Any) -> None:
    end, other = pair
    sender = gevent.spawn(lambda: end.sendall(bytes(8 * MIB)))
    gevent.sleep(0.02)
    assert not sender.ready()
    got = 0
    with deadline():
        while got < 8 * MIB:
            got += len(other.recv(MIB))
        sender.get()


def test_half_close_leaves_the_other_direction(pair: Any) -> None:
    end, other = pair
    with deadline():
        end.sendall(b"last")
        end.finish_writing()
        assert other.recv(100) == b"last"
        assert other.recv(100) == b""
        other.sendall(b"still here")
        assert end.recv(100) == b"still here"


@pytest.mark.parametrize("how", ["close", "abort"])
def test_closing_wakes_whoever_waits_and_may_be_repeated(pair: Any, how: str) -> None:
    end, _ = pair
    reader = gevent.spawn(end.recv, 100)
    writer = gevent.spawn(lambda: end.sendall(bytes(64 * MIB)))  # its error would be told with all of them
    gevent.sleep(0.02)
    getattr(end, how)()
    end.close()
    end.abort()
    end.finish_writing()
    with deadline():
        gevent.joinall([reader, writer])
    assert isinstance(reader.exception, OSError)
    assert isinstance(writer.exception, OSError)
    assert end.closed
    assert end.sock.fileno() == -1
    for call in (lambda: end.recv(10), lambda: end.sendall(b"x")):
        with pytest.raises((OSError, ValueError)):
            call()


def test_an_abort_is_a_reset_and_a_close_is_none(authority: trustme.CA) -> None:
    for make in (socket_pair, lambda: tls_ends(authority)):
        for how in ("close", "abort"):
            one, other = make()  # type: ignore[no-untyped-call]
            end, ours = end_of(one), end_of(other)
            getattr(end, how)()
            with deadline():
                if how == "close":
                    assert ours.recv(100) == b""
                else:
                    with pytest.raises(ConnectionResetError):
                        ours.recv(100)
            ours.close()


def test_what_is_wrapped_already_stays_so() -> None:
    plain, other = socket_pair()
    end = end_of(plain)
    assert end_of(end) is end
    end.close()
    other.close()


# -- the direct path ----------------------------------------------------------


def direct() -> tuple[PlainEnd, socket.socket]:
    one, other = socket_pair()
    return PlainEnd(one), other


def test_reading_now_tells_nothing_yet_from_the_end() -> None:
    end, other = direct()
    buffer = memoryview(bytearray(10))
    assert end.recv_now(buffer) == -1
    other.sendall(b"abc")
    with deadline():
        end.wait_readable()
    assert end.recv_now(buffer) == 3
    other.close()
    with deadline():
        end.wait_readable()
    assert end.recv_now(buffer) == 0
    end.close()


def test_sending_now_takes_what_fits_and_then_nothing() -> None:
    end, other = direct()
    total = 0
    while sent := end.send_now(bytes(MIB)):
        total += sent
    assert end.sendmsg_now([b"a", b"b"]) == 0
    waiter = gevent.spawn(end.wait_writable)
    gevent.sleep(0.01)
    assert not waiter.ready()
    with deadline():
        while total > 0:
            total -= len(other.recv(MIB))
        waiter.get()
    assert end.sendmsg_now([b"a", b"bc"]) == 3
    assert other.recv(10) == b"abc"
    end.close()
    other.close()


def test_a_reset_is_seen_without_reading() -> None:
    end, other = direct()
    end.check()
    other.sendall(b"unread")
    set_reset(other)
    other.close()
    with deadline():
        end.wait_readable()
        with pytest.raises(ConnectionResetError):
            end.check()
    end.close()


def test_a_closed_end_cannot_be_waited_for() -> None:
    end, other = direct()
    end.close()
    for wait in (end.wait_readable, end.wait_writable):
        with pytest.raises(OSError) as caught:
            wait()
        assert caught.value.errno == errno.EBADF
    other.close()


def test_one_may_read_while_another_writes() -> None:
    """A session's reader and its senders share one socket."""
    end, other = direct()
    reader = gevent.spawn(end.recv, 100)
    writer = gevent.spawn(lambda: end.sendall(bytes(8 * MIB)))
    gevent.sleep(0.01)
    other.sendall(b"for the reader")
    got = 0
    with deadline():
        while got < 8 * MIB:
            got += len(other.recv(MIB))
        assert reader.get() == b"for the reader"
        writer.get()
    end.close()
    other.close()


class Recording:
    """A socket, and what was wished of it."""

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self.options: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def setsockopt(self, *option: int) -> None:
        self.options.append(option)
        self._sock.setsockopt(*option)


@linux_only
@pytest.mark.parametrize("prompt", [False, True])
def test_a_service_that_writes_head_and_body_apart_does_not_wait_for_a_late_acknowledgement(
    prompt: bool,
) -> None:
    """It would be 40 ms each time, as ``keepalive-1`` and ``keepalive-1-whole`` of the benchmark show."""
    service, ours = socket_pair()
    end = end_of(ours, prompt=prompt)
    assert isinstance(end, PromptEnd) == prompt
    end._raw = raw = Recording(end._raw)
    reads = 0
    with service, deadline():
        for _ in range(20):
            end.sendall(b"request")
            assert service.recv(100) == b"request"
            service.sendall(b"head")
            service.sendall(b"body")
            answer = bytearray()
            while len(answer) < 8:
                end.wait_readable()
                view = memoryview(bytearray(100))
                answer += view[: end.recv_now(view)]
                reads += 1
        end.close()
    assert raw.options == [(native.IPPROTO_TCP, native.TCP_QUICKACK, 1)] * (reads if prompt else 0)


def test_only_tcp_connections_to_services_are_prompt() -> None:
    one, other = socket_pair()
    assert type(end_of(one)) is PlainEnd
    if hasattr(native, "AF_UNIX"):
        near, far = socket.socketpair()
        assert type(end_of(near, prompt=True)) is PlainEnd
        near.close()
        far.close()
    one.close()
    other.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does not tell")
def test_what_the_kernel_may_not_send_yet_is_told() -> None:
    listener = native.create_server(("127.0.0.1", 0))
    sock = socket.create_connection(listener.getsockname())
    with listener, sock:
        assert sockets.held_up(sock)[0] == 0
        sock.setblocking(False)
        try:
            while True:
                sock.send(bytes(65536))
        except BlockingIOError:
            pass  # nobody reads
        waiting, round_trip = sockets.held_up(sock)
        assert waiting > 0
        assert 0 < round_trip < 1
    assert sockets.held_up(sock) == (0, 0.0)


def test_whether_the_other_side_is_waited_for() -> None:
    """Not before somebody waits, not with bytes that have come, not afterwards."""
    ours, theirs = socket_pair()
    end = end_of(ours)
    try:
        with deadline():
            assert not end.awaited
            waiting = gevent.spawn(end.recv, 10)
            wait_until(lambda: end.awaited)
            theirs.sendall(b"x")
            assert not end.awaited
            assert waiting.get() == b"x"
            assert not end.awaited
    finally:
        end.close()
        theirs.close()


def test_whether_the_end_is_next(pair: Any) -> None:
    """Nothing is read by asking; bytes before the end are not the end."""
    end, theirs = pair
    try:
        assert not end.at_end
        theirs.sendall(b"unread")
        wait_until(lambda: end.unread)
        assert not end.at_end
        if hasattr(theirs, "_sslobj"):
            with contextlib.suppress(ssl.SSLError):
                theirs._sslobj.shutdown()  # close_notify; unwrap would wait for the other's
        theirs.shutdown(native.SHUT_WR)
        assert not end.at_end
        assert end.recv(10) == b"unread"
        wait_until(lambda: end.at_end)
        assert end.recv(10) == b""
        assert end.at_end
    finally:
        end.close()
        theirs.close()


def test_the_end_is_next_behind_an_unread_close_notify(authority: trustme.CA) -> None:
    end, theirs = tls_pair(authority)
    with contextlib.suppress(ssl.SSLError):
        theirs._sslobj.shutdown()
    wait_until(lambda: sockets.unread(end.sock))
    assert not end.at_end  # a visitor may still be there without its FIN
    theirs.close()
    wait_until(lambda: end.at_end)
    end.close()


def test_a_reset_is_no_end() -> None:
    ours, theirs = socket_pair()
    end = end_of(ours)
    set_reset(theirs)
    theirs.close()
    with pytest.raises(ConnectionResetError):
        wait_until(lambda: end.at_end)
    end.close()


@linux_only
def test_whether_the_other_side_has_half_closed() -> None:
    """Also behind bytes that nobody has read."""
    ours, theirs = socket_pair()
    try:
        assert not sockets.half_closed(ours)
        theirs.sendall(b"unread")
        theirs.shutdown(native.SHUT_WR)
        wait_until(lambda: sockets.half_closed(ours))
    finally:
        ours.close()
        theirs.close()
