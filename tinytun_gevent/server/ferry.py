"""Carries a connection's bytes to another process, for one whose socket cannot go there by itself."""

from __future__ import annotations

import gevent

from tinytun_gevent.sockets import End

SIZE = 64 * 1024
"""Bytes carried at once."""


def ferry(one: End, other: End) -> None:
    """Moves bytes both ways until both directions have ended; blocks, closes both. Raises nothing."""
    back = gevent.spawn(_carry, other, one)
    try:
        _carry(one, other)
        back.join()
    finally:
        back.kill(block=False)
        one.close()
        other.close()


def _carry(source: End, target: End) -> None:
    """One direction; what breaks it breaks both."""
    try:
        while data := source.recv(SIZE):
            target.sendall(data)
        target.finish_writing()
    except OSError:
        source.abort()
        target.abort()
