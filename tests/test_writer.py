"""The sending half of a session: turns, control before data, a reader that never waits."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import gevent
import pytest
from gevent.event import Event
from helpers import deadline, socket_pair, wait_until

from tinytun_gevent.errors import SessionClosedError
from tinytun_gevent.sockets import PlainEnd
from tinytun_gevent.wire import http2
from tinytun_gevent.writer import (
    CHUNK,
    CONTROL_LIMIT,
    JOIN_LIMIT,
    SHARED_CHUNK,
    SMALL,
    Writer,
)

BIG = 10**9
LONG = SMALL + 1
"""Bytes of DATA that wait for nobody's company."""


class FakeEnd:
    """A socket whose kernel buffer the test opens by hand."""

    direct = True

    def __init__(self, room: int = BIG) -> None:
        self.room = room
        self.sent = bytearray()
        self.calls = 0
        self.broken = False
        self._open = Event()

    def make_room(self, count: int) -> None:
        self.room += count
        self._open.set()

    def break_now(self) -> None:
        self.broken = True
        self._open.set()

    def send_now(self, data: Any) -> int:
        return self.sendmsg_now([data])

    def sendmsg_now(self, buffers: Sequence[Any]) -> int:
        if self.broken:
            raise OSError(errno.EPIPE, "gone")
        self.calls += 1
        data = b"".join(bytes(buffer) for buffer in buffers)[: self.room]
        self.sent += data
        self.room -= len(data)
        return len(data)

    def wait_writable(self) -> None:
        while not self.room and not self.broken:
            self._open.clear()
            self._open.wait()


class Source:
    """What a visitor's socket has to read."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data
        self.asked: list[int] = []

    def recv_now(self, view: memoryview) -> int:
        self.asked.append(len(view))
        if not self.data:
            return -1
        count = min(len(view), len(self.data))
        view[:count], self.data = self.data[:count], self.data[count:]
        return count


class Failures(list[OSError]):
    def __call__(self, error: OSError) -> None:
        self.append(error)


def make(end: FakeEnd) -> tuple[Writer, Failures]:
    failures = Failures()
    return Writer(end, failures), failures  # type: ignore[arg-type]


def allow_all(wanted: int) -> int:
    return wanted


def frames(data: bytes) -> list[tuple[int, int, bytes]]:
    """``(type, stream, payload)`` of every whole frame."""
    found = []
    while data:
        length, kind, _, stream_id = http2.unpack_head(data, 0)
        found.append((kind, stream_id, bytes(data[9 : 9 + length])))
        assert len(data) >= 9 + length, "a torn frame"
        data = data[9 + length :]
    return found


PING = bytes.fromhex("000008 06 00 00000000".replace(" ", "")) + b"12345678"
UPDATE = http2.window_update(3, 7)


# -- turns --------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["as its turn comes", "with its turn"])
def test_a_sender_killed_as_it_gets_its_turn_leaves_no_control_frame_behind(moment: str) -> None:
    """There is nobody else to send what waited for his frame."""
    end = FakeEnd()
    writer, _ = make(end)
    writer._lock.acquire()
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"data"), allow_all)
    wait_until(lambda: writer._lock.wanted)
    writer.control(PING)
    if moment == "as its turn comes":
        sender.kill(block=False)
        writer._release()
    else:
        writer._release()
        sender.kill(block=False)
    with deadline():
        sender.join()
    assert not writer._lock.held
    assert end.sent.startswith(PING)


# -- control frames -----------------------------------------------------------


def test_control_is_sent_at_once_where_the_kernel_takes_it() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    writer.control(PING)
    assert end.sent == PING
    assert writer.pending == 0
    assert writer.sent == len(PING)


def test_queued_control_goes_with_the_next_data_in_one_call_and_before_it() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    writer.queue(PING)
    assert not end.sent
    assert writer.send_data(1, memoryview(b"x" * LONG), allow_all) == LONG
    assert frames(end.sent) == [(6, 0, b"12345678"), (0, 1, b"x" * LONG)]
    assert end.calls == 1


def send_small(writer: Writer, stream_id: int, payload: bytes) -> None:
    """As a session does: joined to what is queued where that may be, else in turn."""
    if writer.takes_small:
        writer.join(stream_id, payload)
    else:
        assert writer.send_data(stream_id, memoryview(payload), allow_all) == len(payload)


def test_small_data_of_one_round_leaves_in_one_call_in_order() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    source = Source(b"from a source")
    writer.queue(PING)
    send_small(writer, 1, b"one")
    assert writer.send_data_from(3, source, allow_all, lambda _: None, None) == 13  # type: ignore[arg-type]
    send_small(writer, 5, b"five")
    assert not end.sent
    wait_until(lambda: bool(end.sent))
    small = [(0, 1, b"one"), (0, 3, b"from a source"), (0, 5, b"five")]
    assert frames(end.sent) == [(6, 0, b"12345678"), *small]
    assert end.calls == 1
    assert writer.pending == 0


def test_what_waits_because_of_small_data_never_stops_the_reader() -> None:
    end = FakeEnd(room=0)
    writer, _ = make(end)
    senders = [gevent.spawn(send_small, writer, 1, b"x" * SMALL) for _ in range(9)]
    gevent.idle()
    assert writer.pending + writer.unsent > JOIN_LIMIT
    assert writer.pending <= CONTROL_LIMIT
    end.make_room(BIG)
    with deadline():
        gevent.joinall(senders, raise_error=True)
        wait_until(lambda: len(end.sent) == 9 * (9 + SMALL))
    assert len(frames(end.sent)) == 9


def test_control_never_waits_for_a_blocked_sender_and_never_cuts_into_its_frame() -> None:
    end = FakeEnd(room=100)
    writer, _ = make(end)
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"x" * LONG), allow_all)
    wait_until(lambda: end.room == 0)
    for _ in range(10):
        writer.control(UPDATE)  # called by the reader: would switch greenlets if it blocked
    assert writer.pending == 10 * len(UPDATE)
    assert writer.unsent == 9 + LONG - 100
    end.make_room(BIG)
    with deadline():
        assert sender.get() == LONG
    assert [kind for kind, _, _ in frames(end.sent)] == [0] + [8] * 10
    assert (writer.pending, writer.unsent, writer.sent) == (0, 0, len(end.sent))


def test_control_that_the_kernel_does_not_take_follows_by_itself() -> None:
    end = FakeEnd(room=5)
    writer, _ = make(end)
    writer.control(PING)
    assert end.sent == PING[:5]
    writer.control(UPDATE)
    end.make_room(BIG)
    with deadline():
        writer.wait_empty()
        wait_until(lambda: len(end.sent) == len(PING + UPDATE))
    assert end.sent == PING + UPDATE


def test_data_waits_behind_half_sent_control() -> None:
    end = FakeEnd(room=5)
    writer, _ = make(end)
    writer.control(PING)
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"data"), allow_all)
    gevent.idle()
    end.make_room(BIG)
    with deadline():
        sender.get()
    assert frames(end.sent) == [(6, 0, b"12345678"), (0, 1, b"data")]


def test_the_reader_waits_only_beyond_the_limit() -> None:
    end = FakeEnd(room=0)
    writer, _ = make(end)
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"x" * LONG), allow_all)
    gevent.idle()
    while writer.pending + len(UPDATE) <= CONTROL_LIMIT:
        writer.control(UPDATE)
    with deadline():
        writer.wait_drained()  # returns at once
    writer.control(UPDATE)
    waiting = gevent.spawn(writer.wait_drained)
    gevent.idle()
    assert not waiting.ready()
    end.make_room(BIG)
    with deadline():
        gevent.joinall([waiting, sender], raise_error=True)
    assert len(frames(end.sent)) == 1 + CONTROL_LIMIT // len(UPDATE) + 1


# -- data ---------------------------------------------------------------------


def test_a_lone_sender_gets_a_long_turn_and_several_get_short_ones_alternating() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    payload = memoryview(bytes(2 * CHUNK))
    assert writer.send_data(1, payload, allow_all) == CHUNK
    end.sent.clear()
    end.room = 0

    def send(stream_id: int) -> None:
        left = payload[: 4 * SHARED_CHUNK]
        while left:
            left = left[writer.send_data(stream_id, left, allow_all) :]

    senders = [gevent.spawn(send, stream_id) for stream_id in (1, 3, 5)]
    gevent.idle()
    end.make_room(BIG)
    with deadline():
        gevent.joinall(senders, raise_error=True)
    sent = [(stream_id, len(payload)) for _, stream_id, payload in frames(end.sent)]
    assert sent[1:4] == [(3, SHARED_CHUNK), (5, SHARED_CHUNK), sent[3]]
    for stream_id in (1, 3, 5):
        assert sum(size for stream, size in sent if stream == stream_id) == 4 * SHARED_CHUNK


def test_turns_are_short_beside_something_small(monkeypatch: pytest.MonkeyPatch) -> None:
    end = FakeEnd()
    writer, _ = make(end)
    payload = memoryview(bytes(2 * CHUNK))
    assert writer.send_data(1, payload, allow_all) == CHUNK
    assert writer.send_data(3, payload, allow_all) == CHUNK
    writer.join(5, b"small")
    assert writer.send_data(1, payload, allow_all) == SHARED_CHUNK
    monkeypatch.setattr("tinytun_gevent.writer.MOMENT", -1.0)
    writer.join(5, b"small")  # and that moment is over
    assert writer.send_data(1, payload, allow_all) == CHUNK


def test_nothing_allowed_sends_nothing_and_gives_the_turn_back() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    assert writer.send_data(1, memoryview(b"data"), lambda _: 0) == 0
    assert writer.send_data_from(1, Source(b"data"), lambda _: 0, lambda _: None, None) == -1  # type: ignore[arg-type]
    assert not end.sent
    assert writer.send_data(1, memoryview(b"data"), allow_all) == 4


def test_an_error_of_the_window_gives_the_turn_back() -> None:
    end = FakeEnd()
    writer, _ = make(end)

    def refuse(wanted: int) -> int:
        raise SessionClosedError("over")

    with pytest.raises(SessionClosedError):
        writer.send_data(1, memoryview(b"data"), refuse)
    writer.control(PING)
    assert end.sent == PING


def test_data_from_a_source_is_read_behind_its_own_frame_head() -> None:
    end, charged = FakeEnd(), []
    writer, _ = make(end)
    source = Source(b"x" * (LONG + 2))
    moved = writer.send_data_from(9, source, lambda wanted: LONG, charged.append, None)  # type: ignore[arg-type]
    assert (moved, charged, source.asked) == (LONG, [LONG], [LONG])
    assert frames(end.sent) == [(0, 9, b"x" * LONG)]
    assert end.calls == 1


def test_a_source_without_bytes_and_one_at_its_end_send_nothing() -> None:
    end = FakeEnd()
    writer, _ = make(end)
    assert writer.send_data_from(1, Source(), allow_all, pytest.fail, None) == -1  # type: ignore[arg-type]

    class Ended(Source):
        def recv_now(self, view: memoryview) -> int:
            return 0

    assert writer.send_data_from(1, Ended(), allow_all, pytest.fail, None) == 0  # type: ignore[arg-type]
    assert not end.sent


def test_a_gate_lets_a_part_through_and_is_charged_for_that_part() -> None:
    end, charged, kept = FakeEnd(), [], bytearray()
    writer, _ = make(end)

    def gate(view: memoryview) -> int:
        kept.extend(view[2:])
        return 2

    got = writer.send_data_from(1, Source(b"abcdef"), allow_all, charged.append, gate)  # type: ignore[arg-type]
    assert (got, charged, bytes(kept)) == (6, [2], b"cdef")
    wait_until(lambda: bool(end.sent))
    assert frames(end.sent) == [(0, 1, b"ab")]


# -- the end ------------------------------------------------------------------


def test_a_sender_killed_inside_a_frame_ends_the_connection() -> None:
    """Whatever came behind half a frame would be taken for its rest."""
    end = FakeEnd(room=50)
    writer, failures = make(end)
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"x" * LONG), allow_all)
    wait_until(lambda: end.room == 0)
    sender.kill()
    end.make_room(BIG)
    writer.control(PING)
    gevent.idle()
    assert failures
    assert len(end.sent) == 50


def test_the_reader_learns_that_nothing_leaves() -> None:
    end = FakeEnd(room=0)
    writer, _ = make(end)
    sender = gevent.spawn(writer.send_data, 1, memoryview(b"x" * LONG), allow_all)
    gevent.idle()
    writer.control(UPDATE * (CONTROL_LIMIT // len(UPDATE) + 1))
    assert not writer.wait_drained(0.01)
    waiting = gevent.spawn(writer.wait_drained, 5.0)
    gevent.idle()
    end.make_room(BIG)
    with deadline():
        assert waiting.get()
        sender.get()


def test_a_broken_connection_is_reported_and_nothing_waits_on() -> None:
    end = FakeEnd(room=10)
    writer, failures = make(end)
    first = gevent.spawn(writer.send_data, 1, memoryview(b"x" * LONG), allow_all)
    second = gevent.spawn(writer.send_data, 3, memoryview(b"x" * LONG), allow_all)
    gevent.idle()
    writer.control(UPDATE * (CONTROL_LIMIT // len(UPDATE) + 1))
    reader = gevent.spawn(writer.wait_drained)
    gevent.idle()
    end.break_now()
    with deadline():
        gevent.joinall([first, second, reader])
    assert isinstance(first.exception, SessionClosedError)
    assert isinstance(second.exception, SessionClosedError)
    assert reader.successful()
    assert failures
    assert writer.pending == 0


def test_control_on_a_broken_connection_is_reported_without_raising() -> None:
    end = FakeEnd()
    writer, failures = make(end)
    end.break_now()
    writer.control(PING)
    assert len(failures) == 1
    assert writer.pending == 0


@pytest.mark.parametrize("slow", [False, True])
def test_over_a_real_socket_every_frame_arrives_whole(slow: bool) -> None:
    one, other = socket_pair()
    with other:
        failures = Failures()
        writer = Writer(PlainEnd(one), failures)
        size = 3 * SHARED_CHUNK + 17

        def send(stream_id: int) -> None:
            payload = memoryview(bytes([stream_id]) * size)
            while payload:
                payload = payload[writer.send_data(stream_id, payload, allow_all) :]
                writer.control(UPDATE)

        senders = [gevent.spawn(send, stream_id) for stream_id in (1, 3, 5, 7)]

        def finish() -> None:
            gevent.joinall(senders, raise_error=True)
            writer.wait_empty()
            one.close()

        closing = gevent.spawn(finish)
        received = bytearray()
        with deadline():
            while data := other.recv(3000 if slow else 300_000):
                received += data
                if slow and len(received) < 100_000:
                    gevent.sleep(0)
            closing.get()
        by_stream = {stream_id: bytearray() for stream_id in (1, 3, 5, 7)}
        for kind, stream_id, payload in frames(bytes(received)):
            if kind == http2.DATA:
                by_stream[stream_id] += payload
        assert by_stream == {stream_id: bytes([stream_id]) * size for stream_id in by_stream}
        assert not failures
