"""Carries a connection's bytes to another process, for one whose socket cannot go there by itself."""

from __future__ import annotations

from typing import Final

import gevent

from tinytun_gevent.sockets import End

SIZE: Final = 64 * 1024
"""Bytes carried at once."""

LOOK: Final = 0.5
"""Seconds between two looks whether the process has closed its side, of which only sending tells."""


def ferry(visitor: End, process: End) -> None:
    """Moves bytes both ways until both directions have ended, or the process has closed. Closes both.

    Blocks; raises nothing.
    """
    there = gevent.spawn(_carry, visitor, process)
    try:
        _carry(process, visitor)
        while not there.ready():
            there.join(LOOK)
            process.send_now(b"")
    except OSError:
        pass
    finally:
        there.kill(block=False)
        visitor.close()
        process.close()


def _carry(source: End, target: End) -> None:
    """One direction; what breaks it breaks both."""
    try:
        while data := source.recv(SIZE):
            target.sendall(data)
        target.finish_writing()
    except OSError:
        source.abort()
        target.abort()
