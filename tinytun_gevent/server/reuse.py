"""Decides who may use a stream next: anybody, only the same visitor, or nobody.

To the local service a stream is one connection. Services read connections carelessly: some leave a request's
body unread and take it for the next request, some send a body where none may be. What such a service mixes up
must not reach another visitor.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tinytun_gevent.wire.request import RequestHead
    from tinytun_gevent.wire.response import ResponseHead

_BODILESS: Final = frozenset({204, 304})
"""Statuses whose answers have no body, whatever their fields say (RFC 9112 §6.3)."""


class NextUser(Enum):
    """Whose request a stream may carry next."""

    ANYBODY = auto()
    SAME_VISITOR = auto()
    SAME_LOGIN = auto()
    """The same visitor, to whom the service gives rights by the connection (NTLM, Negotiate)."""
    NOBODY = auto()


def next_user(request: RequestHead, response: ResponseHead) -> NextUser:
    """Returns who may use the stream on which this exchange was completed, nothing having come behind it.

    There are four cases:

    1. Nobody: the service closes the connection, or may do so (RFC 9112 §9.3).
    2. The same login: authentication of the connection was asked for or sent. All that follows on the
       connection has that user's rights.
    3. The same visitor: the request had a body, of which the service may have left something unread (a
       chunked one counts even if empty); or it offered a protocol in ``Upgrade``, whose handler may refuse
       and leave the connection to no one who reads requests; or the answer must have no body (HEAD, 204,
       304), and the service may send one all the same.
    4. Anybody: the request was a head and the answer is framed by its length, 0 too, or by chunks.

    The result is about this exchange only: a stream that belongs to one visitor stays that visitor's.
    """
    if not response.keep_alive:
        return NextUser.NOBODY
    if request.connection_auth or response.connection_auth:
        return NextUser.SAME_LOGIN
    bodiless = response.status in _BODILESS or request.method == b"HEAD"
    if request.length or request.upgrade or bodiless:
        return NextUser.SAME_VISITOR
    return NextUser.ANYBODY
