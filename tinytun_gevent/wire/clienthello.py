"""How a TLS connection begins (RFC 8446 §4.1.2): whether it is one, and which protocols it offers.

OpenSSL reads it all again; this is for what Python does not let it do: to refuse by
``no_application_protocol`` (RFC 7301 §3.2), and to spend nothing on a client who has not said hello yet.
"""

from __future__ import annotations

from typing import Final

HELLO: Final = b"\x16"
"""The first byte of every TLS connection; no text begins with it."""

SPOKEN: Final = ("http/1.1",)
"""What is spoken behind TLS, by the names of ALPN (RFC 7301), in our order; see `server/https.py`."""

_RECORD_HEAD: Final = 5
_MOST: Final = 16 * 1024
"""Bytes that a record may have (RFC 8446 §5.1)."""

_ALPN: Final = 16

NO_APPLICATION_PROTOCOL: Final = bytes((0x15, 3, 3, 0, 2, 2, 120))
"""The fatal alert of that name, as a record."""


def missing(buffer: bytes | bytearray) -> int:
    """How many bytes at least the first record still lacks; 0 if it is whole, or will never be one."""
    if len(buffer) < _RECORD_HEAD:
        return _RECORD_HEAD - len(buffer)
    length = int.from_bytes(buffer[3:5], "big")
    if length > _MOST or buffer[1] != 3:
        return 0  # OpenSSL says what is wrong
    return max(0, _RECORD_HEAD + length - len(buffer))


def protocols(buffer: bytes | bytearray) -> list[bytes] | None:
    """The protocols that the ClientHello in the first record offers by ALPN.

    None if it offers none, and if that cannot be told: what is malformed, or in more than one record, is
    left to OpenSSL.
    """
    length = int.from_bytes(buffer[3:5], "big")
    reader = _Reader(bytes(buffer[_RECORD_HEAD : _RECORD_HEAD + length]))
    try:
        if reader.left != length or reader.number(1) != 1 or reader.number(3) != len(reader.data) - 4:
            return None
        reader.skip(2 + 32)  # version and random
        for size in (1, 2, 1):  # session id, cipher suites, compression methods
            reader.skip(reader.number(size))
        extensions = _Reader(reader.vector(2))
        while extensions.left:
            kind, content = extensions.number(2), extensions.vector(2)
            if kind == _ALPN:
                return _names(content)
    except EOFError:
        pass
    return None


def _names(content: bytes) -> list[bytes]:
    names = _Reader(_Reader(content).vector(2))
    found = []
    while names.left:
        found.append(names.vector(1))
    return found


class _Reader:
    """Reads TLS's numbers and vectors; raises EOFError beyond the end."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self._at

    def skip(self, count: int) -> None:
        if count > self.left:
            raise EOFError
        self._at += count

    def number(self, size: int) -> int:
        """A number of ``size`` bytes."""
        self.skip(size)
        return int.from_bytes(self.data[self._at - size : self._at], "big")

    def vector(self, size: int) -> bytes:
        """What follows a length of ``size`` bytes."""
        count = self.number(size)
        self.skip(count)
        return self.data[self._at - count : self._at]
