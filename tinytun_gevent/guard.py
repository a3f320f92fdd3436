"""How much of what costs a peer next to nothing, and us something, it may send. Pure: no I/O, no clock.

Every HTTP/2 frame is legal many times over, so the only defense against a flood is to count (RFC 9113 §10.5).
What is counted is work without use: nothing here is charged for bytes that a stream moves, and what honest
peers send because of such bytes is measured by them. Times are monotonic seconds.
"""

from __future__ import annotations

from typing import Final

from tinytun_gevent.bucket import Bucket
from tinytun_gevent.errors import PeerProtocolError

FLOW_CONTROL_ERROR: Final = 3
ENHANCE_YOUR_CALM: Final = 11

RESETS: Final = (200, 33)
"""Streams that were opened for nothing, at once and then a second: a page that is left while it loads costs
a few dozen. Our own server keeps far below (`pacing.py`)."""

MOMENT: Final = 0.1
"""Seconds after which the reset of a stream that has been accepted is an ordinary one. With 100 streams at
once that is 1000 a second, and nothing that the limit of streams does not bound."""

SETTINGS: Final = (64, 1)
"""Settings: a peer says six or seven when it greets, and hardly ever another one."""

EMPTY_DATA: Final = (100, 10)
"""DATA frames without a byte that do not end their stream either, or with padding only."""

HEADERS: Final = (200, 20)
"""Header blocks that have to be unpacked, beyond :data:`BLOCKS_PER_STREAM` for each stream."""

BLOCKS_PER_STREAM: Final = 3
"""A request or answer, one interim answer and trailers."""

IDLE: Final = (256, 32)
"""PING, PRIORITY, GOAWAY and frames that nobody knows, together: the original's server says PING every 10 s,
ours every 4 s, and five times when it starts."""

UPDATES: Final = (2000, 1000)
"""WINDOW_UPDATEs, besides one for each :data:`UPDATE_BYTES` that we send: our peers say one for 64 KiB, the
original one for 32 KiB of the stream and of the connection. More often than a KiB nobody should."""

UPDATE_BYTES: Final = 256

BLOCK_FRAMES: Final = 16
"""CONTINUATION frames of one header block, empty ones included."""

BLOCK_BYTES: Final = 32 * 1024
"""Bytes of one header block before it is unpacked, at most to the announced 16 KiB."""


MOST_SAVED: Final = 65_536
"""Of what each stream may have, so much is kept for later at most: no more streams are ever under way, and a
million that went well are no reason to take a million frames for nothing."""

STRAY_BYTES: Final = 64 * 1024 * 1024
"""DATA that is under way at most when its streams are reset: more than the buffers of a connection hold."""


class Guard:
    """Counts what the peer of one session sends.

    Every method raises :class:`PeerProtocolError`, with the code for GOAWAY, when a limit is crossed.
    """

    __slots__ = (
        "_block_bytes",
        "_block_frames",
        "_empty",
        "_headers",
        "_idle",
        "_late",
        "_looked_at",
        "_looked_sent",
        "_resets",
        "_settings",
        "_stray_bytes",
        "_stray_ends",
        "_stray_resets",
        "_stream_blocks",
        "updates_left",
    )

    def __init__(self, now: float) -> None:
        self._resets = bucket_of(RESETS)
        self._settings = bucket_of(SETTINGS)
        self._empty = bucket_of(EMPTY_DATA)
        self._headers = bucket_of(HEADERS)
        self._idle = bucket_of(IDLE)
        self._block_bytes = 0
        self._block_frames = 0
        #: Header blocks that the streams opened until now may still have.
        self._stream_blocks = 0
        #: Bytes of DATA that may still come on streams that we have reset.
        self._stray_bytes = 0
        #: RST_STREAM and END_STREAM that may still come on streams that are over: one of each for each.
        self._stray_resets = 0
        self._stray_ends = 0
        #: Streams that the peer may yet open because it has not heard our GOAWAY.
        self._late = 0
        #: WINDOW_UPDATEs until :meth:`updates` has to be asked; whoever gets one counts down.
        self.updates_left = UPDATES[0]
        self._looked_at = now
        self._looked_sent = 0

    # -- streams ------------------------------------------------------------

    def opened(self) -> None:
        """A stream was opened, by either side."""
        self._stream_blocks = min(self._stream_blocks + BLOCKS_PER_STREAM, MOST_SAVED)
        self._stray_resets = min(self._stray_resets + 1, MOST_SAVED)
        self._stray_ends = min(self._stray_ends + 1, MOST_SAVED)

    def reset(self, now: float) -> None:
        """The peer opened a stream for nothing, or made us send a RST_STREAM, which is the same."""
        if not self._resets.take(now):
            raise _flood("streams that were reset")

    def leaving(self, count: int) -> None:
        """We send GOAWAY to a peer that may have ``count`` streams: so many may be opened before it hears."""
        self._late = count

    def refused(self, now: float) -> None:
        """We refuse a stream: one that crossed our GOAWAY, or one too many."""
        if self._late:
            self._late -= 1
        else:
            self.reset(now)

    def stray_reset(self, now: float) -> None:
        """RST_STREAM on a stream that is over; it may have crossed ours, once a stream."""
        self._stray_resets -= 1
        if self._stray_resets < 0:
            self._stray_resets = 0
            self.reset(now)

    def abandoned(self, credit: int) -> None:
        """We have reset a stream whose peer had ``credit`` bytes left: so many may be under way."""
        self._stray_bytes = min(self._stray_bytes + max(credit, 0), STRAY_BYTES)

    def stray_data(self, now: float, length: int, *, ends: bool) -> None:
        """DATA on a stream that we have reset; ``ends``: with END_STREAM."""
        if ends and self._stray_ends:
            self._stray_ends -= 1
        elif not length:
            self.empty_data(now)
        self._stray_bytes -= length
        if self._stray_bytes < 0:
            raise PeerProtocolError("the peer sent DATA on and on for closed streams", FLOW_CONTROL_ERROR)

    # -- frames -------------------------------------------------------------

    def settings(self, now: float, count: int) -> None:
        """SETTINGS with ``count`` of them; an empty one counts too."""
        if not self._settings.take(now, max(count, 1)):
            raise _flood("SETTINGS")

    def empty_data(self, now: float) -> None:
        """DATA without a byte of payload that does not end its stream."""
        if not self._empty.take(now):
            raise _flood("empty DATA frames")

    def idle(self, now: float) -> None:
        """A frame that changes nothing."""
        if not self._idle.take(now):
            raise _flood("frames that say nothing")

    def headers(self, now: float, length: int) -> None:
        """A frame that begins a header block, with ``length`` bytes of it."""
        self._block_frames = 0
        self._block_bytes = length
        if self._stream_blocks:
            self._stream_blocks -= 1
        elif not self._headers.take(now):
            raise _flood("header blocks")

    def continuation(self, length: int) -> None:
        """A frame that goes on with a header block."""
        self._block_frames += 1
        self._block_bytes += length
        if self._block_frames > BLOCK_FRAMES or self._block_bytes > BLOCK_BYTES:
            raise PeerProtocolError("the peer sent a header block without an end", ENHANCE_YOUR_CALM)

    def updates(self, now: float, sent: int) -> None:
        """Looks how many further WINDOW_UPDATEs there may be, when :attr:`updates_left` is used up.

        ``sent`` is how many bytes of DATA we have sent until now.
        """
        burst, rate = UPDATES
        earned = (now - self._looked_at) * rate + (sent - self._looked_sent) / UPDATE_BYTES
        if earned < 1:
            raise _flood("WINDOW_UPDATEs")
        self.updates_left = min(int(earned), burst) - 1
        self._looked_at = now
        self._looked_sent = sent


def is_rapid(now: float, accepted_at: float, moved: int) -> bool:
    """Whether a stream that ends by a reset was opened for nothing.

    ``accepted_at`` is when its acceptor said ``200``, infinity if it has not, and ``moved`` the bytes
    that the acceptor has sent on it. The opener learns of both later than they happened, so
    that a reset which is none for him is none for the acceptor, however slow the path.
    """
    return not moved and now - accepted_at < MOMENT


def _flood(what: str) -> PeerProtocolError:
    return PeerProtocolError(f"the peer sent too many {what}", ENHANCE_YOUR_CALM)


def bucket_of(limit: tuple[int, int]) -> Bucket:
    """What allows so many at once, and so many a second after them."""
    burst, rate = limit
    return Bucket(rate, burst)
