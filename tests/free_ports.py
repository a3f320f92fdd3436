"""Ports that several processes must know before any of them is started."""

from __future__ import annotations

import random
import socket


def free_ports(count: int) -> list[int]:
    """Different ports that are free on all addresses now, below the range that the kernel gives away."""
    held: list[socket.socket] = []
    try:
        while len(held) < count:
            try:
                held.append(socket.create_server(("", random.randrange(10_000, 19_000))))
            except OSError:
                continue
        return [int(sock.getsockname()[1]) for sock in held]
    finally:
        for sock in held:
            sock.close()
