"""Where a body ends: counters that look at its bytes and pass nearly all of them on as they are.

A body is forwarded as it arrives, chunk framing included, so nothing is decoded or copied::

    body = body_of(head.length)
    taken = body.feed(view)      # view[:taken] belongs to this message: forward it,
    body.rewritten               # or these pieces in its place, unless this is None
    if body.done: ...            # what is left is the next message's (or one too many)

When the connection ends, ``eof()`` tells a whole body from a truncated one. After a ``MessageError``
a body object is of no further use, and neither are the connections at its two ends.
"""

from __future__ import annotations

from typing import Protocol

from tinytun_gevent.errors import MessageError
from tinytun_gevent.wire.chunked import LINES_AT_ONCE, Bytes, ChunkedBody
from tinytun_gevent.wire.fields import CHUNKED

__all__ = ["Body", "Bytes", "ChunkedBody", "LengthBody", "UntilCloseBody", "body_of", "feed_some", "taken_of"]


class Body(Protocol):
    """What the three kinds of bodies have in common."""

    done: bool
    """The last byte has been taken."""

    @property
    def rewritten(self) -> list[Bytes] | None:
        """What to forward for the bytes that were taken last; None: these bytes as they are."""

    def feed(self, view: Bytes) -> int:
        """Return how many of the leading bytes belong to this body; 0 once it is done.

        Raises ``MessageError`` if they break a rule; none of ``view`` may be forwarded then.
        """

    def eof(self) -> None:
        """Say that no more bytes come. Raises ``MessageError`` if some are missing."""


class LengthBody:
    """A body of exactly ``length`` bytes (Content-Length, or 0 for none)."""

    __slots__ = ("_status", "done", "left")
    rewritten = None

    def __init__(self, length: int, *, response: bool = False) -> None:
        self.left = length
        """Bytes that are still to come."""
        self.done = length == 0
        self._status = 502 if response else 400

    def feed(self, view: Bytes) -> int:
        """See ``Body``; raises nothing."""
        taken = min(len(view), self.left)
        self.left -= taken
        self.done = not self.left
        return taken

    def eof(self) -> None:
        """See ``Body``."""
        if self.left:
            raise MessageError(f"the body ended {self.left} bytes early", self._status)


class UntilCloseBody:
    """A response's body that lasts until the service closes the connection."""

    __slots__ = ("done",)
    rewritten = None

    def __init__(self) -> None:
        self.done = False

    def feed(self, view: Bytes) -> int:
        """See ``Body``; raises nothing."""
        return 0 if self.done else len(view)

    def eof(self) -> None:
        """Say that this was all; raises nothing."""
        self.done = True


def body_of(
    length: int,
    *,
    response: bool = False,
    withheld: frozenset[bytes] = frozenset(),
    plain: bool = False,
) -> Body:
    """Return the body for a head's ``length``; see ``ChunkedBody`` for the rest."""
    if length >= 0:
        return LengthBody(length, response=response)
    return ChunkedBody(response, withheld, plain=plain) if length == CHUNKED else UntilCloseBody()


def feed_some(body: Body, view: Bytes) -> int:
    """Feed a body as much of ``view`` as is good before others have a turn; how much. The rest comes next."""
    return body.feed(view, LINES_AT_ONCE) if isinstance(body, ChunkedBody) else body.feed(view)


def taken_of(body: Body, view: Bytes, taken: int) -> bytes:
    """Return a copy of what is to be forwarded for ``view[:taken]``, which ``body`` has just been fed."""
    return bytes(view[:taken]) if body.rewritten is None else b"".join(body.rewritten)
