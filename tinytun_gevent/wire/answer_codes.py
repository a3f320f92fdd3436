"""Error codes of RST_STREAM by which a server tells a client what was wrong with an answer of its service.

RFC 9113 §7 leaves all other 32-bit numbers free. They go only to clients that have announced in their
CONNECT (``x-tinytun-reset-codes``) that they know them; the words are the client's. Numbers never change
their meaning.
"""

from __future__ import annotations

from enum import IntEnum


class AnswerCode(IntEnum):
    """What was wrong with an answer; the first two bytes are ``tt``."""

    NOT_HTTP = 0x7474_0001
    """What came first is the beginning of no HTTP/1 response."""
    TLS = 0x7474_0002
    """What came first is a record of TLS: the service has to be spoken to by https."""
    BAD_HEAD = 0x7474_0003
    """A response head is malformed, too large, one too many, or an answer to no question."""
    BAD_BODY = 0x7474_0004
    """The framing of a body is malformed."""
    INCOMPLETE = 0x7474_0005
    """The connection ended before the answer was complete."""
    TOO_SLOW = 0x7474_0006
    """No answer came within the server's time."""


def start_code(received: bytes | bytearray) -> AnswerCode | None:
    """Returns what is wrong with the first bytes of an answer; None while nothing is.

    Empty lines before a status line are passed over, as in requests (RFC 9112 §2.2).
    """
    begun = bytes(received[:16]).lstrip(b"\r\n")[:5]
    if b"HTTP/".startswith(begun):
        return None
    return AnswerCode.TLS if begun[:2] in (b"\x15\x03", b"\x16\x03") else AnswerCode.NOT_HTTP
