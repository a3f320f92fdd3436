"""HTTP/2 control: h2's connection, adapted, and the few frames that bypass it.

h2 does what is hard to get right: preface, SETTINGS, HPACK, PING, GOAWAY, and every stream
on which something unusual happens. What the product spends its life on is framed here by
hand (RFC 9113 §4.1): DATA, WINDOW_UPDATE, and the one request and the one answer that open
a stream, whose fields never change. Through h2 a stream cost both programs 420 µs more.
"""

from __future__ import annotations

import re
import struct
from typing import Any, Final

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection
from h2.errors import ErrorCodes, _error_code_from_int
from h2.events import ConnectionTerminated, Event
from h2.exceptions import StreamClosedError, StreamIDTooLowError
from h2.settings import SettingCodes, Settings
from h2.stream import H2Stream, StreamClosedBy, StreamState
from hyperframe.frame import GoAwayFrame, RstStreamFrame, SettingsFrame

from tinytun_gevent.wire.decoder import RequestDecoder, StrictDecoder

Field = tuple[bytes, bytes]

DATA: Final = 0
HEADERS: Final = 1
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8

FRAME_HEAD: Final = 9
"""Bytes of a frame header (RFC 9113 §4.1)."""

SETTING: Final = 6
"""Bytes of one setting (§6.5.1)."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_WINDOW: Final = 2**31 - 1
CONTROL_FRAME_MAX: Final = 16384
"""Longest frame, other than DATA, that is worth buffering: what every peer may send (§4.2)."""

REQUEST_FIELDS: Final[tuple[Field, ...]] = (
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":path", b"/"),
    (b":authority", b"tunnel"),
)
"""What opens a stream: the original's client insists on ``:scheme``, h2 on ``:authority``."""

VISITOR_FIELD: Final = b"x-tinytun-visitor"

RESPONSE_FIELDS: Final[tuple[Field, ...]] = ((b":status", b"200"),)

# The same as header blocks that leave both sides' HPACK tables alone (RFC 7541 §6.1 to §6.2.3): indexed
# where the static table has the whole field, literal without indexing for the authority, never indexed
# for the visitor, whose address would be of no use to anyone later.
_ORIGINAL_BLOCK: Final = b"\x82\x86\x84"
_REQUEST_BLOCK: Final = _ORIGINAL_BLOCK + b"\x01\x06tunnel"
_VISITOR_NAME: Final = b"\x10%c%b" % (len(VISITOR_FIELD), VISITOR_FIELD)
_VISITOR: Final = re.compile(re.escape(_VISITOR_NAME) + rb"([\x01-\x7e])([\x21-\x7e]+)\Z")
_RESPONSE_BLOCK: Final = b"\x88"

_KNOWN_SETTINGS: Final = frozenset(int(code) for code in SettingCodes)

_HEAD = struct.Struct(">BHBBL")
_UPDATE = struct.Struct(">BHBBLL")


def pack_head(buffer: bytearray | memoryview, length: int, kind: int, flags: int, stream_id: int) -> None:
    """Writes a frame header into the first nine bytes of ``buffer``."""
    _HEAD.pack_into(buffer, 0, length >> 16, length & 0xFFFF, kind, flags, stream_id)


def unpack_head(buffer: bytes | bytearray | memoryview, offset: int) -> tuple[int, int, int, int]:
    """Reads a frame header: ``(length, type, flags, stream id)``, reserved bit removed."""
    high, low, kind, flags, stream_id = _HEAD.unpack_from(buffer, offset)
    return high << 16 | low, kind, flags, stream_id & 0x7FFFFFFF


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection (RFC 9113 §6.9)."""
    return _UPDATE.pack(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


def empty_data(stream_id: int, flags: int = 0) -> bytes:
    """A DATA frame without payload: how h2 learns of DATA that did not pass through it."""
    return _HEAD.pack(0, 0, DATA, flags, stream_id)


def goaway(last_stream_id: int, code: int = 0, reason: bytes = b"") -> bytes:
    """A GOAWAY frame, built without telling h2, which would refuse all later frames."""
    return GoAwayFrame(0, last_stream_id, code, reason[:256]).serialize()


def data_head(length: int, stream_id: int) -> bytes:
    """The header of a DATA frame of ``length`` bytes."""
    return _HEAD.pack(length >> 16, length & 0xFFFF, DATA, 0, stream_id)


def rst_stream(stream_id: int, code: int) -> bytes:
    """A RST_STREAM frame (RFC 9113 §6.4)."""
    return _UPDATE.pack(0, 4, RST_STREAM, 0, stream_id, code)


def request(stream_id: int, visitor: str | None = None, update: bytes = b"") -> bytes:
    """The HEADERS frame that opens a stream, for ``visitor`` (``ip:port``) if there is just one.

    Its block begins with ``update``, what :meth:`Connection.table_update` says.
    """
    block = update + _REQUEST_BLOCK
    if visitor is not None:
        block += b"%b%c%b" % (_VISITOR_NAME, len(visitor), visitor.encode("ascii"))
    return _HEAD.pack(0, len(block), HEADERS, END_HEADERS, stream_id) + block


def response(stream_id: int, update: bytes = b"") -> bytes:
    """The HEADERS frame that accepts a stream; ``update`` as for :func:`request`."""
    block = update + _RESPONSE_BLOCK
    return _HEAD.pack(0, len(block), HEADERS, END_HEADERS, stream_id) + block


def read_request(block: bytes) -> list[Field] | None:
    """The fields of a header block as :func:`request` writes it, or the original's server; else None."""
    if block in (_REQUEST_BLOCK, _ORIGINAL_BLOCK):
        return list(REQUEST_FIELDS)
    if not block.startswith(_REQUEST_BLOCK):
        return None
    visitor = _VISITOR.match(block, len(_REQUEST_BLOCK))
    if visitor is None or len(visitor[2]) != visitor[1][0]:
        return None
    return [*REQUEST_FIELDS, (VISITOR_FIELD, visitor[2])]


def is_response(block: bytes) -> bool:
    """Whether a header block is what :func:`response` writes."""
    return block == _RESPONSE_BLOCK


class Connection(H2Connection):
    """h2's connection with its costs and surprises for this use taken out.

    - It keeps no count of open streams: the session does, and h2's own count scans all of
      them for each new one. Call :meth:`forget` when a stream is over.
    - A GOAWAY, sent (by :func:`goaway`) or received, leaves running streams alone.
    - It does not build ``repr(frame)`` for a logger that is off (12 % of a server's time).
    """

    # Each remembered stream costs about 100 bytes; h2's 65536 would be 6 MB a session.
    MAX_CLOSED_STREAMS = 4096

    def __init__(self, *, opener: bool, max_streams: int, window: int, max_frame: int) -> None:
        """``opener`` opens streams (HTTP/2's client); ``max_streams`` is what the peer may open.

        ``window`` is the initial window of a stream and ``max_frame`` the longest frame that
        is taken, both in bytes.
        """
        super().__init__(
            H2Configuration(
                client_side=opener,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        values = {
            SettingCodes.HEADER_TABLE_SIZE: 4096,
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
            SettingCodes.INITIAL_WINDOW_SIZE: window,
            SettingCodes.MAX_FRAME_SIZE: max_frame,
            SettingCodes.MAX_HEADER_LIST_SIZE: 16384,
        }
        self.local_settings = Settings(client=opener, initial_values=values)
        self.max_inbound_frame_size = max_frame
        self.decoder = StrictDecoder() if opener else RequestDecoder()
        self._resets_made = 0
        self.decoder.max_header_list_size = 16384

    @property
    def open_outbound_streams(self) -> int:
        return 0

    @property
    def open_inbound_streams(self) -> int:
        # h2 adds one for the stream a HEADERS frame seems to open. Where none may be opened the
        # limit is 0, and an answer under way to a stream that we have just reset is no new stream.
        return -1

    def begin_outbound(self) -> int:
        """Takes the next stream's number, for a stream that h2 need not know of.

        Raises ``NoAvailableStreamIDError`` when there is none left.
        """
        stream_id = self.get_next_available_stream_id()
        self.state_machine.process_input(ConnectionInputs.SEND_HEADERS)
        self.highest_outbound_stream_id = stream_id
        return stream_id

    def table_update(self) -> bytes:
        """What the next header block must begin with because the peer has resized HPACK's table, once.

        A peer that made it smaller takes anything else for an error (RFC 7541 §4.2).
        """
        return self.encoder.encode(()) if self.encoder.header_table.resized else b""

    def begin_inbound(self, stream_id: int) -> bool:
        """Notes a stream that the peer opens and h2 need not know of; False if h2 has an error for it."""
        if stream_id <= self.highest_inbound_stream_id or not stream_id & 1 or self.config.client_side:
            return False
        self.state_machine.process_input(ConnectionInputs.RECV_HEADERS)
        self.highest_inbound_stream_id = stream_id
        return True

    def adopt(self, stream_id: int, *, answered: bool, sent_all: bool, received_all: bool) -> None:
        """Lets h2 know of an open stream that has done without it until now."""
        stream = H2Stream(stream_id, self.config, self.local_settings.initial_window_size, 0)
        stream.max_outbound_frame_size = self.max_outbound_frame_size
        machine = stream.state_machine
        machine.client = self.config.client_side
        machine.headers_sent = self.config.client_side or answered
        machine.headers_received = answered or not self.config.client_side
        machine.state = (
            StreamState.HALF_CLOSED_LOCAL
            if sent_all
            else StreamState.HALF_CLOSED_REMOTE
            if received_all
            else StreamState.OPEN
        )
        self.streams[stream_id] = stream

    def forget(self, stream_id: int, closed_by: StreamClosedBy = StreamClosedBy.SEND_END_STREAM) -> None:
        """Drops the state of a stream that is over, keeping how it ended (bounded).

        ``closed_by`` says it for a stream that h2 never knew of.
        """
        stream = self.streams.pop(stream_id, None)
        self._closed_streams[stream_id] = (stream.closed_by if stream else None) or closed_by

    def is_over(self, stream_id: int) -> bool:
        """Whether there was a stream of this number and it is closed; call it for one that is not open."""
        opens = self.config.client_side
        highest = self.highest_outbound_stream_id if opens else self.highest_inbound_stream_id
        return bool(stream_id & 1) and stream_id <= highest

    def was_reset_by_us(self, stream_id: int) -> bool:
        """Whether frames for this stream are stragglers that §5.1 says to ignore.

        So are those for one that is over and of which nobody knows any more how it ended.
        """
        closed_by = self._stream_closed_by(stream_id)
        if closed_by is None:
            return stream_id not in self.streams and self.is_over(stream_id)
        return closed_by is StreamClosedBy.SEND_RST_STREAM

    def reset_stream(self, stream_id: int, error_code: int = 0) -> None:
        """Sends RST_STREAM because we want to, which :meth:`take_resets` does not count."""
        super().reset_stream(stream_id, error_code)
        self._resets_made -= 1

    def take_resets(self) -> int:
        """How many RST_STREAM frames the peer has made h2 send since the last call."""
        made, self._resets_made = self._resets_made, 0
        return made

    def take_output(self) -> bytes:
        """The control frames that h2 wants sent, once."""
        return self.data_to_send()

    def _prepare_for_sending(self, frames: list[Any]) -> None:
        self._resets_made += sum(1 for frame in frames if isinstance(frame, RstStreamFrame))
        super()._prepare_for_sending(frames)

    def _receive_frame(self, frame: Any) -> list[Event]:
        try:
            frames, events = self._frame_dispatch_table[frame.__class__](frame)
        except StreamClosedError as error:
            if not self._stream_is_closed_by_reset(error.stream_id):
                raise
            self._refuse(error.stream_id, error.error_code)
            return list(error._events)
        except StreamIDTooLowError as error:
            if self._stream_is_closed_by_reset(error.stream_id):
                self._refuse(error.stream_id, ErrorCodes.STREAM_CLOSED)
                return []
            if self._stream_is_closed_by_end(error.stream_id):
                raise StreamClosedError(error.stream_id) from error
            raise
        self._prepare_for_sending(frames)
        return list(events)

    def _refuse(self, stream_id: int, code: ErrorCodes) -> None:
        frame = RstStreamFrame(stream_id)
        frame.error_code = code
        self._prepare_for_sending([frame])

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Any], list[Event]]:
        """Settings that nobody knows are to be ignored (§6.5.2); h2 would keep them all for ever.

        So would hpack the table's sizes until the next block, of which only the smallest and the last
        one are to be told; and a size that is said twice would be told never.
        """
        frame.settings = {code: value for code, value in frame.settings.items() if code in _KNOWN_SETTINGS}
        answer = super()._receive_settings_frame(frame)
        if sizes := self.encoder.table_size_changes:
            self.encoder.table_size_changes = sorted({min(sizes), sizes[-1]})
            self.encoder.header_table.resized = True
        return answer

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Any], list[Event]]:
        event = ConnectionTerminated()
        event.error_code = _error_code_from_int(frame.error_code)
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


