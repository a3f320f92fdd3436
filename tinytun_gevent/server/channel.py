"""Messages with descriptors, between two processes of one server.

A message is a JSON object behind its length; open sockets travel with its first byte (``SCM_RIGHTS``).
Both ends run the same program as the same user, so what comes is trusted, but bounded.
"""

from __future__ import annotations

import array
import json
import os
import socket as native
import struct
from collections.abc import Sequence
from typing import Any, Final

from gevent import socket
from gevent.lock import RLock

HEAD: Final = struct.Struct(">II")
"""Bytes of JSON, and how many descriptors came along."""

MOST_DESCRIPTORS: Final = 250
"""Linux takes 253 in one message."""

MAX_MESSAGE: Final = 64 * 1024 * 1024
"""Bytes; 10,000 tunnels are 2 MiB."""

Message = dict[str, Any]


class Channel:
    """One connected Unix socket, which belongs to it. Any greenlet may send; one receives.

    Everything blocks, for ``timeout`` seconds a call at most, and raises ``OSError``.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        sock.settimeout(timeout)
        self._sock = sock
        self._sending = RLock()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends one message; the descriptors stay open here, their copies are the other side's."""
        assert len(descriptors) <= MOST_DESCRIPTORS
        payload = json.dumps(message).encode()
        rights = [(native.SOL_SOCKET, native.SCM_RIGHTS, array.array("i", descriptors))]
        with self._sending:
            head = HEAD.pack(len(payload), len(descriptors))
            sent = self._sock.sendmsg([head], rights if descriptors else [])
            self._sock.sendall(head[sent:] + payload)

    def receive(self) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which the caller closes; None at the end.

        Raises ``OSError`` for what is no message, with nothing left open.
        """
        descriptors: list[int] = []
        try:
            head = self._receive_head(descriptors)
            if not head:
                return None
            length, count = HEAD.unpack(head)
            if length > MAX_MESSAGE or count != len(descriptors):
                raise OSError("not a message")
            message = json.loads(self._exactly(length))
            if not isinstance(message, dict):
                raise OSError("not a message")
            return message, descriptors
        except (OSError, ValueError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise error if isinstance(error, OSError) else OSError("not a message") from error

    def keep_waiting(self) -> None:
        """Lets :meth:`receive` wait as long as it takes from now on."""
        self._sock.settimeout(None)

    def close(self) -> None:
        """Closes the socket; the other side reads the end. Idempotent."""
        self._sock.close()

    def _receive_head(self, descriptors: list[int]) -> bytes:
        """The next head, ``b""`` at the end; what came along is added to ``descriptors``."""
        head = b""
        space = native.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        while len(head) < HEAD.size:
            data, ancillary, _, _ = self._sock.recvmsg(HEAD.size - len(head), space)
            for level, kind, content in ancillary:
                if (level, kind) == (native.SOL_SOCKET, native.SCM_RIGHTS):
                    rights = array.array("i")
                    rights.frombytes(content[: len(content) - len(content) % rights.itemsize])
                    descriptors.extend(rights)
            if not data:
                if head:
                    raise OSError("the other process ended within a message")
                break
            head += data
        return head

    def _exactly(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            data = self._sock.recv(min(count - len(parts), 1 << 20))
            if not data:
                raise OSError("the other process ended within a message")
            parts += data
        return bytes(parts)
