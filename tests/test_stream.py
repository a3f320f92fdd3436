"""One stream: blocking for windows, half-close, reset, moving from a socket."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
from helpers import MIB, Inbox, Pair, deadline, session_pair, socket_pair, wait_until

from tinytun_gevent import session
from tinytun_gevent.errors import SessionClosedError, StreamResetError
from tinytun_gevent.flow import INITIAL_WINDOW
from tinytun_gevent.sockets import PlainEnd, set_reset
from tinytun_gevent.stream import CANCEL, NO_ERROR


def fill(inbox: Inbox) -> gevent.Greenlet[..., None]:
    """Sends until the window is used up; the greenlet that is blocked then."""
    sender = gevent.spawn(inbox.stream.sendall, b"x" * (2 * INITIAL_WINDOW))
    wait_until(lambda: inbox.stream.send_window == 0, "a window that is used up")
    gevent.idle()
    assert not sender.ready()
    return sender


def test_sendall_blocks_for_the_window_and_goes_on_with_it() -> None:
    with session_pair() as pair:
        near, far = pair.open(hold=True)
        sender = fill(near)
        assert far.wait(INITIAL_WINDOW)
        far.release()
        with deadline():
            sender.get()
        assert len(far.wait(2 * INITIAL_WINDOW)) == 2 * INITIAL_WINDOW
        assert near.stream.sent == far.stream.received == 2 * INITIAL_WINDOW


def test_a_stalled_stream_holds_up_no_other() -> None:
    with session_pair() as pair:
        stalled, _ = pair.open(hold=True)
        fill(stalled)
        busy, far = pair.open()
        with deadline():
            busy.stream.sendall(b"y" * (3 * MIB))
        assert len(far.wait(3 * MIB)) == 3 * MIB


def test_both_directions_at_once() -> None:
    with session_pair() as pair:
        near, far = pair.open()
        payload = bytes(range(256)) * (8 * 1024)
        senders = [gevent.spawn(end.stream.sendall, payload) for end in (near, far)]
        with deadline():
            gevent.joinall(senders, raise_error=True)
        assert near.wait(len(payload)) == payload
        assert far.wait(len(payload)) == payload


@pytest.mark.parametrize("first", ["near", "far"])
def test_half_close_ends_one_direction_and_leaves_the_other(first: str) -> None:
    with session_pair() as pair:
        near, far = pair.open()
        one, other = (near, far) if first == "near" else (far, near)
        one.stream.sendall(b"question")
        one.stream.shutdown()
        one.stream.shutdown()
        assert other.wait_end() == b"question"
        assert not one.stream.closed
        with pytest.raises(StreamResetError):
            one.stream.sendall(b"more")
        other.stream.sendall(b"a late answer")
        other.stream.shutdown()
        assert one.wait_end() == b"a late answer"
        assert one.stream.closed
        assert other.stream.closed
        wait_until(lambda: not pair.opener.stream_count and not pair.acceptor.stream_count)


@pytest.mark.parametrize("first", ["near", "far"])
def test_a_reset_reaches_the_other_side_with_its_code(first: str) -> None:
    with session_pair() as pair:
        near, far = pair.open()
        one, other = (near, far) if first == "near" else (far, near)
        one.stream.sendall(b"half of it")
        other.wait(10)
        one.stream.reset(CANCEL)
        one.stream.reset(NO_ERROR)
        error = other.wait_error()
        assert isinstance(error, StreamResetError)
        assert (error.code, error.remote) == (CANCEL, True)
        own = one.wait_error()
        assert isinstance(own, StreamResetError)
        assert (own.code, own.remote) == (CANCEL, False)
        with pytest.raises(StreamResetError):
            other.stream.sendall(b"more")
        assert not pair.opener.stream_count
        assert not pair.acceptor.stream_count


@pytest.mark.parametrize("by", ["peer", "us", "session"])
def test_whoever_waits_for_a_window_is_woken_by_the_end(by: str) -> None:
    with session_pair() as pair:
        near, far = pair.open(hold=True)
        sender = fill(near)
        if by == "peer":
            far.stream.reset(CANCEL)
        elif by == "us":
            near.stream.reset(CANCEL)
        else:
            pair.opener.close()
        with deadline():
            sender.join()
        assert isinstance(sender.exception, SessionClosedError if by == "session" else StreamResetError)


def test_nothing_is_delivered_after_the_end() -> None:
    """The Inbox of the helpers asserts it; the peer here sends on into the reset."""
    with session_pair() as pair:
        near, far = pair.open()
        sender = gevent.spawn(lambda: near.stream.sendall(b"x" * (8 * MIB)))
        far.wait(100_000)
        far.stream.reset(CANCEL)
        count = len(far.received)
        with deadline():
            sender.join()
        again, there = pair.open()
        again.stream.sendall(b"still fine")
        assert there.wait(10) == b"still fine"
        assert len(far.received) == count
        assert pair.acceptor.backlog == 0


def test_the_session_s_backlog_is_what_waits_in_its_streams() -> None:
    with session_pair() as pair:
        held = [pair.open(hold=True) for _ in range(3)]
        for near, _ in held:
            near.stream.sendall(b"x" * 10_000)
        for _, far in held:
            far.wait(10_000)
        assert pair.acceptor.backlog == 30_000
        held[0][1].release()
        assert pair.acceptor.backlog == 20_000
        held[1][1].stream.reset()
        assert pair.acceptor.backlog == 10_000
        held[2][0].stream.reset()
        held[2][1].wait_error()
        assert pair.acceptor.backlog == 0


def test_bytes_that_are_kept_after_an_abort_count_until_they_are_delivered() -> None:
    with session_pair() as pair:
        near, far = pair.open(hold_here=True)
        far.stream.sendall(b"x" * 100_000)
        near.wait(100_000)
        assert near.stream.keep(100_000)
        assert pair.opener.backlog == 100_000  # they count already
        far.stream.reset()
        near.wait_error()
        assert pair.opener.backlog == 0
        assert near.stream.keep(60_000)
        assert pair.opener.backlog == 60_000
        near.stream.consumed(50_000)
        assert pair.opener.backlog == 10_000
        near.stream.consumed(50_000)  # no more than was kept
        assert pair.opener.backlog == 0


def test_no_more_is_kept_than_a_session_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "BACKLOG_LIMIT", 150_000)
    with session_pair() as pair:
        kept = []
        for _ in range(3):
            near, far = pair.open(hold_here=True)
            far.stream.sendall(b"x" * 100_000)
            near.wait(100_000)
            far.stream.reset()
            near.wait_error()
            kept.append(near.stream.keep(100_000))
        assert kept == [True, True, False]
        assert pair.opener.backlog == 200_000


def test_a_stream_at_rest_gives_its_grown_window_back() -> None:
    with session_pair() as pair:
        asking = pair.acceptor.keep_alive
        wait_until(lambda: not asking.probes and not asking.liveness.awaited)
        pair.acceptor.keep_alive.min_rtt = 0.2  # as over a long path
        near, far = pair.open()
        with deadline():
            while far.stream.receive_window.size < 2 * MIB:
                near.stream.sendall(b"x" * MIB)
        far.stream.rest()
        assert far.stream.receive_window.size == INITIAL_WINDOW
        with deadline():
            for _ in range(33):  # the old credit is used up, no more is given than fits
                near.stream.sendall(b"x" * MIB)
        wait_until(lambda: near.stream.sent == far.stream.received)
        assert far.stream.receive_window.credit <= max(INITIAL_WINDOW, far.stream.receive_window.size)


# -- from a socket ------------------------------------------------------------


def source(pair: Pair) -> tuple[Inbox, Inbox, PlainEnd, Any]:
    near, far = pair.open()
    visitor, ours = socket_pair()
    return near, far, PlainEnd(ours), visitor


def test_send_from_moves_bytes_until_the_source_ends() -> None:
    with session_pair() as pair:
        near, far, end, visitor = source(pair)
        payload = bytes(range(256)) * 4096
        writer = gevent.spawn(lambda: (visitor.sendall(payload), visitor.close()))
        moved = 0
        with deadline():
            while count := near.stream.send_from(end):
                moved += count
            writer.get()
        near.stream.shutdown()
        assert moved == len(payload)
        assert far.wait_end() == payload


def test_send_from_takes_no_more_than_the_limit() -> None:
    with session_pair() as pair:
        near, far, end, visitor = source(pair)
        visitor.sendall(b"abcdefgh")
        with deadline():
            end.wait_readable()
            assert near.stream.send_from(end, 3) == 3
        assert far.wait(3) == b"abc"
        assert end.recv(100) == b"defgh"


def test_send_from_lets_a_gate_keep_bytes_for_itself() -> None:
    with session_pair() as pair:
        near, far, end, visitor = source(pair)
        visitor.sendall(b"body+next request")
        kept = bytearray()

        def gate(view: memoryview) -> int:
            kept.extend(view[4:])
            return 4

        with deadline():
            assert near.stream.send_from(end, 0, gate) == 17
        assert (far.wait(4), bytes(kept)) == (b"body", b"+next request")
        assert near.stream.sent == 4


def test_send_from_reads_nothing_while_the_window_is_used_up() -> None:
    """Backpressure reaches the visitor's own kernel; nothing piles up here."""
    with session_pair() as pair:
        near, far = pair.open(hold=True)
        visitor, ours = socket_pair()
        end = PlainEnd(ours)
        fill(near).kill()
        visitor.sendall(b"waits in the kernel")
        mover = gevent.spawn(near.stream.send_from, end)
        gevent.sleep(0.02)
        assert not mover.ready()
        assert ours.recv(100, 2) == b"waits in the kernel"  # MSG_PEEK
        far.release()
        with deadline():
            assert mover.get() == 19


def test_send_from_raises_the_source_s_reset_and_the_stream_s() -> None:
    with session_pair() as pair:
        near, _, end, visitor = source(pair)
        set_reset(visitor)
        visitor.close()
        with deadline(), pytest.raises(ConnectionResetError):
            near.stream.send_from(end)
        near, far, end, visitor = source(pair)
        far.stream.reset()
        near.wait_error()
        visitor.sendall(b"x")
        with deadline(), pytest.raises(StreamResetError):
            near.stream.send_from(end)
