"""Decides what the FIN of a visitor of the HTTP edge means: it has left, or it still reads. No I/O.

TCP does not tell a program that has closed its connection from one that has only ended its requests. nginx
and Go take the FIN behind a whole request for the end of the visitor. So does this server, but for two kinds
of request that programs with a half-close are known to send: those with ``Connection: close`` and those of
HTTP/1.0. There, and where an Upgrade or further requests came before the FIN, the visitor keeps its place for
a while.
"""

from __future__ import annotations

from typing import Final

from tinytun_gevent.wire.request import RequestHead

HALF_CLOSED_GRACE: Final = 10.0
"""Seconds of silence for which a half-closed visitor keeps its place: few services think for longer. One
that has closed answers the first byte that is sent to it with a reset."""


def is_gone(request: RequestHead, proxied: bool) -> bool:
    """Whether a FIN right behind ``request`` means that the visitor has left.

    ``proxied``: it came from a trusted proxy, and those never half-close. (nginx's plain ``proxy_pass`` sends
    HTTP/1.0 with ``Connection: close``, and closes when its own visitor leaves.)
    """
    return proxied or (request.keep_alive and request.minor > 0 and not request.upgrade)


class HalfClosed:
    """How long a half-closed visitor keeps its place: silence uses it up, progress begins anew.

    Call :meth:`look` about once a second.
    """

    __slots__ = ("_grace", "_moved", "_silent_since")

    def __init__(self, now: float, moved: object, grace: float | None = None) -> None:
        """``moved`` is anything that is another value after each byte of the exchange, either way."""
        self._grace = HALF_CLOSED_GRACE if grace is None else grace
        self._moved = moved
        self._silent_since = now

    def look(self, now: float, moved: object, taking: bool) -> bool:
        """Whether the grace is over; ``taking``: bytes wait for the visitor, whose turn it is."""
        if taking or moved != self._moved:
            self._moved, self._silent_since = moved, now
        return now - self._silent_since > self._grace
