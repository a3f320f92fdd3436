"""Why a server said no: its body's first line, a JSON body's message, or the reason phrase."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

import gevent
from gevent import socket

from ..sockets import End
from ..wire.handshake import MAX_REASON, Refusal
from .text import clean, hide

REASON_TIMEOUT: Final = 1.0
"""Seconds for the line of reason in a refusal's body; without it the reason phrase does."""

MEMBERS: Final = ("message", "detail", "error_description", "title", "reason", "error", "errors")
"""What a JSON body calls its text for people, the best first."""

MAX_DEPTH: Final = 4
"""Objects and lists in each other in which a message is looked for."""

_ID: Final = re.compile(
    r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"  # a UUID
    r"|(?<![\w.-])(?=[\w.-]*\d)(?=[\w-]*[A-Za-z])[\w-]{12,}(?![\w.-])"  # letters and digits, long
    r"|\b\d{6,}\b"
)


@dataclass(frozen=True, slots=True)
class Reason:
    """What a server said; ``is_page`` where it was an HTML page, as web servers answer."""

    text: str
    is_page: bool = False


def read_reason(sock: socket.socket | End, refusal: Refusal, rest: bytes, token: str | None) -> Reason:
    """The reason for ``refusal``, whose body begins with ``rest``; blocks for `REASON_TIMEOUT`.

    A server that repeats the ``token`` does not bring it into our log.
    """
    length = refusal.content_length
    wanted = MAX_REASON if length is None else min(length, MAX_REASON)
    body = bytearray(rest)
    gevent.with_timeout(REASON_TIMEOUT, _read_up_to, sock, body, wanted, timeout_value=None)
    return reason_in(bytes(body[:wanted]), refusal.reason, token)


def reason_in(body: bytes, phrase: str, token: str | None = None) -> Reason:
    """The reason in a refusal's ``body``, or else its reason ``phrase``."""
    body = body.removeprefix(b"\xef\xbb\xbf").strip()
    is_page = body.startswith(b"<")
    line = b"" if is_page else body.partition(b"\n")[0].strip()
    if body[:1] in (b"{", b"["):
        line = _message(body).encode("utf-8", "replace")
    return Reason(clean(hide(line or phrase.encode(), token)) or "no reason given", is_page)


def without_ids(text: str) -> str:
    """``text`` with what looks like a request's id left out: what is the same but for that says the same."""
    return _ID.sub("…", text)


def _message(body: bytes) -> str:
    """The text for people in a JSON body; empty where there is none, or the body is cut off."""
    try:
        return _find(json.loads(body), MAX_DEPTH)
    except (ValueError, RecursionError):
        return ""


def _find(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return value.strip().partition("\n")[0].strip()
    if depth and isinstance(value, list):
        return next((text for item in value[:1] if (text := _find(item, depth - 1))), "")
    if not depth or not isinstance(value, dict):
        return ""
    return next((text for name in MEMBERS if name in value and (text := _find(value[name], depth - 1))), "")


def _read_up_to(sock: socket.socket | End, body: bytearray, wanted: int) -> None:
    """Add to ``body`` until it has ``wanted`` bytes or the peer closes; blocks."""
    try:
        while len(body) < wanted:
            chunk = sock.recv(wanted - len(body))
            if not chunk:
                return
            body += chunk
    except OSError:
        pass
