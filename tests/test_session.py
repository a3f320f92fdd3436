"""Two sessions that speak to each other, and one that meets a peer who breaks the rules."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import gevent
import pytest
import trustme
from gevent import socket
from helpers import (
    MIB,
    ORIGINAL_REQUEST,
    Inbox,
    RawPeer,
    Wire,
    data_frame,
    deadline,
    fd_count,
    greenlet_count,
    headers_frame,
    raw_peer,
    session_pair,
    socket_pair,
    tls_ends,
    wait_until,
)
from hpack.hpack import Decoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinytun_gevent import incoming, writer
from tinytun_gevent import session as session_module
from tinytun_gevent.errors import (
    PeerProtocolError,
    PeerSilentError,
    SessionClosedError,
    SessionError,
    StreamLimitError,
    StreamResetError,
)
from tinytun_gevent.flow import INITIAL_WINDOW
from tinytun_gevent.guard import ENHANCE_YOUR_CALM
from tinytun_gevent.keepalive import PROBES
from tinytun_gevent.session import ABORTED_AT_ONCE, Session
from tinytun_gevent.stream import CANCEL, REFUSED_STREAM, Stream
from tinytun_gevent.wire.frames import FRAMES_AT_ONCE
from tinytun_gevent.wire.http2 import MAX_WINDOW, PREFACE

PROTOCOL_ERROR, FLOW_CONTROL_ERROR, STREAM_CLOSED, FRAME_SIZE_ERROR, COMPRESSION_ERROR = 1, 3, 5, 6, 9
HEADER_TABLE_SIZE, MAX_CONCURRENT, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 3, 4, 5


# -- the greeting -------------------------------------------------------------


def test_both_sides_know_each_other_s_limits_and_have_measured_the_path() -> None:
    with session_pair(max_streams=7) as pair:
        assert pair.opener.peer_max_streams == 7
        assert pair.acceptor.peer_max_streams == 0
        with deadline():
            pair.opener.keep_alive.first_answer.wait()
            pair.acceptor.keep_alive.first_answer.wait()
        assert 0 < pair.opener.keep_alive.min_rtt < 1
        assert pair.opener.error is None


def test_bytes_that_came_with_the_handshake_are_not_lost() -> None:
    ours, theirs = socket_pair()
    peer = RawPeer(theirs)
    greeting = PREFACE + SettingsFrame(0).serialize() + headers_frame(1).serialize()
    accepted: list[Stream] = []
    session = Session(ours, opener=False, max_streams=5, received=greeting, on_stream=accepted.append)
    starting = gevent.spawn(session.start)
    with deadline():
        peer.wait(SettingsFrame)
        peer.wait(PingFrame)
        starting.get()
    assert len(accepted) == 1
    session.close()
    theirs.close()


@pytest.mark.parametrize("opener", [True, False])
def test_a_silent_peer_is_given_up_in_time(opener: bool) -> None:
    ours, theirs = socket_pair()
    session = Session(ours, opener=opener, max_streams=5)
    with deadline(), pytest.raises(PeerSilentError):
        session.start(0.2)
    assert session.closed.is_set()
    with deadline():
        RawPeer(theirs).wait_end()
    theirs.close()


@pytest.mark.parametrize("opener", [True, False])
def test_a_peer_that_leaves_instead_of_greeting(opener: bool) -> None:
    ours, theirs = socket_pair()
    session = Session(ours, opener=opener, max_streams=5)
    starting = gevent.spawn(session.start)
    theirs.close()
    with deadline(), pytest.raises(SessionClosedError):
        starting.get()
    assert session.closed.is_set()


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 40, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"]
)
def test_what_is_no_preface_is_refused(first: bytes) -> None:
    with raw_peer(opener=False, start=False) as (session, peer, _):
        starting = gevent.spawn(session.start)
        peer.send(first)
        with deadline(), pytest.raises(PeerProtocolError):
            starting.get()
        with deadline():
            assert peer.wait_goaway().error_code == PROTOCOL_ERROR


@pytest.mark.parametrize("opener", [True, False])
@pytest.mark.parametrize("first", [PingFrame(0, b"12345678"), DataFrame(1, b"x"), WindowUpdateFrame(0, 5)])
def test_a_first_frame_other_than_settings_is_refused(opener: bool, first: DataFrame) -> None:
    with raw_peer(opener=opener, start=False) as (session, peer, _):
        starting = gevent.spawn(session.start)
        peer.send(b"" if opener else PREFACE, first)
        with deadline(), pytest.raises(PeerProtocolError):
            starting.get()
        with deadline():
            assert peer.wait_goaway().error_code == PROTOCOL_ERROR


def test_the_original_server_s_greeting_and_request_are_accepted() -> None:
    """Empty SETTINGS, no WINDOW_UPDATE, ``82 86 84``."""
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1, ORIGINAL_REQUEST))
        with deadline():
            answer = peer.wait(HeadersFrame, 1)
        assert answer.data == b"\x88"  # :status 200
        assert (b":authority", b"tunnel") in pair.accepted[0].stream.peer_fields
        peer.send(data_frame(1, b"hello", "END_STREAM"))
        assert pair.accepted[0].wait_end() == b"hello"
        assert session.stream_count == 1


# -- opening ------------------------------------------------------------------


def test_the_visitor_s_address_travels_with_the_stream() -> None:
    with session_pair() as pair:
        pair.opener.open("203.0.113.9:5123")
        pair.opener.flush()
        wait_until(lambda: pair.accepted)
        fields = pair.accepted[0].stream.peer_fields
        assert (b"x-tinytun-visitor", b"203.0.113.9:5123") in fields
        _, far = pair.open()
        assert b"x-tinytun-visitor" not in dict(far.stream.peer_fields)


def test_data_may_go_before_the_peer_accepts() -> None:
    with session_pair() as pair:
        pair._answer = False
        near, far = pair.open()
        near.stream.sendall(b"early")
        assert far.wait(5) == b"early"
        assert not near.stream.accepted
        far.stream.accept()
        wait_until(lambda: near.stream.accepted)


def test_the_peer_s_limit_is_kept_and_a_place_is_free_again_at_the_end_of_a_stream() -> None:
    with session_pair(max_streams=2) as pair:
        rooms: list[int] = []
        pair.opener.on_room = lambda session: rooms.append(session.stream_count)
        one, far = pair.open()
        two, _ = pair.open()
        assert not pair.opener.has_room
        with pytest.raises(StreamLimitError):
            pair.opener.open()
        one.stream.shutdown()
        far.wait_end()
        assert not pair.opener.has_room, "half-closed streams count"
        far.stream.shutdown()
        one.wait_end()
        assert rooms == [1]
        two.stream.reset()
        assert rooms == [1, 0]
        pair.open()


def test_streams_over_the_limit_are_refused_and_the_others_go_on() -> None:
    with raw_peer(opener=False, max_streams=2) as (session, peer, pair):
        peer.send(*(headers_frame(number) for number in (1, 3, 5, 7)))
        with deadline():
            for number in (5, 7):
                assert peer.wait(RstStreamFrame, number).error_code == REFUSED_STREAM
        assert session.stream_count == len(pair.accepted) == 2
        # DATA for a refused stream may have been under way.
        peer.send(data_frame(5, b"late"), data_frame(1, b"fine"))
        assert pair.accepted[0].wait(4) == b"fine"
        peer.send(RstStreamFrame(3, error_code=CANCEL), headers_frame(9))
        wait_until(lambda: len(pair.accepted) == 3)


def test_a_refused_stream_says_so() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        with deadline():
            peer.wait(HeadersFrame, 1)
        peer.send(RstStreamFrame(1, error_code=REFUSED_STREAM))
        error = inbox.wait_error()
        assert isinstance(error, StreamResetError)
        assert (error.code, error.remote) == (REFUSED_STREAM, True)


def test_an_answer_other_than_200_resets_the_stream() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        peer.send(headers_frame(1, b"\x8d"))  # :status 404
        with deadline():
            assert peer.wait(RstStreamFrame, 1).error_code == CANCEL
        inbox.wait_error()


def test_a_stream_that_ended_on_both_sides_with_an_answer_other_than_200_is_over() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        inbox.stream.shutdown()
        with deadline():
            peer.wait(DataFrame, 1)
        peer.send(headers_frame(1, b"\x8d", "END_STREAM"))  # :status 404
        inbox.wait_error()
        other = Inbox(session.open())
        session.flush()
        peer.send(headers_frame(3, b"\x88"), data_frame(3, b"fine"))
        assert other.wait(4) == b"fine"


def test_an_answer_on_a_stream_that_had_something_unusual_before() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        priority = raw(2, b"\0\0\0\0\x10", 0, 1)
        peer.send(priority, headers_frame(1, b"\x88"))
        peer.send(data_frame(1, b"fine"), data_frame(1, b"", "END_STREAM"))
        assert inbox.wait_end() == b"fine"
        assert inbox.stream.accepted
        assert not session.closed.is_set()


@pytest.mark.parametrize("opener", [True, False])
@pytest.mark.parametrize("sizes", [[0], [0, 0], [100, 0, 4096]])
def test_a_peer_that_resizes_its_table_reads_the_next_block(opener: bool, sizes: list[int]) -> None:
    """The block has to begin with what the table was reduced to (RFC 7541 §4.2)."""
    with raw_peer(opener=opener) as (session, peer, pair):
        for size in sizes:
            peer.send(SettingsFrame(0, {HEADER_TABLE_SIZE: size}))
            with deadline():
                peer.wait(SettingsFrame, ack=True)
        if opener:
            session.open("192.0.2.1:5")
            session.open()
            session.flush()
        else:
            peer.send(headers_frame(1), headers_frame(3))
            wait_until(lambda: len(pair.accepted) == 2)
            for inbox in pair.accepted:
                inbox.stream.accept()
        decoder = Decoder()
        with deadline():
            first, second = peer.wait(HeadersFrame), peer.wait(HeadersFrame)
        assert first.data[0] == 0x20, "the smallest size comes first"
        decoder.max_allowed_table_size = min(sizes)
        if sizes[-1] != min(sizes):
            decoder.max_allowed_table_size = sizes[-1]
        for frame in (first, second):
            assert ((":status", "200") in decoder.decode(frame.data)) is not opener
        assert second.data[0] & 0xE0 != 0x20, "it is told once"


def test_sizes_of_the_table_do_not_pile_up() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        for size in range(60):
            peer.send(SettingsFrame(0, {HEADER_TABLE_SIZE: size}))
            with deadline():
                peer.wait(SettingsFrame, ack=True)
        assert len(session.conn.encoder.table_size_changes) <= 2


def test_the_opener_accepts_no_streams() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        peer.send(headers_frame(2, b"\x82\x86\x84"))
        with deadline():
            session.closed.wait()
        assert isinstance(session.error, PeerProtocolError)


def test_a_session_whose_stream_numbers_are_used_up_makes_way_for_another() -> None:
    with session_pair() as pair:
        near, far = pair.open()
        pair.opener.conn.highest_outbound_stream_id = 2**31 - 3
        last, _ = pair.open()
        assert last.stream.id == 2**31 - 1
        with pytest.raises(SessionClosedError):
            pair.opener.open()
        near.wait_error()
        far.wait_error()
        with deadline():
            pair.acceptor.closed.wait()


def test_hundreds_of_streams_one_after_the_other_leave_nothing() -> None:
    with session_pair(max_streams=10) as pair:
        for number in range(600):
            near, far = pair.open()
            if number % 3 == 0:
                near.stream.reset()
                far.wait_error()
            else:
                near.stream.shutdown()
                far.wait_end()
                far.stream.shutdown()
                near.wait_end()
            pair.accepted.clear()
        assert pair.opener.streams_opened == pair.acceptor.streams_opened == 600
        assert (pair.opener.stream_count, pair.acceptor.stream_count) == (0, 0)
        assert not pair.opener._conn_streams() if hasattr(pair.opener, "_conn_streams") else True


# -- windows ------------------------------------------------------------------


def test_a_peer_that_sends_beyond_the_stream_s_window_is_cut_off() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        pair._hold = True
        peer.send(headers_frame(1))
        sending = gevent.spawn(peer.send, *[data_frame(1, bytes(16384))] * (INITIAL_WINDOW // 16384))
        with deadline():
            sending.get()
            wait_until(lambda: pair.accepted and len(pair.accepted[0].received) == INITIAL_WINDOW)
        assert not session.closed.is_set()
        peer.send(data_frame(1, b"x"))
        with deadline():
            assert peer.wait_goaway().error_code == FLOW_CONTROL_ERROR
            session.closed.wait()
        assert isinstance(session.error, PeerProtocolError)
        assert session.error.code == FLOW_CONTROL_ERROR
        assert isinstance(pair.accepted[0].wait_error(), PeerProtocolError)


def test_padding_counts_and_is_given_back() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1))
        count = 3 * INITIAL_WINDOW // 256
        credited = 0
        for _ in range(count):
            peer.send(data_frame(1, b"p", padding=254))
        with deadline():
            while credited < 2 * INITIAL_WINDOW:
                credited += peer.wait(WindowUpdateFrame, 1).window_increment
        assert pair.accepted[0].wait(count) == b"p" * count
        assert not session.closed.is_set()
        assert session.backlog == 0


def test_padded_data_beyond_the_window_is_cut_off_too() -> None:
    with raw_peer(opener=False) as (_, peer, pair):
        pair._hold = True
        peer.send(headers_frame(1))
        for _ in range(INITIAL_WINDOW // 256 + 1):
            peer.send(data_frame(1, b"p" * 200, padding=55))
        with deadline():
            assert peer.wait_goaway().error_code == FLOW_CONTROL_ERROR


@pytest.mark.parametrize(
    "payload", [b"\x05abc", b"\x04abcd"[:4], b""], ids=["longer", "as long", "no length"]
)
def test_impossible_padding_is_refused(payload: bytes) -> None:
    with raw_peer(opener=False) as (_, peer, _pair):
        peer.send(headers_frame(1))
        head = len(payload).to_bytes(3, "big") + bytes([0, 8]) + (1).to_bytes(4, "big")
        peer.send(head + payload)
        with deadline():
            assert peer.wait_goaway().error_code in (PROTOCOL_ERROR, FRAME_SIZE_ERROR)


def test_padding_and_the_end_of_the_stream_in_one_frame() -> None:
    with raw_peer(opener=False) as (_, peer, pair):
        peer.send(headers_frame(1), data_frame(1, b"bye", "END_STREAM", padding=10))
        wait_until(lambda: pair.accepted)
        assert pair.accepted[0].wait_end() == b"bye"
        peer.send(headers_frame(3), data_frame(3, b"", "END_STREAM", padding=10))
        wait_until(lambda: len(pair.accepted) == 2)
        assert pair.accepted[1].wait_end() == b""


def test_a_window_that_opens_byte_by_byte_wakes_nobody_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte is sent in the end; without a limit 50 streams were woken 300 times each for them."""
    woken = 0
    wake = Stream.wake

    def counting(stream: Stream) -> None:
        nonlocal woken
        woken += 1
        wake(stream)

    with raw_peer(opener=True) as (session, peer, _):
        session.conn.outbound_flow_control_window = 0
        senders = [gevent.spawn(session.open().sendall, b"x" * 100) for _ in range(50)]
        wait_until(lambda: len(session.blocked) == 50)
        monkeypatch.setattr(Stream, "wake", counting)
        received = 0
        with deadline():
            for _ in range(300):
                peer.send(WindowUpdateFrame(0, 1))
            while received < 300:
                received += len(peer.wait(DataFrame).data)
        assert woken <= 50 * 35
        gevent.killall(senders)


def test_a_smaller_window_by_settings_stops_the_sender_and_a_larger_one_lets_him_go_on() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        stream = session.open()
        Inbox(stream)
        sender = gevent.spawn(stream.sendall, b"x" * 100_000)
        received = 0
        with deadline():
            while received < 65535:
                received += len(peer.wait(DataFrame, 1).data)
        peer.send(SettingsFrame(0, {INITIAL_WINDOW_SIZE: 1000}))  # the stream's window is negative now
        with deadline():
            peer.wait(SettingsFrame, ack=True)
        peer.send(WindowUpdateFrame(0, 1_000_000), WindowUpdateFrame(1, 60_000))
        gevent.sleep(0.02)
        assert stream.send_window <= 0
        peer.send(SettingsFrame(0, {INITIAL_WINDOW_SIZE: 200_000}))
        with deadline():
            while received < 100_000:
                received += len(peer.wait(DataFrame, 1).data)
            sender.get()


def test_a_window_that_shrinks_below_nothing_while_a_sender_waits_for_his_turn() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        stream = session.open()
        Inbox(stream)
        stream.sendall(b"x" * 60_000)
        with deadline():
            session.writer._lock.acquire()
        sender = gevent.spawn(stream.sendall, b"y" * 1000)
        wait_until(lambda: session.writer._lock.wanted)
        peer.send(SettingsFrame(0, {INITIAL_WINDOW_SIZE: 0}))
        wait_until(lambda: stream.allowance < 0)
        session.writer._release()
        wait_until(lambda: stream in session.blocked)
        assert stream.allowance == -60_000
        peer.send(WindowUpdateFrame(1, 61_000))
        with deadline():
            sender.get()


def test_a_window_update_with_a_flag_that_nobody_knows_counts() -> None:
    """Such flags are to be ignored (RFC 9113 §4.1)."""
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        peer.send(raw(8, (4096).to_bytes(4, "big"), 0x40, 1), headers_frame(1, b"\x88"), data_frame(1, b"x"))
        assert inbox.wait(1) == b"x"
        assert inbox.stream.send_window == 65535
        assert inbox.stream.allowance == 65535 + 4096


def test_the_connection_s_window_holds_all_streams_and_releases_all() -> None:
    """The original's server never opens it beyond 64 KiB."""
    with raw_peer(opener=True) as (session, peer, _):
        peer.send(SettingsFrame(0, {INITIAL_WINDOW_SIZE: 10 * MIB}))
        with deadline():
            peer.wait(SettingsFrame, ack=True)
        streams = [Inbox(session.open()).stream for _ in range(4)]
        senders = [gevent.spawn(stream.sendall, b"x" * 50_000) for stream in streams]
        received = {stream.id: 0 for stream in streams}
        with deadline():
            while sum(received.values()) < 65535:
                frame = peer.wait(DataFrame)
                received[frame.stream_id] += len(frame.data)
            gevent.sleep(0.02)
            assert sum(stream.sent for stream in streams) == 65535
            peer.send(WindowUpdateFrame(0, 200_000))
            while sum(received.values()) < 200_000:
                frame = peer.wait(DataFrame)
                received[frame.stream_id] += len(frame.data)
            gevent.joinall(senders, raise_error=True)
        assert set(received.values()) == {50_000}


class Credits:
    """What a session's WINDOW_UPDATEs grant, by stream, summed in a greenlet of its own."""

    def __init__(self, peer: RawPeer) -> None:
        self.granted: dict[int, int] = {0: MAX_WINDOW, 1: INITIAL_WINDOW}  # the first update has been read
        self._peer = peer
        self.greenlet = gevent.spawn(self._read)

    def _read(self) -> None:
        while (frame := self._peer.next()) is not None:
            if isinstance(frame, WindowUpdateFrame):
                self.granted[frame.stream_id] += frame.window_increment


def test_the_round_trip_is_asked_for_several_times_at_the_start() -> None:
    """The first answer may come from a process that is still starting."""
    ours, theirs = socket_pair()
    session, peer = Session(ours, opener=True), RawPeer(theirs)
    try:
        with deadline():
            starting = gevent.spawn(session.start)
            peer.greet(client=False, settings={3: 100})
            for _ in range(PROBES):
                peer.wait(PingFrame)
            starting.get()
            wait_until(lambda: not session.keep_alive.liveness.awaited)
        assert 0 < session.keep_alive.min_rtt < 5
    finally:
        session.close()
        theirs.close()


def test_the_connection_s_window_is_opened_wide_and_refilled() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        credits = Credits(peer)
        peer.send(headers_frame(1))
        frame, sent, total = data_frame(1, bytes(16384)).serialize(), 0, 65 * MIB
        with deadline():
            wait_until(lambda: pair.accepted)
            pair.accepted[0].received = Nothing()  # type: ignore[assignment]
            while sent < total:
                wait_until(lambda sent=sent: credits.granted[1] - sent >= 16384)
                count = min((credits.granted[1] - sent) // 16384, 64)
                peer.send(frame * count)
                sent += 16384 * count
            wait_until(lambda: credits.granted[0] - sent > MAX_WINDOW - 4 * MIB)
        assert not session.closed.is_set()
        credits.greenlet.kill()


class Nothing:
    """A place where bytes go."""

    def __iadd__(self, data: object) -> Nothing:
        return self


@pytest.mark.parametrize("stream_id", [0, 1])
def test_a_window_beyond_the_maximum_is_a_flow_control_error(stream_id: int) -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        with deadline():
            peer.wait(HeadersFrame, 1)
        peer.send(WindowUpdateFrame(stream_id, MAX_WINDOW))
        with deadline():
            if stream_id:
                assert peer.wait(RstStreamFrame, 1).error_code == FLOW_CONTROL_ERROR
                inbox.wait_error()
            else:
                assert peer.wait_goaway().error_code == FLOW_CONTROL_ERROR


# -- a peer that breaks the rules ---------------------------------------------


def raw(kind: int, payload: bytes = b"", flags: int = 0, stream_id: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([raw(0, b"x", 0, 0)], PROTOCOL_ERROR),
        ([raw(0, b"x", 0, 5)], PROTOCOL_ERROR),
        ([raw(1, ORIGINAL_REQUEST, 4, 0)], PROTOCOL_ERROR),
        ([raw(1, ORIGINAL_REQUEST, 4, 2)], PROTOCOL_ERROR),
        ([raw(1, b"\xff" * 20, 4, 3)], COMPRESSION_ERROR),
        ([raw(1, b"\x3f\xe2\x1f" + ORIGINAL_REQUEST, 4, 3)], COMPRESSION_ERROR),
        ([raw(1, ORIGINAL_REQUEST, 0, 3), raw(0, b"x", 0, 1)], PROTOCOL_ERROR),
        ([raw(1, ORIGINAL_REQUEST, 0, 3), raw(6, b"12345678")], PROTOCOL_ERROR),
        ([raw(9, ORIGINAL_REQUEST, 4, 3)], PROTOCOL_ERROR),
        ([raw(3, b"\0\0\0\x08", 0, 0)], PROTOCOL_ERROR),
        ([raw(3, b"\0\0\x08", 0, 1)], FRAME_SIZE_ERROR),
        ([raw(3, b"\0\0\0\x08", 0, 99)], PROTOCOL_ERROR),
        ([raw(1, ORIGINAL_REQUEST, 0, 3), raw(0, b"\0x", 8, 1)], PROTOCOL_ERROR),
        ([raw(4, b"\0\4\x80\0\0\0")], FLOW_CONTROL_ERROR),
        ([raw(4, b"\0\5\0\0\0\1")], PROTOCOL_ERROR),
        ([raw(4, b"\0\5\0\0")], FRAME_SIZE_ERROR),
        ([raw(6, b"1234567")], FRAME_SIZE_ERROR),
        ([raw(8, b"\0\0\0\0")], PROTOCOL_ERROR),
        ([raw(8, b"\0\0\0\1", 0, 99)], PROTOCOL_ERROR),
        ([raw(8, b"\0\0\1")], FRAME_SIZE_ERROR),
        ([b"\0\x40\x01" + bytes([1, 4]) + b"\0\0\0\3"], FRAME_SIZE_ERROR),
        ([b"\x04\0\x01" + bytes([0, 0]) + b"\0\0\0\1"], FRAME_SIZE_ERROR),
        ([b"\xff\xff\xff" + bytes([99, 0]) + b"\0\0\0\0"], FRAME_SIZE_ERROR),
    ],
    ids=[
        "DATA without a stream",
        "DATA on an idle stream",
        "HEADERS without a stream",
        "HEADERS on an even stream",
        "a block that does not unpack",
        "a table over 4096 bytes",
        "DATA inside a block",
        "PING inside a block",
        "CONTINUATION of nothing",
        "RST_STREAM without a stream",
        "a short RST_STREAM",
        "RST_STREAM on an idle stream",
        "padded DATA inside a block",
        "an initial window over 2^31-1",
        "frames of 1 byte",
        "a short SETTINGS",
        "a short PING",
        "an increment of 0",
        "WINDOW_UPDATE of an idle stream",
        "a short WINDOW_UPDATE",
        "HEADERS over 16 KiB",
        "DATA over the announced size",
        "an unknown frame of 16 MiB",
    ],
)
def test_a_peer_that_breaks_http2_is_told_so_and_left(frames: list[bytes], code: int) -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1))
        wait_until(lambda: pair.accepted)
        peer.send(*frames)
        with deadline():
            assert peer.wait_goaway().error_code == code
            session.closed.wait()
            peer.wait_end()
        assert isinstance(session.error, PeerProtocolError)
        assert isinstance(pair.accepted[0].wait_error(), PeerProtocolError)


def test_mistakes_with_one_stream_leave_the_session_alone() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1), data_frame(1, b"", "END_STREAM"), headers_frame(3))
        wait_until(lambda: len(pair.accepted) == 2)
        peer.send(data_frame(1, b"after the end"))
        with deadline():
            assert peer.wait(RstStreamFrame, 1).error_code == STREAM_CLOSED
        pair.accepted[0].stream.reset()
        peer.send(data_frame(1, b"x"), WindowUpdateFrame(1, 5), RstStreamFrame(1, error_code=8))
        peer.send(data_frame(3, b"fine"))
        assert pair.accepted[1].wait(4) == b"fine"
        assert not session.closed.is_set()


@pytest.mark.parametrize(
    "frame",
    [
        raw(6, b"12345678"),
        raw(4),
        raw(4, b"\0\3\0\0\0\x64"),
        raw(8, b"\0\0\0\1"),
        raw(2, b"\0\0\0\0\x10", 0, 1),
        raw(0, b"", 0, 1),
        raw(77, b"unknown"),
        raw(4, b"\x77\x77\0\0\0\1"),
    ],
    ids=[
        "PING",
        "SETTINGS",
        "SETTINGS again",
        "WINDOW_UPDATE",
        "PRIORITY",
        "empty DATA",
        "unknown",
        "unknown setting",
    ],
)
def test_a_flood_of_small_frames_takes_no_memory_and_no_other_stream_s_turn(frame: bytes) -> None:
    """The peer does not read the answers: the session stops reading instead of piling them up."""
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1))
        wait_until(lambda: pair.accepted)
        flood = gevent.spawn(peer.send, frame * 200_000)
        until = time.monotonic() + 0.3
        most = 0
        while time.monotonic() < until and not flood.ready():
            most = max(most, session.writer.pending)
            gevent.sleep(0.001)
        assert most <= 2 * MIB, "answers pile up"
        flood.kill()


def test_very_many_frames_in_one_read_let_others_have_turns_between_them() -> None:
    """A byte each: that is no flood, but it is not to hold everybody else up either."""
    count = 20_000
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1))
        wait_until(lambda: pair.accepted)
        stream = pair.accepted[0].stream
        sender = gevent.spawn(peer.send, data_frame(1, b"x").serialize() * count)
        most = last = 0
        behind = False
        with deadline():
            while stream.received < count:
                most, last = max(most, stream.received - last), stream.received
                behind = behind or session.behind
                gevent.sleep(0)
            sender.get()
            while session.behind:
                gevent.sleep(0)
        assert behind, "others run while bytes wait to be looked at"
        assert most <= 2 * FRAMES_AT_ONCE  # the last ones of a read, and the first ones of the next
        assert pair.accepted[0].wait(count) == b"x" * count


def test_the_end_of_very_many_streams_lets_others_run() -> None:
    """Each may have an answer to write about it."""
    with session_pair(5 * ABORTED_AT_ONCE) as pair:
        streams = [pair.opener.open() for _ in range(5 * ABORTED_AT_ONCE)]
        pair.opener.close()
        aborted = [stream.error is not None for stream in streams]
        assert sum(aborted) == ABORTED_AT_ONCE
        wait_until(lambda: all(stream.error is not None for stream in streams))
        assert {type(stream.error) for stream in streams} == {SessionClosedError}


def test_streams_that_were_of_use_may_be_reset_in_any_number() -> None:
    """What moved bytes is no rapid reset, and nothing of it stays."""
    count = 5000
    with raw_peer(opener=False) as (session, peer, pair):
        reader = gevent.spawn(peer.wait_end)
        for start in range(1, 2 * count, 100):
            batch = range(start, start + 100, 2)
            peer.send(*map(headers_frame, batch))
            wait_until(lambda: len(pair.accepted) == 50)
            while pair.accepted:
                pair.accepted.pop().stream.sendall(b"x")
            peer.send(*(RstStreamFrame(number, error_code=8) for number in batch))
        peer.send(headers_frame(2 * count + 1), data_frame(2 * count + 1, b"fine"))
        wait_until(lambda: pair.accepted)
        assert pair.accepted[-1].wait(4) == b"fine"
        assert session.stream_count == 1
        assert len(session.conn._closed_streams) <= session.conn.MAX_CLOSED_STREAMS
        assert len(session.conn.streams) == 0
        reader.kill()


def test_an_answer_begins_with_the_200() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        peer.send(data_frame(1, b"too early"))
        with deadline():
            assert peer.wait_goaway().error_code == PROTOCOL_ERROR
        assert isinstance(inbox.wait_error(), PeerProtocolError)
        assert not inbox.received


def test_what_crosses_our_resets_is_no_flood() -> None:
    """The answer, the end and the reset of each stream that we reset: a thousand at once."""
    with raw_peer(opener=True, start=False) as (session, peer, _):
        peer.greet(client=False, settings={3: 1000})
        session.start()
        session.pacing.admits = lambda stream: True  # type: ignore[method-assign]
        numbers = [session.open().id for _ in range(1000)]
        for stream in list(session.streams.values()):
            stream.reset()
        late = [
            frame
            for n in numbers
            for frame in (headers_frame(n, b"\x88"), data_frame(n, b"x", "END_STREAM"), RstStreamFrame(n))
        ]
        peer.send(*late, PingFrame(0, b"so far ?"))
        with deadline():
            assert peer.wait(PingFrame, ack=True).opaque_data == b"so far ?"
        assert not session.closed.is_set()


@pytest.mark.parametrize("flags", [0x00, 0xFF])
def test_flags_that_are_not_defined_hide_nothing(flags: int) -> None:
    with raw_peer(opener=False) as (_, peer, _):
        peer.send(raw(3, b"\0\0\0\x08", flags, 99))
        with deadline():
            assert peer.wait_goaway().error_code == PROTOCOL_ERROR


@pytest.mark.parametrize("padding", [None, 3])
def test_what_is_under_way_when_we_reset_a_stream_is_dropped_as_far_as_its_window_went(
    padding: int | None,
) -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1), data_frame(1, bytes(1000)))
        wait_until(lambda: pair.accepted)
        pair.accepted[0].wait(1000)
        pair.accepted[0].stream.reset()
        left = INITIAL_WINDOW - 1000
        extra = 0 if padding is None else 1 + padding
        frames = [data_frame(1, bytes(16384 - extra), padding=padding)] * (left // 16384)
        peer.send(*frames, PingFrame(0, b"so far ?"))
        with deadline():
            assert peer.wait(PingFrame, ack=True).opaque_data == b"so far ?"
            assert session.backlog == 0
            peer.send(*frames)
            assert peer.wait_goaway().error_code == FLOW_CONTROL_ERROR


def test_a_stream_refused_by_whoever_gets_it_counts_as_one_that_was_reset() -> None:
    with raw_peer(opener=False) as (session, peer, _):
        session.on_stream = lambda stream: stream.reset(REFUSED_STREAM)
        peer.send(*(headers_frame(number) for number in range(1, 2 * 250, 2)))
        with deadline():
            for number in range(1, 2 * 200, 2):
                assert peer.wait(RstStreamFrame, number).error_code == REFUSED_STREAM
            assert peer.wait_goaway().error_code == ENHANCE_YOUR_CALM


def test_our_own_resets_are_not_charged_to_a_peer_whose_streams_h2_follows() -> None:
    """The request has a field more than usual; the local service is down, say."""
    block = ORIGINAL_REQUEST + b"\x00\x01a\x01b"
    with raw_peer(opener=False) as (session, peer, pair):
        for number in range(1, 2 * 300, 2):
            peer.send(headers_frame(number, block))
            wait_until(lambda: pair.accepted)
            assert number in session.conn.streams
            pair.accepted.pop().stream.reset()
            with deadline():
                peer.wait(RstStreamFrame, number)
        peer.send(PingFrame(0, b"so far ?"))
        with deadline():
            assert peer.wait(PingFrame, ack=True).opaque_data == b"so far ?"
        assert session.error is None


def test_a_refused_stream_that_h2_knows_is_charged_once() -> None:
    block = ORIGINAL_REQUEST + b"\x00\x01a\x01b"
    with raw_peer(opener=False, max_streams=0) as (session, peer, _):
        peer.send(*(headers_frame(number, block) for number in range(1, 2 * 180, 2)))
        with deadline():
            for number in range(1, 2 * 180, 2):
                assert peer.wait(RstStreamFrame, number).error_code == REFUSED_STREAM
        assert session.error is None


def test_only_the_answer_to_our_own_ping_is_one() -> None:
    with raw_peer(opener=True, start=False) as (session, peer, _):
        peer.greet(client=False, settings={3: 100})
        session.start()
        with deadline():
            asked = peer.next()
            while not isinstance(asked, PingFrame):
                asked = peer.next()
        foreign = PingFrame(0, bytes(8), flags=["ACK"])
        peer.send(foreign, PingFrame(0, b"so far ?"))
        with deadline():
            assert peer.wait(PingFrame, ack=True).opaque_data == b"so far ?"
        assert session.keep_alive.liveness.awaited
        peer.send(PingFrame(0, asked.opaque_data, flags=["ACK"]))
        with deadline():
            session.keep_alive.first_answer.wait()


@contextlib.contextmanager
def jammed(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> Iterator[tuple[Session, RawPeer, gevent.Greenlet[Any, None]]]:
    """A session that sends ``count`` bytes to a peer that has not read any yet, with short patience."""
    monkeypatch.setattr(incoming, "STALLED", 0.05)
    monkeypatch.setattr(writer, "CONTROL_LIMIT", 1000)
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        peer.send(headers_frame(1, b"\x88"), WindowUpdateFrame(1, 2**30), WindowUpdateFrame(0, 2**30))
        session.flush()
        sender = gevent.spawn(inbox.stream.sendall, bytes(count))
        wait_until(lambda: session.writer.unsent)
        yield session, peer, sender


def test_a_peer_that_makes_us_answer_and_reads_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it makes us answer is less than any limit, and it takes nothing of what is on its way to it."""
    monkeypatch.setattr(session_module, "HANG_UP", 3600.0)
    with jammed(monkeypatch, 64 * MIB) as (session, peer, sender):
        stopped = session.writer.sent
        wait_until(lambda: session.writer.unsent and session.writer.sent == stopped)
        peer.send(PingFrame(0, b"12345678").serialize() * 100)
        with deadline():  # nobody waits for the GOAWAY to leave
            session.closed.wait()
            with pytest.raises(SessionError):
                sender.get()
        assert isinstance(session.error, PeerProtocolError)
        assert session.error.code == ENHANCE_YOUR_CALM


def test_a_slow_peer_that_makes_us_answer_is_none_that_reads_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with jammed(monkeypatch, 16 * MIB) as (session, peer, sender):
        peer.send(PingFrame(0, b"12345678").serialize() * 100)
        with deadline():
            while not sender.ready():
                peer.sock.recv(MIB)
                gevent.sleep(0.02)
        assert not session.closed.is_set()


@given(
    st.lists(
        st.tuples(st.integers(0, 10), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=30)),
        max_size=8,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_garbage_ends_a_session_only_as_the_peer_s_fault(frames: list[tuple[int, int, int, bytes]]) -> None:
    with raw_peer(opener=False) as (session, peer, _):
        peer.send(
            headers_frame(1), *(raw(kind, payload, flags, stream) for kind, flags, stream, payload in frames)
        )
        peer.send(raw(6, b"the-last"))
        with deadline(), contextlib.suppress(ConnectionResetError):  # left with something unread
            while (frame := peer.next()) is not None:
                if isinstance(frame, PingFrame) and frame.opaque_data == b"the-last":
                    break
                assert not isinstance(frame, GoAwayFrame) or frame.error_code != 2, frame
        if session.closed.is_set():
            assert isinstance(session.error, PeerProtocolError)


# -- going away ---------------------------------------------------------------


def test_a_graceful_goaway_of_the_acceptor_lets_running_streams_finish() -> None:
    with session_pair() as pair:
        told: list[bool] = []
        pair.opener.on_goaway = lambda session: told.append(session.goaway_received)
        near, far = pair.open()
        pair.acceptor.goaway()
        wait_until(lambda: told)
        assert told == [True]
        with pytest.raises(SessionClosedError):
            pair.opener.open()
        near.stream.sendall(b"question")
        near.stream.shutdown()
        assert far.wait_end() == b"question"
        far.stream.sendall(b"answer" * 100_000)
        far.stream.shutdown()
        assert near.wait_end() == b"answer" * 100_000
        pair.acceptor.close()
        with deadline():
            pair.opener.closed.wait()
        assert pair.opener.error is None


def test_a_graceful_goaway_of_the_opener_lets_running_streams_finish() -> None:
    with session_pair() as pair:
        near, far = pair.open()
        pair.opener.goaway()
        wait_until(lambda: pair.acceptor.goaway_received)
        far.stream.sendall(b"answer")
        far.stream.shutdown()
        assert near.wait_end() == b"answer"
        near.stream.shutdown()
        far.wait_end()
        pair.opener.close()
        with deadline():
            pair.acceptor.closed.wait()
        assert pair.acceptor.error is None


def test_streams_opened_across_a_goaway_are_refused_so_that_they_can_be_tried_elsewhere() -> None:
    with session_pair() as pair:
        near, _ = pair.open()
        pair.acceptor.goaway()
        crossing = Inbox(pair.opener.open())
        pair.opener.flush()
        error = crossing.wait_error()
        assert isinstance(error, StreamResetError)
        assert (error.code, error.remote) == (REFUSED_STREAM, True)
        assert near.error is None


def test_no_number_of_streams_that_cross_our_goaway_is_a_flood() -> None:
    """A long path has as many on their way as we take, and the running ones are to end in peace."""
    with raw_peer(opener=False, max_streams=600) as (session, peer, pair):
        peer.send(headers_frame(1))
        wait_until(lambda: pair.accepted)
        session.goaway()
        peer.send(*(headers_frame(number) for number in range(3, 3 + 2 * 600, 2)))
        with deadline():
            assert peer.wait_goaway().error_code == 0
            for number in range(3, 3 + 2 * 600, 2):
                assert peer.wait(RstStreamFrame, number).error_code == REFUSED_STREAM
        assert session.error is None
        assert session.stream_count == 1
        peer.send(*(headers_frame(number) for number in range(2001, 2001 + 2 * 250, 2)))
        with deadline():
            assert peer.wait_goaway().error_code == ENHANCE_YOUR_CALM


def test_streams_above_the_last_one_of_a_goaway_were_not_begun() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        first, second = Inbox(session.open()), Inbox(session.open())
        session.flush()
        with deadline():
            peer.wait(HeadersFrame, 3)
        peer.send(GoAwayFrame(0, last_stream_id=1), headers_frame(1, b"\x88"), data_frame(1, b"fine"))
        error = second.wait_error()
        assert isinstance(error, StreamResetError)
        assert error.code == REFUSED_STREAM
        assert first.wait(4) == b"fine"
        assert not session.closed.is_set()


def test_an_opener_whose_peer_went_away_closes_when_its_last_stream_is_over() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        inbox = Inbox(session.open())
        session.flush()
        peer.send(headers_frame(1, b"\x88"), GoAwayFrame(0, last_stream_id=1))
        wait_until(lambda: session.goaway_received)
        assert not session.closed.is_set()
        peer.send(data_frame(1, b"last words", "END_STREAM"))
        assert inbox.wait_end() == b"last words"
        inbox.stream.shutdown()
        with deadline():
            session.closed.wait()
            peer.wait_end()
        assert session.error is None


def test_an_opener_without_streams_closes_as_soon_as_its_peer_goes_away() -> None:
    with raw_peer(opener=True) as (session, peer, _):
        peer.send(GoAwayFrame(0, last_stream_id=0))
        with deadline():
            session.closed.wait()
            peer.wait_end()
        assert session.error is None


def test_going_away_twice_says_it_once() -> None:
    with raw_peer(opener=False) as (session, peer, _):
        session.goaway()
        session.goaway()
        session.close()
        with deadline():
            peer.wait_goaway()
            assert peer.next() is None


# -- over TLS ----------------------------------------------------------------


def test_bulk_both_ways_over_tls_beside_many_small_streams() -> None:
    with session_pair(sockets=tls_ends(trustme.CA())) as pair:
        bulk, far = pair.open()
        payload = bytes(range(256)) * (16 * 1024)
        senders = [gevent.spawn(end.stream.sendall, payload) for end in (bulk, far)]
        for number in range(50):
            near, there = pair.open()
            near.stream.sendall(b"%d" % number)
            near.stream.shutdown()
            assert there.wait_end() == b"%d" % number
            there.stream.sendall(b"answer")
            there.stream.shutdown()
            assert near.wait_end() == b"answer"
        with deadline():
            gevent.joinall(senders, raise_error=True)
        assert bulk.wait(len(payload)) == payload
        assert far.wait(len(payload)) == payload
        assert pair.opener.stream_count == pair.acceptor.stream_count == 1


@pytest.mark.parametrize("side", ["opener", "acceptor"])
def test_resets_and_the_end_of_a_session_over_tls(side: str) -> None:
    with session_pair(sockets=tls_ends(trustme.CA())) as pair:
        near, far = pair.open(hold=True)
        blocked = gevent.spawn(near.stream.sendall, b"x" * MIB)
        other, there = pair.open()
        there.stream.reset()
        assert isinstance(other.wait_error(), StreamResetError)
        assert not pair.opener.closed.is_set()
        getattr(pair, side).close()
        with deadline():
            pair.opener.closed.wait()
            pair.acceptor.closed.wait()
            blocked.join()
        assert isinstance(near.wait_error(), SessionClosedError)
        assert isinstance(far.wait_error(), SessionClosedError)


# -- the end ------------------------------------------------------------------


@pytest.mark.parametrize("tls", [True, False])
def test_the_half_close_of_a_session_comes_behind_its_last_frames(tls: bool) -> None:
    with session_pair(sockets=tls_ends(trustme.CA()) if tls else None) as pair:
        near, far = pair.open()
        near.stream.shutdown()
        assert far.wait_end() == b""
        busy = pair.acceptor.writer
        with deadline():
            busy._lock.acquire()
        far.stream.shutdown()
        pair.acceptor.goaway()
        finishing = gevent.spawn(pair.acceptor.finish_writing)
        wait_until(lambda: busy._lock.wanted or finishing.ready())
        busy._release()
        assert near.wait_end() == b""
        with deadline():
            finishing.get()
            pair.opener.closed.wait()
        assert pair.opener.goaway_received


def test_a_close_sends_at_once_what_waits_for_the_end_of_the_round() -> None:
    """The process may end before there is another round."""
    with raw_peer(opener=True) as (session, peer, _):
        stream = session.open()
        session.goaway()
        stream.shutdown()
        session.close()
        assert session.end.closed
        with deadline():
            assert "END_STREAM" in peer.wait(DataFrame, 1).flags


@pytest.mark.parametrize("side", ["opener", "acceptor"])
def test_a_close_wakes_everybody_on_both_sides(side: str) -> None:
    with session_pair() as pair:
        notes: list[str] = []
        pair.opener.on_close.append(lambda _: notes.append("opener"))
        pair.acceptor.on_close.append(lambda _: notes.append("acceptor"))
        blocked = [pair.open(hold=True) for _ in range(3)]
        senders = [gevent.spawn(near.stream.sendall, b"x" * MIB) for near, _ in blocked]
        back = [gevent.spawn(far.stream.sendall, b"x" * MIB) for _, far in blocked]
        wait_until(lambda: all(near.stream.send_window == 0 for near, _ in blocked))
        waiters = [gevent.spawn(session.closed.wait) for session in (pair.opener, pair.acceptor)]
        closing = getattr(pair, side)
        closing.close()
        closing.close(PeerProtocolError("too late to be remembered"))
        with deadline():
            gevent.joinall(senders + back + waiters)
        for sender in senders + back:
            assert sender.successful() or isinstance(sender.exception, SessionClosedError)
        for near, far in blocked:
            assert isinstance(near.wait_error(), SessionClosedError)
            assert isinstance(far.wait_error(), SessionClosedError)
        assert sorted(notes) == ["acceptor", "opener"]
        assert closing.error is None
        with pytest.raises(SessionClosedError):
            pair.opener.open()


def test_requests_that_arrive_during_the_close_start_nothing() -> None:
    """Nobody would ever end such a stream."""
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(*(headers_frame(number) for number in range(1, 41, 2)))
        session.close()
        with deadline():
            peer.wait_end()
        assert session.stream_count == 0
        assert all(inbox.error is not None for inbox in pair.accepted)


def test_requests_behind_the_one_that_closed_the_session_start_nothing() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        session.on_stream = lambda stream: (pair.on_stream(stream), session.close())  # type: ignore[assignment]
        peer.send(*(headers_frame(number) for number in range(1, 41, 2)))
        with deadline():
            peer.wait_end()
        assert session.stream_count == 0
        assert len(pair.accepted) == 1
        assert pair.accepted[0].error is not None


def test_a_lost_connection_aborts_the_streams() -> None:
    with raw_peer(opener=False) as (session, peer, pair):
        peer.send(headers_frame(1), data_frame(1, b"half"))
        wait_until(lambda: pair.accepted and pair.accepted[0].received == b"half")
        peer.sock.close()
        assert isinstance(pair.accepted[0].wait_error(), SessionClosedError)
        assert session.closed.is_set()


def test_an_error_of_ours_in_on_stream_ends_the_session_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with raw_peer(opener=False) as (session, peer, pair), caplog.at_level(logging.ERROR):
        pair._answer = False
        session.closed  # noqa: B018
        pair.accepted = None  # type: ignore[assignment]
        peer.send(headers_frame(1))
        with deadline():
            assert peer.wait_goaway().error_code == 2
            session.closed.wait()
    assert "internal error" in caplog.text


def test_fifty_sessions_leave_no_greenlet_and_no_descriptor() -> None:
    def one() -> None:
        with session_pair() as pair:
            near, far = pair.open()
            near.stream.sendall(b"x" * 10_000)
            far.wait(10_000)

    one()
    gevent.idle()
    fds, greenlets = fd_count(), greenlet_count()
    for _ in range(50):
        one()
    wait_until(lambda: fd_count() <= fds, "descriptors as before")
    wait_until(lambda: greenlet_count() <= greenlets, "greenlets as before")


# -- a dead peer --------------------------------------------------------------


def through(wire: Callable[[int], Wire]) -> tuple[socket.socket, socket.socket, Wire]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    relay = wire(listener.getsockname()[1])
    one = socket.socket()
    one.connect(("127.0.0.1", relay.port))
    other, _ = listener.accept()
    listener.close()
    return one, other, relay


def start_in_thread(run: Callable[[], None]) -> Future[None]:
    """Runs something that mostly waits in a thread, and so a hub, of its own."""
    future: Future[None] = Future()

    def target() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future


def _fail_paths() -> None:
    cases = [gevent.spawn(_die, name) for name in ("idle", "sending", "blocked")]
    cases.append(gevent.spawn(_stall))
    with deadline():
        gevent.joinall(cases, raise_error=True)


@pytest.fixture(scope="module", autouse=True)
def failing_paths() -> Future[None]:
    """Paths that die or stall, while the other tests run."""
    return start_in_thread(_fail_paths)


def test_a_dead_path_is_noticed_by_both_sides_and_a_stalled_one_is_not_dead(
    failing_paths: Future[None],
) -> None:
    """Idle, with a sender, with a sender that is blocked. How soon: ``benchmarks/faults``."""
    failing_paths.result(120)


def _die(name: str) -> None:
    one, other, wire = through(Wire)
    with wire, session_pair(sockets=(one, other)) as pair:
        near, far = pair.open(hold=name == "blocked")
        if name == "blocked":
            gevent.spawn(_send_for_ever, near.stream)
            wait_until(lambda: near.stream.send_window == 0)
        began = time.monotonic()
        wire.black_hole()
        if name == "sending":
            gevent.spawn(_send_for_ever, near.stream)
        for session in (pair.opener, pair.acceptor):
            session.closed.wait()
            assert isinstance(session.error, SessionClosedError), name
        took = time.monotonic() - began
        assert near.error is not None
        assert far.error is not None
        if name == "idle":
            assert took > 4, "too hasty"
            assert isinstance(pair.opener.error, PeerSilentError)


def _send_for_ever(stream: Stream) -> None:
    try:
        while True:
            stream.sendall(b"x" * 10_000)
            gevent.sleep(0.01)
    except SessionClosedError:
        pass


def _stall() -> None:
    """Long enough for a PING to go unanswered."""
    one, other, wire = through(Wire)
    with wire, session_pair(sockets=(one, other)) as pair:
        near, far = pair.open()
        wire.black_hole()
        wait_until(lambda: all(end.keep_alive.liveness.awaited for end in (pair.opener, pair.acceptor)))
        gevent.sleep(2)
        wire.heal()
        near.stream.sendall(b"alive")
        assert far.wait(5) == b"alive"
        wait_until(lambda: not any(end.keep_alive.liveness.awaited for end in (pair.opener, pair.acceptor)))
        assert not pair.opener.closed.is_set()
        assert not pair.acceptor.closed.is_set()


@pytest.mark.parametrize(
    ("frames", "told"),
    [
        ([headers_frame(1, b"\xff\xff\xff")], "a header block cannot be decoded"),
        # h2's text has the line end in it
        ([headers_frame(1, ORIGINAL_REQUEST + b"\x00\x01\n\x01v")], "Illegal character '?'"),
        ([headers_frame(1), data_frame(5, b"x")], "NoSuchStreamError on stream 5"),
    ],
)
def test_what_is_told_of_a_broken_frame_is_one_line_without_addresses(frames: list[Frame], told: str) -> None:
    with raw_peer(opener=False) as (session, peer, _):
        peer.send(*frames)
        with deadline():
            goaway = peer.wait_goaway()
        wait_until(session.closed.is_set)
        for text in (goaway.additional_data.decode(), str(session.error)):
            assert told in text
            assert text.isprintable()
            assert " 0x" not in text
