"""As much of WebSocket (RFC 6455) as the soak talks: whole binary messages, and the close."""

from __future__ import annotations

import struct

from .counting import Line

BINARY, CLOSE = 2, 8
_MASK = b"\x5a\xa5\x0f\xf0"  # any will do here


def write_frame(message: bytes, *, masked: bool = False, opcode: int = BINARY) -> bytes:
    """A message in one frame; a client's is masked."""
    size = len(message)
    flag = 0x80 if masked else 0
    head = bytes((0x80 | opcode, flag | (size if size < 126 else 126)))
    if size >= 126:
        head += struct.pack("!H", size)
    return head + _MASK + _masked(message) if masked else head + message


def read_frame(line: Line) -> bytes | None:
    """The next message; None when the other side closes."""
    first, second = line.exactly(2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", line.exactly(2))
    mask = line.exactly(4) if second & 0x80 else b""
    message = line.exactly(size)
    return None if first & 0x0F == CLOSE else _masked(message) if mask else message


def _masked(message: bytes) -> bytes:
    key = (_MASK * (len(message) // 4 + 1))[: len(message)]
    return (int.from_bytes(message, "big") ^ int.from_bytes(key, "big")).to_bytes(len(message), "big")
