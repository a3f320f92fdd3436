"""One session with the server: from nothing to taking visitors, and the goodbye."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from gevent.event import Event

from ..errors import PeerSilentError, SessionClosedError
from ..session import Session
from ..stream import Stream
from ..wire.handshake import Kind, OpenReply, OpenRequest
from .config import ClientConfig
from .confirming import check_confirmed
from .dial import Address, dial_server
from .opening import open_tunnel, public_url

#: Seconds for the answer to the first PING; after them the tunnel counts as open without it.
SETTLE = 2.0

#: Seconds for the server to close the session that we have ended.
FAREWELL = 1.0


def open_session(
    config: ClientConfig,
    request: OpenRequest,
    on_stream: Callable[[Stream], None],
    address: Address | None = None,
) -> tuple[Session, OpenReply, str]:
    """Dial, ask, begin: the session, what the server granted, and the tunnel's public URL.

    ``on_stream`` gets each visitor, from the session's reader; ``address`` is that of one server
    where the name may mean several. Blocks; put a timeout around it. Raises
    what `dial_server` and `open_tunnel` raise, and SessionError; nothing stays open then.
    """
    sock = dial_server(config, address=address)
    try:
        reply, early = open_tunnel(sock, request, wish_of(request))
        check_confirmed(request, reply)
        url = public_url(config, reply)
        limit = config.concurrency
        session = Session(sock, opener=False, max_streams=limit, received=early, on_stream=on_stream)
    except BaseException:
        sock.close()
        raise
    try:
        session.start()
        # The answer to our PING says that the server has read our SETTINGS and takes visitors.
        gevent.wait([session.keep_alive.first_answer, session.closed], SETTLE, count=1)
        if session.closed.is_set():
            raise session.error or SessionClosedError("the server closed the tunnel")
    except BaseException:
        session.close()
        raise
    return session, reply, url


def wish_of(request: OpenRequest) -> str:
    """What is asked for, as errors name it: ``subdomain 'x'``, ``port 30000``."""
    if request.join is not None:
        return "another connection"
    if request.kind is Kind.HTTP:
        return f"subdomain {request.subdomain!r}" if request.subdomain else "a subdomain"
    return f"port {request.port}" if request.port else "a port"


def part(session: Session) -> bool:
    """Close, after the server if it is quick: ours may overtake a visitor's last bytes. Blocks.

    Whether the server has shown that it is there, and so hears the goodbye.
    """
    heard = False
    try:
        session.goaway()
        session.finish_writing()
        # Our half is closed, so that what asks for an answer ends the session with an error; but it came.
        heard = session.closed.wait(FAREWELL) and not isinstance(session.error, PeerSilentError)
    except OSError:
        pass
    session.close()
    return heard


def see_off(session: Session) -> None:
    """Close once the visitors that it carries have ended; blocks as long as they do."""
    ended = Event()
    session.on_room = lambda _: ended.set()
    session.on_close.append(lambda _: ended.set())
    while session.stream_count and not session.closed.is_set():
        ended.wait()
        ended.clear()
    part(session)
