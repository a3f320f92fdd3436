"""A stream on one side, a socket on the other: bytes, half-close and aborts, both ways."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket as native
from collections.abc import Iterator
from typing import Any, NamedTuple

import gevent
import pytest
import trustme
from gevent import socket, ssl
from helpers import MIB, Inbox, Pair, deadline, fd_count, session_pair, socket_pair, tls_pair, wait_until
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import SessionClosedError, SessionError, StreamResetError
from tinytun_gevent.relay import JOIN, ServiceSink, SocketSink, relay
from tinytun_gevent.sockets import end_of, set_reset
from tinytun_gevent.stream import CANCEL


class Relayed(NamedTuple):
    """``visitor`` talks to ``far``, through a relay and a stream."""

    visitor: Any
    far: Inbox
    near: Any
    running: gevent.Greenlet[..., None]
    pair: Pair


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["plain", "tls"])
def sockets(request: pytest.FixtureRequest, authority: trustme.CA) -> tuple[Any, Any]:
    """Two connected sockets: the visitor's end, and ours."""
    if request.param == "plain":
        return socket_pair()
    end, sock = tls_pair(authority)
    return sock, end


@contextlib.contextmanager
def relayed(sockets: tuple[Any, Any] | None = None, *, hold: bool = False) -> Iterator[Relayed]:
    visitor, ours = sockets or socket_pair()
    with session_pair() as pair:
        near, far = pair.open(hold=hold)
        stream = near.stream
        sink = SocketSink(stream, end_of(ours))
        stream.receiver = sink
        running = gevent.spawn(relay, stream, sink)
        try:
            yield Relayed(visitor, far, stream, running, pair)
        finally:
            running.kill()
            visitor.close()


def read_all(sock: Any) -> bytes:
    pieces = []
    with deadline():
        while piece := sock.recv(65536):
            pieces.append(piece)
    return b"".join(pieces)


def read_to_reset(sock: Any) -> None:
    """Reads until the reset; fails at a clean end."""
    end = end_of(sock)
    with deadline():
        try:
            while end.recv(65536):
                pass
        except ConnectionResetError:
            return
    pytest.fail("a clean end instead of a reset")


def finish(relay: Relayed) -> None:
    with deadline():
        relay.running.get()
    assert relay.near.closed


# -- bytes and ends -----------------------------------------------------------


def test_megabytes_both_ways_at_once(sockets: tuple[Any, Any]) -> None:
    with relayed(sockets) as end:
        up, down = random.Random(1).randbytes(4 * MIB), random.Random(2).randbytes(4 * MIB)
        senders = [
            gevent.spawn(lambda: end.visitor.sendall(up)),
            gevent.spawn(lambda: (end.far.stream.sendall(down), end.far.stream.shutdown())),
        ]
        got = bytearray()
        with deadline():
            while len(got) < len(down):
                got += end.visitor.recv(65536)
            gevent.joinall(senders, raise_error=True)
        assert end.far.wait(len(up)) == up
        assert got == down


def test_the_visitor_s_end_comes_first_and_he_still_gets_his_answer(sockets: tuple[Any, Any]) -> None:
    with relayed(sockets) as end:
        end.visitor.sendall(b"question")
        if isinstance(end.visitor, ssl.SSLSocket):
            with contextlib.suppress(ssl.SSLError):
                end.visitor._sslobj.shutdown()  # close_notify; unwrap would wait for the other's
        else:
            end.visitor.shutdown(native.SHUT_WR)
        assert end.far.wait_end() == b"question"
        gevent.sleep(0.02)
        assert not end.running.ready()
        end.far.stream.sendall(b"answer" * 100_000)
        end.far.stream.shutdown()
        assert len(read_all(end.visitor)) == 600_000
        finish(end)


def test_the_service_s_end_comes_first_and_the_visitor_may_go_on(sockets: tuple[Any, Any]) -> None:
    with relayed(sockets) as end:
        end.far.stream.sendall(b"greeting")
        end.far.stream.shutdown()
        assert read_all(end.visitor) == b"greeting"
        end.visitor.sendall(b"a long story" * 50_000)
        end.visitor.close()
        assert len(end.far.wait_end()) == 600_000
        finish(end)


# -- aborts -------------------------------------------------------------------


def test_a_visitor_s_reset_becomes_a_reset_of_the_stream(sockets: tuple[Any, Any]) -> None:
    with relayed(sockets) as end:
        end.visitor.sendall(b"half of")
        end.far.wait(7)
        set_reset(end.visitor)
        end.visitor.close()
        error = end.far.wait_error()
        assert isinstance(error, StreamResetError)
        assert (error.code, error.remote) == (CANCEL, True)
        finish(end)


@pytest.mark.parametrize("after", [0, 100_000])
def test_a_reset_of_the_stream_becomes_a_reset_for_the_visitor(sockets: tuple[Any, Any], after: int) -> None:
    with relayed(sockets) as end:
        end.far.stream.sendall(b"x" * after)
        if after:
            wait_until(lambda: end.near.received == after)
        end.far.stream.reset()
        read_to_reset(end.visitor)
        finish(end)


def test_the_end_of_the_session_is_a_reset_for_the_visitor() -> None:
    with relayed() as end:
        end.far.stream.sendall(b"part of the answer")
        wait_until(lambda: end.near.received)
        end.pair.acceptor.close()
        read_to_reset(end.visitor)
        finish(end)


def test_a_visitor_who_leaves_while_bytes_come_for_him_stops_them() -> None:
    with relayed() as end:
        sender = gevent.spawn(lambda: end.far.stream.sendall(b"x" * (64 * MIB)))
        end.visitor.recv(10)
        end.visitor.close()  # with unread bytes: the kernel resets
        with deadline():
            sender.join()
        assert isinstance(sender.exception, StreamResetError)
        finish(end)


def test_a_visitor_who_leaves_while_his_bytes_wait_for_a_window_is_noticed() -> None:
    """Nobody reads his socket then, so only its state can tell."""
    with relayed(hold=True) as end:
        set_reset(end.visitor)
        sender = gevent.spawn(lambda: end.visitor.sendall(b"x" * (64 * MIB)))
        wait_until(lambda: end.near.send_window == 0)
        sender.kill()
        end.visitor.close()
        error = end.far.wait_error()
        assert isinstance(error, StreamResetError)
        finish(end)


@pytest.mark.parametrize("answering", [False, True])
def test_a_visitor_who_half_closed_and_then_leaves_is_noticed(answering: bool) -> None:
    with relayed() as end:
        end.visitor.shutdown(native.SHUT_WR)
        end.far.wait_end()
        set_reset(end.visitor)
        end.visitor.close()
        sender = gevent.spawn(lambda: end.far.stream.sendall(b"x" * (64 * MIB if answering else 0)))
        assert isinstance(end.far.wait_error(), StreamResetError)
        sender.kill()
        finish(end)


@pytest.mark.parametrize("half", ["reading", "window", "delivering"])
def test_a_killed_relay_resets_both_sides(half: str) -> None:
    with relayed(hold=half == "window") as end:
        if half == "window":
            gevent.spawn(end.visitor.sendall, b"x" * MIB).link_exception(lambda _: None)
            wait_until(lambda: end.near.send_window == 0)
        elif half == "delivering":
            end.visitor.shutdown(native.SHUT_WR)
            end.far.wait_end()
        else:
            end.far.stream.sendall(b"x")
            end.visitor.recv(1)
        end.running.kill()
        assert isinstance(end.far.wait_error(), StreamResetError)
        read_to_reset(end.visitor)


def test_what_a_lost_socket_has_sent_is_passed_on_before_the_reset() -> None:
    """A service that answers 413 and closes: its answer came, though it takes no more bytes."""
    with relayed() as end:
        end.far.stream.sendall(b"the head")
        wait_until(lambda: end.near.received == 8 and end.near.receiver.idle)
        end.visitor.sendall(b"answer")
        end.visitor._sock.close()  # now and with unread bytes: the kernel resets
        end.near.receiver.data(memoryview(b"body"))  # the session's reader comes first
        assert end.far.wait(6) == b"answer"
        assert isinstance(end.far.wait_error(), StreamResetError)
        finish(end)


def test_bytes_that_are_never_delivered_do_not_count_as_waiting_for_ever() -> None:
    """The stream is over in both directions, so the loss of its rest resets nothing."""
    visitor, ours = socket_pair()
    ours.setsockopt(native.SOL_SOCKET, native.SO_SNDBUF, 4096)
    visitor.setsockopt(native.SOL_SOCKET, native.SO_RCVBUF, 4096)
    with relayed((visitor, ours)) as end:
        visitor.shutdown(native.SHUT_WR)
        end.far.wait_end()
        end.far.stream.sendall(b"x" * 200_000)
        end.far.stream.shutdown()
        wait_until(lambda: end.near.closed)
        assert end.pair.opener.backlog > 0
        set_reset(visitor)
        visitor.close()
        finish(end)
        assert end.pair.opener.backlog == 0


def test_descriptors_are_closed_with_the_relay() -> None:
    with session_pair() as pair:
        before = fd_count()
        for number in range(30):
            visitor, ours = socket_pair()
            near, far = pair.open()
            near.stream.receiver = sink = SocketSink(near.stream, end_of(ours))
            running = gevent.spawn(relay, near.stream, sink)
            if number % 2:
                far.stream.reset()
            else:
                far.stream.shutdown()
                visitor.shutdown(native.SHUT_WR)
            with deadline():
                running.get()
            visitor.close()
        wait_until(lambda: fd_count() == before)
        assert pair.opener.stream_count == 0


# -- backpressure -------------------------------------------------------------


def test_a_visitor_who_does_not_read_holds_at_most_a_window_and_gets_everything_later() -> None:
    with relayed() as end:
        payload = random.Random(3).randbytes(16 * MIB)
        sender = gevent.spawn(lambda: (end.far.stream.sendall(payload), end.far.stream.shutdown()))
        wait_until(lambda: end.far.stream.send_window == 0)
        gevent.sleep(0.05)
        assert end.pair.opener.backlog <= end.near.receive_window.size <= 8 * MIB
        assert not sender.ready()
        assert hashlib.sha256(read_all(end.visitor)).digest() == hashlib.sha256(payload).digest()
        with deadline():
            sender.get()
        assert end.pair.opener.backlog == 0


def test_a_stalled_visitor_delays_nobody_else_on_the_session() -> None:
    with relayed() as end:
        gevent.spawn(lambda: end.far.stream.sendall(b"x" * (8 * MIB))).link_exception(lambda _: None)
        wait_until(lambda: end.far.stream.send_window == 0)
        near, far = end.pair.open()
        visitor, ours = socket_pair()
        near.stream.receiver = sink = SocketSink(near.stream, end_of(ours))
        gevent.spawn(relay, near.stream, sink)
        far.stream.sendall(b"y" * 100_000)
        far.stream.shutdown()
        assert len(read_all(visitor)) == 100_000
        visitor.close()


# -- the sink by itself -------------------------------------------------------


class Credited:
    """Stands for a stream: counts the credit that it gets."""

    answers = False

    def __init__(self) -> None:
        self.credit = 0
        self.resets = 0
        self.kept = 0
        #: Whether what waits may be kept after an abort.
        self.keeps = True

    def keep(self, count: int) -> bool:
        self.kept += count
        return self.keeps

    def consumed(self, count: int) -> None:
        assert count > 0
        self.credit += count

    def reset(self, code: int = CANCEL) -> None:
        self.resets += 1


def sink_on_a_socket() -> tuple[SocketSink, Credited, socket.socket]:
    visitor, ours = socket_pair()
    ours.setsockopt(native.SOL_SOCKET, native.SO_SNDBUF, 4096)
    stream = Credited()
    return SocketSink(stream, end_of(ours)), stream, visitor  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 40_000)), max_size=30), st.randoms())
def test_every_byte_is_delivered_in_order_and_every_credit_given_once(
    writes: list[tuple[int, int]], chance: random.Random
) -> None:
    """A rewritten head has another length than the bytes it stands for."""
    sink, stream, visitor = sink_on_a_socket()
    expected = bytearray()
    got = bytearray()
    for number, (length, credit) in enumerate(writes):
        piece = bytes([number % 256]) * length
        expected += piece
        sink.write(memoryview(piece), credit)
        if chance.random() < 0.2 and expected:
            with gevent.Timeout(0.001, False):
                got += visitor.recv(30_000)
    assert stream.credit <= sum(credit for _, credit in writes)
    sink.finish()
    got += read_all(visitor)
    with deadline():
        sink.wait_done()
    assert got == expected
    assert stream.credit == sum(credit for _, credit in writes)
    assert sink.done
    assert sink.idle
    assert sink.end is not None
    sink.end.close()
    visitor.close()


def test_an_empty_write_behind_a_backlog_is_no_obstacle() -> None:
    sink, stream, visitor = sink_on_a_socket()
    sink.write(b"x" * 39678, 39678)
    sink.write(b"", 0)
    sink.write(b"", 5)
    sink.finish()
    assert len(read_all(visitor)) == 39678
    assert stream.credit == 39683
    visitor.close()


def test_what_waits_in_small_pieces_is_kept_in_large_ones() -> None:
    """Frames of a byte each would take a hundred times as much, and a window is full of them."""
    stream = Credited()
    sink = SocketSink(stream)  # type: ignore[arg-type]
    for _ in range(100_000):
        sink.write(b"x", 1)
    assert len(sink._backlog) <= 100_000 // JOIN + 1
    sink.part()
    assert stream.credit == 100_000


def test_parting_takes_no_longer_the_more_there_waits_and_gives_no_credit_twice() -> None:
    """What was parted from is delivered first, then what came for the next stream."""
    visitor, ours = socket_pair()
    before, after = Credited(), Credited()
    sink = SocketSink(before)  # type: ignore[arg-type]
    sink.write(b"a" * 70_000, 50_000)
    for _ in range(1000):
        sink.part()
        sink.write(b"b", 0)
    backlog = sink._backlog
    sink.stream = after  # type: ignore[assignment]
    sink.write(b"c" * 30_000, 7)
    sink.attach(end_of(ours))
    sink.finish()
    assert read_all(visitor) == b"a" * 70_000 + b"b" * 1000 + b"c" * 30_000
    with deadline():
        sink.wait_done()
    assert (before.credit, after.credit) == (50_000, 7)
    assert sink._backlog is backlog, "what waited was copied"
    visitor.close()


def test_bytes_and_the_end_wait_for_a_socket_that_comes_later() -> None:
    visitor, ours = socket_pair()
    stream = Credited()
    sink = SocketSink(stream)  # type: ignore[arg-type]
    sink.data(memoryview(b"hello "))
    sink.data(memoryview(b"world"))
    sink.eof()
    assert (stream.credit, sink.done, sink.idle) == (0, False, False)
    sink.attach(end_of(ours))
    assert read_all(visitor) == b"hello world"
    assert (stream.credit, sink.done) == (11, True)
    visitor.close()
    ours.close()


def test_an_end_without_bytes_waits_for_its_socket_too() -> None:
    visitor, ours = socket_pair()
    sink = SocketSink(Credited())  # type: ignore[arg-type]
    sink.eof()
    assert not sink.done
    sink.attach(end_of(ours))
    assert sink.done
    assert read_all(visitor) == b""
    visitor.close()
    ours.close()


def test_an_abort_before_the_socket_comes_is_seen() -> None:
    sink = SocketSink(Credited())  # type: ignore[arg-type]
    sink.data(memoryview(b"hello"))
    sink.aborted(SessionClosedError("gone"))
    assert sink.done
    with deadline():
        sink.wait_done()


RESET = StreamResetError(CANCEL, remote=True)


@pytest.mark.parametrize("error", [RESET, SessionClosedError("gone")], ids=["reset", "session"])
def test_what_came_before_an_abort_is_delivered_and_then_the_socket_is_reset(error: SessionError) -> None:
    sink, stream, visitor = sink_on_a_socket()
    sink.write(b"x" * MIB, MIB)
    held = MIB - stream.credit
    assert held
    sink.aborted(error)
    sink.aborted(error)
    sink.finish()
    sink.write(b"late", 4)
    assert (sink.cutting, sink.done, sink.idle, stream.kept) == (True, False, False, held)
    got = b""
    with deadline():
        while len(got) < MIB:
            got += visitor.recv(65536)
    read_to_reset(visitor)
    with deadline():
        sink.wait_done()
    assert got == b"x" * MIB
    assert (sink.cutting, stream.credit, stream.resets) == (False, MIB, 0)
    visitor.close()


def test_a_reset_waits_for_what_is_in_our_kernel_only() -> None:
    """Everything was given to it, so nothing waits here; the peer's has no room for all of it."""
    visitor, ours = socket_pair()
    visitor.setsockopt(native.SOL_SOCKET, native.SO_RCVBUF, 32 * 1024)
    ours.setsockopt(native.SOL_SOCKET, native.SO_SNDBUF, MIB)
    sink = SocketSink(Credited(), end_of(ours))  # type: ignore[arg-type]
    size = ours.send(b"x" * MIB)
    assert size > 100_000
    assert sink.idle
    sink.aborted(RESET)
    got = 0
    with deadline():
        while got < size:
            got += len(visitor.recv(65536))
    read_to_reset(visitor)
    visitor.close()


def test_an_abort_of_our_own_drops_what_waits() -> None:
    sink, stream, visitor = sink_on_a_socket()
    sink.write(b"x" * MIB, MIB)
    sink.aborted(StreamResetError(CANCEL, remote=False))
    assert (sink.done, stream.credit, stream.kept) == (True, MIB, 0)
    read_to_reset(visitor)
    visitor.close()


def test_what_is_too_much_for_the_session_is_dropped() -> None:
    sink, stream, visitor = sink_on_a_socket()
    stream.keeps = False
    sink.write(b"x" * MIB, MIB)
    sink.aborted(RESET)
    assert sink.done
    read_to_reset(visitor)
    visitor.close()


def test_a_visitor_that_leaves_meanwhile_ends_it() -> None:
    sink, _, visitor = sink_on_a_socket()
    sink.write(b"x" * MIB, MIB)
    sink.aborted(RESET)
    set_reset(visitor)
    visitor.close()
    with deadline():
        sink.wait_done()
    assert not sink.cutting


def test_a_service_has_a_moment_for_what_came_before_the_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceSink, "last_delivery", 0.05)
    service, ours = socket_pair()
    ours.setsockopt(native.SOL_SOCKET, native.SO_SNDBUF, 4096)
    sink = ServiceSink(Credited(), end_of(ours))  # type: ignore[arg-type]
    sink.write(b"x" * MIB, MIB)
    sink.aborted(RESET)
    assert not sink.done
    with deadline():
        sink.wait_done()
    read_to_reset(service)
    service.close()


def test_a_lost_socket_resets_the_stream_once_and_drops_the_rest() -> None:
    sink, stream, visitor = sink_on_a_socket()
    sink.write(b"x" * 8 * MIB, 8 * MIB)
    assert not sink.idle
    set_reset(visitor)
    visitor.close()
    with deadline():
        sink.wait_done()
    assert stream.resets == 1
    sink.write(b"more", 4)
    sink.finish()
    assert stream.resets == 1
    assert sink.done


def test_what_waits_when_the_stream_changes_is_delivered_and_not_credited_to_the_next() -> None:
    sink, stream, visitor = sink_on_a_socket()
    next_stream = Credited()
    sink.write(b"x" * MIB, MIB)
    assert not sink.idle
    sink.part()
    assert stream.credit == MIB
    sink.stream = next_stream  # type: ignore[assignment]
    sink.write(b"y", 1)
    received = b""
    with deadline():
        while len(received) < MIB + 1:
            received += visitor.recv(65536)
    assert received == b"x" * MIB + b"y"
    wait_until(lambda: sink.idle)
    assert (stream.credit, next_stream.credit) == (MIB, 1)


def test_who_asked_is_told_of_a_drained_backlog_and_of_a_lost_socket() -> None:
    sink, stream, visitor = sink_on_a_socket()
    notes: list[str] = []
    sink.on_drained = lambda: notes.append("drained")
    sink.on_lost = lambda: notes.append("lost")
    sink.write(b"small", 5)
    assert notes == []
    sink.write(b"x" * MIB, MIB)
    with deadline():
        while len(notes) < 1:
            visitor.recv(65536)
    assert notes == ["drained"]
    set_reset(visitor)
    visitor.close()
    with deadline():
        while len(notes) < 2:
            sink.write(b"y", 1)
            gevent.sleep(0.001)
    assert notes == ["drained", "lost"]
    assert stream.resets == 0
