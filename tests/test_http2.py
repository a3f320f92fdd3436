"""h2's connection as adapted: what it announces, accepts, survives and forgets."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from h2.exceptions import ProtocolError
from hpack.hpack import Decoder, Encoder
from hpack.struct import NeverIndexedHeaderTuple
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytun_gevent.wire import http2
from tinytun_gevent.wire.http2 import PREFACE, Connection

WINDOW = 256 * 1024
MAX_FRAME = 256 * 1024
ORIGINAL_REQUEST = bytes.fromhex("828684")  # :method GET, :scheme http, :path /; no :authority


def make(opener: bool, max_streams: int = 100) -> Connection:
    connection = Connection(opener=opener, max_streams=max_streams, window=WINDOW, max_frame=MAX_FRAME)
    connection.initiate_connection()
    return connection


def acceptor() -> Connection:
    """The client's side of a session that has been greeted; its output so far is dropped."""
    connection = make(opener=False)
    connection.receive_data(PREFACE + SettingsFrame(0).serialize())
    connection.take_output()
    return connection


def pair() -> tuple[Connection, Connection]:
    opener, accepting = make(opener=True, max_streams=0), make(opener=False)
    exchange(opener, accepting)
    return opener, accepting


def exchange(one: Connection, other: Connection) -> tuple[list[Event], list[Event]]:
    """Passes bytes between the two until both are silent: the events at ``one`` and at ``other``."""
    events: tuple[list[Event], list[Event]] = ([], [])
    while True:
        to_other, to_one = one.take_output(), other.take_output()
        if not to_other and not to_one:
            return events
        if to_other:
            events[1].extend(other.receive_data(to_other))
        if to_one:
            events[0].extend(one.receive_data(to_one))


def frames_of(data: bytes) -> list[Any]:
    frames = []
    while data:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        frame.parse_body(memoryview(data[9 : 9 + length]))
        frames.append(frame)
        data = data[9 + length :]
    return frames


def headers(stream_id: int, block: bytes, *flags: str) -> bytes:
    frame = HeadersFrame(stream_id, block)
    for flag in ("END_HEADERS", *flags):
        frame.flags.add(flag)
    return bytes(frame.serialize())


# -- bytes by hand ------------------------------------------------------------


@given(st.integers(0, 2**24 - 1), st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**31 - 1))
def test_frame_heads_survive_a_round_trip(length: int, kind: int, flags: int, stream_id: int) -> None:
    buffer = bytearray(3 + http2.FRAME_HEAD)
    http2.pack_head(memoryview(buffer)[3:], length, kind, flags, stream_id)
    assert http2.unpack_head(buffer, 3) == (length, kind, flags, stream_id)


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_window_updates_are_what_another_library_reads(stream_id: int, increment: int) -> None:
    (frame,) = frames_of(http2.window_update(stream_id, increment))
    assert isinstance(frame, WindowUpdateFrame)
    assert (frame.stream_id, frame.window_increment) == (stream_id, increment)


def test_goaway_and_empty_data_are_what_another_library_reads() -> None:
    (goaway,) = frames_of(http2.goaway(7, 3, b"because" + b"!" * 1000))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code, len(goaway.additional_data)) == (7, 3, 256)
    (data,) = frames_of(http2.empty_data(9, http2.END_STREAM))
    assert isinstance(data, DataFrame)
    assert (data.stream_id, data.data, set(data.flags)) == (9, b"", {"END_STREAM"})


# -- the greeting -------------------------------------------------------------


@pytest.mark.parametrize(("opener", "max_streams"), [(True, 0), (False, 100), (False, 7)])
def test_the_first_settings_say_what_is_meant(opener: bool, max_streams: int) -> None:
    output = make(opener, max_streams).take_output()
    assert output.startswith(PREFACE) == opener
    first = frames_of(output.removeprefix(PREFACE))[0]
    assert isinstance(first, SettingsFrame)
    assert first.settings.get(SettingsFrame.ENABLE_CONNECT_PROTOCOL, 0) == 0
    assert {key: value for key, value in first.settings.items() if key <= 6} == {
        SettingsFrame.HEADER_TABLE_SIZE: 4096,
        SettingsFrame.ENABLE_PUSH: 0,
        SettingsFrame.MAX_CONCURRENT_STREAMS: max_streams,
        SettingsFrame.INITIAL_WINDOW_SIZE: WINDOW,
        SettingsFrame.MAX_FRAME_SIZE: MAX_FRAME,
        SettingsFrame.MAX_HEADER_LIST_SIZE: 16384,
    }


def test_a_pushed_stream_is_an_error() -> None:
    opener, _ = pair()
    opener.send_headers(1, list(http2.REQUEST_FIELDS))
    promise = bytes.fromhex("000007 05 04 00000001 00000002 828684".replace(" ", ""))
    with pytest.raises(ProtocolError):
        opener.receive_data(promise)


# -- requests -----------------------------------------------------------------


def fields_of(events: list[Event]) -> list[tuple[bytes, bytes]]:
    (request,) = [event for event in events if isinstance(event, RequestReceived)]
    return [(bytes(name), bytes(value)) for name, value in request.headers or ()]


def test_the_original_s_request_without_authority_is_accepted() -> None:
    events = acceptor().receive_data(headers(1, ORIGINAL_REQUEST))
    assert fields_of(events) == [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":path", b"/"),
        (b":authority", b"tunnel"),
    ]


@pytest.mark.parametrize("named", [(":authority", "example.com"), ("host", "example.com")])
def test_a_request_that_names_its_host_is_left_as_it_is(named: tuple[str, str]) -> None:
    block = Encoder().encode([(":method", "GET"), (":scheme", "http"), (":path", "/"), named])
    fields = fields_of(acceptor().receive_data(headers(1, block)))
    assert [value for name, value in fields if name in (b":authority", b"host")] == [b"example.com"]


def test_a_split_request_without_authority_is_accepted() -> None:
    first, last = HeadersFrame(1, ORIGINAL_REQUEST[:1]), ContinuationFrame(1, ORIGINAL_REQUEST[1:])
    last.flags.add("END_HEADERS")
    fields = fields_of(acceptor().receive_data(first.serialize() + last.serialize()))
    assert (b":authority", b"tunnel") in fields


def test_trailers_get_no_authority() -> None:
    connection = acceptor()
    connection.receive_data(headers(1, ORIGINAL_REQUEST))
    connection.receive_data(headers(1, Encoder().encode([("x-sum", "1")]), "END_STREAM"))


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "GET"), (":path", "/")],
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), ("Upper", "x")],
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":path", "/")],
        [(":method", "GET"), (":scheme", "http"), (":path", "/"), ("connection", "close")],
    ],
    ids=["no scheme", "upper case", "two paths", "connection field"],
)
def test_malformed_requests_are_refused(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(ProtocolError):
        acceptor().receive_data(headers(1, Encoder().encode(fields)))


def test_our_own_request_has_all_four_fields_and_the_visitor_never_indexed() -> None:
    (frame,) = frames_of(http2.request(1, "203.0.113.7:4711"))
    decoder = Decoder()
    fields = list(decoder.decode(frame.data, raw=True))
    assert [tuple(field) for field in fields[:4]] == list(http2.REQUEST_FIELDS)
    assert tuple(fields[4]) == (b"x-tinytun-visitor", b"203.0.113.7:4711")
    assert isinstance(fields[4], NeverIndexedHeaderTuple)
    assert not decoder.header_table.dynamic_entries
    assert http2.read_request(frame.data) == [tuple(field) for field in fields]


def test_our_own_answer_is_what_hpack_makes_of_it() -> None:
    (frame,) = frames_of(http2.response(7))
    assert list(Decoder().decode(frame.data, raw=True)) == list(http2.RESPONSE_FIELDS)
    assert frame.stream_id == 7
    assert http2.is_response(frame.data)


@given(block=st.binary(max_size=40), tail=st.binary(max_size=40))
def test_a_request_that_is_read_without_hpack_says_the_same_with_it(block: bytes, tail: bytes) -> None:
    """What read_request takes for one of ours decodes to just that; the rest it leaves to h2."""
    (frame,) = frames_of(http2.request(1, "203.0.113.7:4711"))
    for candidate in (block, frame.data[:8] + tail, frame.data[: -len(tail) or None] + tail):
        read = http2.read_request(candidate)
        if read is not None:
            decoded = [tuple(field) for field in Decoder().decode(candidate, raw=True)]
            assert decoded == [field for field in read if field[0] != b":authority" or field in decoded]


def test_a_stream_that_h2_learns_of_late_is_in_the_state_that_it_has() -> None:
    opener, accepting = pair()
    number = opener.begin_outbound()
    assert accepting.begin_inbound(number)
    opener.adopt(number, answered=False, sent_all=False, received_all=False)
    accepting.adopt(number, answered=False, sent_all=False, received_all=False)
    accepting.send_headers(number, http2.RESPONSE_FIELDS)
    (event,) = opener.receive_data(accepting.take_output())
    assert isinstance(event, ResponseReceived)
    opener.end_stream(number)
    accepting.end_stream(number)
    assert any(isinstance(event, StreamEnded) for event in accepting.receive_data(opener.take_output()))
    assert any(isinstance(event, StreamEnded) for event in opener.receive_data(accepting.take_output()))


def test_streams_are_begun_in_order_only() -> None:
    opener, accepting = pair()
    assert (opener.begin_outbound(), opener.begin_outbound()) == (1, 3)
    assert accepting.begin_inbound(3)
    assert not accepting.begin_inbound(1)
    assert not accepting.begin_inbound(4)
    assert not opener.begin_inbound(5)


def test_a_block_that_unpacks_to_too_much_is_refused() -> None:
    encoder = Encoder()
    bomb = encoder.encode([(":method", "GET"), (":scheme", "http"), (":path", "/"), ("x", "y" * 3000)])
    bomb += bytes([0x80 | 62]) * 10  # the long field again and again, one byte each
    with pytest.raises(ProtocolError):
        acceptor().receive_data(headers(1, bomb))


def test_settings_that_nobody_knows_are_forgotten() -> None:
    connection = acceptor()
    before = set(connection.remote_settings)
    for start in range(0x100, 0x10000, 0x100):
        settings = [(code, 1) for code in range(start, start + 0x100)] + [
            (SettingsFrame.MAX_FRAME_SIZE, 20_000)
        ]
        payload = b"".join(struct.pack("!HL", *setting) for setting in settings)
        connection.receive_data(len(payload).to_bytes(3, "big") + b"\x04\0\0\0\0\0" + payload)
    assert connection.max_outbound_frame_size == 20_000
    assert set(connection.remote_settings) == before


# -- many streams -------------------------------------------------------------


def test_streams_beyond_the_announced_number_do_not_end_the_connection() -> None:
    connection = acceptor()
    for number in range(300):
        events = connection.receive_data(headers(2 * number + 1, ORIGINAL_REQUEST))
        assert fields_of(events)
    assert len(connection.streams) == 300


def test_what_is_over_is_forgotten_and_only_so_much_of_it_remembered() -> None:
    opener, accepting = pair()
    for number in range(Connection.MAX_CLOSED_STREAMS + 100):
        stream_id = 2 * number + 1
        opener.send_headers(stream_id, list(http2.REQUEST_FIELDS))
        accepting.receive_data(opener.take_output())
        accepting.reset_stream(stream_id, 8)
        accepting.take_output()
        accepting.forget(stream_id)
        opener.forget(stream_id)
    assert not accepting.streams
    assert len(accepting._closed_streams) <= Connection.MAX_CLOSED_STREAMS


# -- after a reset ------------------------------------------------------------


def test_frames_under_way_when_we_reset_a_stream_do_not_end_the_connection() -> None:
    opener, accepting = pair()
    opener.send_headers(1, list(http2.REQUEST_FIELDS))
    exchange(opener, accepting)
    accepting.reset_stream(1, 8)
    accepting.forget(1)
    assert accepting.was_reset_by_us(1)
    update = WindowUpdateFrame(1, window_increment=5).serialize()
    trailers = headers(1, Encoder().encode([("x", "y")]), "END_STREAM")
    reset = RstStreamFrame(1, error_code=8).serialize()
    accepting.receive_data(update + http2.empty_data(1) + trailers + reset)
    codes = {type(frame).__name__ for frame in frames_of(accepting.take_output())}
    assert codes <= {"RstStreamFrame"}
    assert fields_of(accepting.receive_data(headers(3, ORIGINAL_REQUEST)))


def test_an_answer_under_way_when_we_reset_its_stream_does_not_end_the_connection() -> None:
    """The opener takes no streams at all, which h2 would hold against that answer."""
    opener, accepting = pair()
    opener.send_headers(1, list(http2.REQUEST_FIELDS))
    accepting.receive_data(opener.take_output())
    accepting.send_headers(1, [*http2.RESPONSE_FIELDS, (b"server", b"x")])
    opener.reset_stream(1, 8)
    opener.forget(1)
    exchange(opener, accepting)
    opener.send_headers(3, list(http2.REQUEST_FIELDS))
    exchange(opener, accepting)
    accepting.send_headers(3, [*http2.RESPONSE_FIELDS, (b"server", b"x")])  # refers to the table
    events, _ = exchange(opener, accepting)
    assert isinstance(events[0], ResponseReceived)
    assert (b"server", b"x") in (events[0].headers or ())


def test_data_after_the_end_of_a_stream_is_answered_by_a_reset() -> None:
    """A stream error of type STREAM_CLOSED (RFC 9113 §5.1), whether or not we remember the stream."""
    accepting = acceptor()
    accepting.receive_data(headers(1, ORIGINAL_REQUEST) + http2.empty_data(1, http2.END_STREAM))
    accepting.send_headers(1, http2.RESPONSE_FIELDS)
    accepting.end_stream(1)
    accepting.forget(1)
    assert not accepting.was_reset_by_us(1)
    accepting.take_output()
    accepting.receive_data(http2.empty_data(1))
    (reset,) = [f for f in frames_of(accepting.take_output()) if isinstance(f, RstStreamFrame)]
    assert (reset.stream_id, reset.error_code) == (1, ErrorCodes.STREAM_CLOSED)


def test_data_for_a_stream_that_never_was_is_a_mistake() -> None:
    with pytest.raises(ProtocolError):
        acceptor().receive_data(http2.empty_data(5))


# -- going away ---------------------------------------------------------------


def test_a_goaway_leaves_running_streams_alone_on_both_sides() -> None:
    opener, accepting = pair()
    opener.send_headers(1, list(http2.REQUEST_FIELDS))
    exchange(opener, accepting)
    (event,) = opener.receive_data(http2.goaway(1, 0, b"bye"))
    assert isinstance(event, ConnectionTerminated)
    assert (event.error_code, event.last_stream_id, event.additional_data) == (0, 1, b"bye")
    accepting.send_headers(1, http2.RESPONSE_FIELDS)
    accepting.end_stream(1)
    events, _ = exchange(opener, accepting)
    assert [type(event) for event in events] == [ResponseReceived, DataReceived, StreamEnded]
    opener.end_stream(1)
    opener.ping(b"12345678")
    events, _ = exchange(opener, accepting)
    assert any(isinstance(event, PingAckReceived) for event in events)


def test_an_unknown_error_code_in_a_goaway_or_reset_is_no_error() -> None:
    opener, accepting = pair()
    opener.send_headers(1, list(http2.REQUEST_FIELDS))
    exchange(opener, accepting)
    reset, terminated = opener.receive_data(
        RstStreamFrame(1, error_code=0xDEAD).serialize() + http2.goaway(1, 0xBEEF)
    )
    assert isinstance(reset, StreamReset)
    assert isinstance(terminated, ConnectionTerminated)
    assert (reset.error_code, terminated.error_code) == (0xDEAD, 0xBEEF)


# -- anything at all ----------------------------------------------------------

frames = st.builds(
    lambda kind, flags, stream_id, payload: (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload
    ),
    st.integers(0, 10),
    st.integers(0, 255),
    st.sampled_from([0, 1, 1, 3, 5, 2, 2**31 - 1, 2**32 - 1]),
    st.one_of(
        st.binary(max_size=40),
        st.just(ORIGINAL_REQUEST),
        st.binary(min_size=4, max_size=4),
        st.binary(min_size=8, max_size=8),
        st.lists(st.binary(min_size=6, max_size=6), max_size=3).map(b"".join),
    ),
)


@given(st.booleans(), st.lists(frames, max_size=10))
@settings(max_examples=200)
def test_garbage_in_frames_raises_only_protocol_errors(opener: bool, stream: list[bytes]) -> None:
    """The session hands h2 one frame at a time, and tells the peer's mistakes by their type."""
    connection = make(opener, 100)
    greeting = SettingsFrame(0).serialize()
    connection.receive_data(greeting if opener else PREFACE + greeting)
    if opener:
        connection.send_headers(1, list(http2.REQUEST_FIELDS))
    try:
        for frame in stream:
            connection.receive_data(frame)
            connection.take_output()
    except ProtocolError:
        pass


def test_the_plain_library_would_have_refused_the_original_s_request() -> None:
    """Why the decoder is adapted; if this fails, the adaptation can go."""
    plain = H2Connection(H2Configuration(client_side=False, header_encoding=None))
    plain.initiate_connection()
    plain.receive_data(PREFACE + SettingsFrame(0).serialize())
    with pytest.raises(ProtocolError):
        plain.receive_data(headers(1, ORIGINAL_REQUEST))
