"""Asking a server whether it takes a token, before that is kept."""

from __future__ import annotations

from contextlib import closing
from typing import Final

import gevent

from ..errors import HandshakeError, RefusedError, TryLaterError, UnreachableError
from ..wire.handshake import MAX_HEAD, Refusal, build_check, parse_reply
from .config import ClientConfig
from .dial import HopelessError, dial_server, read_head
from .opening import ANSWER_TIMEOUT, port_hint, wrong_door
from .reasons import Reason, read_reason
from .text import clean, unclutter

NOTHING: Final = "nothing was kept"


def check_with_server(config: ClientConfig) -> str:
    """Asks the server of ``config`` about its token. Returns why that could not be told; empty if it is good.

    Blocks for some seconds. Raises RefusedError if the token is not good or not needed, TryLaterError,
    UnreachableError, and UsageError for a token that would go in the clear.
    """
    refusal, reason = _ask(config)
    server, status = config.server.authority, refusal.status
    if status == 204:
        return ""
    if reason.is_page:
        raise RefusedError(f"{wrong_door(server, status)}; {NOTHING}", status)
    if status == 200:
        raise RefusedError(
            f"{server} takes no tokens, so none is needed; {NOTHING}; "
            f"'tinytun server {config.server}' makes it the server of later commands",
            status,
        )
    text = f"{server} says: {reason.text} ({status}); {NOTHING}"
    if status == 401:
        raise RefusedError(f"{server} does not take this token: {reason.text} (401); {NOTHING}", status)
    if status in (429, 503):
        raise TryLaterError(text, status, refusal.retry_after)
    if status == 403:
        raise RefusedError(text, status)
    text = f"{server} does not say whether the token is valid (it answered {status})"
    return text + port_hint(server)


def _ask(config: ClientConfig) -> tuple[Refusal, Reason]:
    """The answer, and the reason in its body. Raises UnreachableError and UsageError."""
    assert config.token is not None
    server = config.server.authority
    late = UnreachableError(f"{server} did not answer within {ANSWER_TIMEOUT:.0f} s")
    try:
        with closing(dial_server(config)) as end:
            try:
                with gevent.Timeout(ANSWER_TIMEOUT, late):
                    end.sendall(build_check(server, config.token))
                    head, rest = read_head(end, MAX_HEAD)
            except (OSError, EOFError) as error:
                raise UnreachableError(f"{server}: {unclutter(error)}") from None
            reply = parse_reply(head)
            if not isinstance(reply, Refusal):
                raise HandshakeError("it opened a tunnel for a GET")
            if reply.status == 204:
                return reply, Reason("")
            return reply, read_reason(end, reply, rest, config.token)
    except (HandshakeError, ValueError) as error:
        raise HopelessError(f"{server} is no tunnel server: {clean(str(error))}; {NOTHING}") from None
    except UnreachableError as error:
        raise type(error)(f"{error}; {NOTHING}") from None
