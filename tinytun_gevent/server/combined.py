"""One line of an access log in the combined format, with what else is good to know at its end.

::

    192.0.2.7 - alice [26/Nov/2026:12:00:00 +0000] "GET /path HTTP/1.1" 200 1024 "-" "agent/1.0"
        app.tunnel.example.com 5f0c1d2e3a4b 0.012

The first nine fields are those of Apache and nginx; what reads their logs passes over the last three: the
host that was asked, the request's id, seconds. Queries are never in it, for they hold tokens.
"""

from __future__ import annotations

import re
import time
from typing import Final

from ..wire.http1 import RequestHead
from .observed import Observed

LONGEST: Final = 2048
"""Bytes of one value of the visitor's; more are no use to a reader and would fill the disk at his will."""

LEFT: Final = 499
"""nginx's status for a visitor that left before it had the whole answer."""

_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_UNSAFE: Final = re.compile(rb"[^\x20\x21\x23-\x5b\x5d-\x7e]")  # '"', "\\" and all that is not printable
_SHORT: Final = {0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t", 0x0B: "\\v"}
_USER: Final = re.compile(rb"\A([A-Za-z][A-Za-z0-9+.-]*:)?//[^/?#]*@")


def quoted(value: bytes) -> str:
    """``value`` as it stands between double quotes; escaped as Apache does it (mod_log_config)."""
    value = value[:LONGEST]
    if _UNSAFE.search(value) is None:
        return value.decode("ascii")
    return "".join(
        _SHORT.get(byte) or (chr(byte) if 0x20 <= byte <= 0x7E else f"\\x{byte:02x}") for byte in value
    )


def word(value: bytes) -> str:
    """``value`` as it stands by itself: a space would end it, and nothing is ``-``."""
    return quoted(value).replace(" ", "\\x20") or "-"


def without_query(url: bytes) -> bytes:
    """A path or URL up to its query or fragment, without a user's name and password."""
    for mark in (b"?", b"#"):
        url = url.partition(mark)[0]
    user = _USER.match(url)
    return url if user is None else (user[1] or b"") + b"//" + url[user.end() :]


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as the format has them, in local time: ``26/Nov/2026:12:00:00 +0000``."""
    at = time.localtime(seconds)
    hours, minutes = divmod(abs(at.tm_gmtoff) // 60, 60)
    sign = "-" if at.tm_gmtoff < 0 else "+"
    clock = f"{at.tm_hour:02}:{at.tm_min:02}:{at.tm_sec:02}"
    return f"{at.tm_mday:02}/{_MONTHS[at.tm_mon - 1]}/{at.tm_year}:{clock} {sign}{hours:02}{minutes:02}"


def line(exchange: Observed, when: str, now: float) -> str:
    """The line about an exchange that is over at monotonic time ``now``; ``when`` is its timestamp."""
    tunnel, request = exchange.tunnel, exchange.request
    label = tunnel.account.label if tunnel is not None and tunnel.account is not None else ""
    referer = agent = first = host = "-"
    if request is not None:
        first = f"{quoted(request.method)} {quoted(request.target.partition(b'?')[0])} HTTP/1.{request.minor}"
        referer, agent = _noted(request)
        host = word(request.host.encode("latin-1", "replace"))
    who = f"{exchange.client} - {word(label.encode()) if label else '-'} [{when}]"
    what = f'"{first}" {exchange.status or LEFT} {exchange.response_bytes} "{referer}" "{agent}"'
    return f"{who} {what} {host} {exchange.request_id} {now - exchange.started_at:.3f}\n"


def _noted(request: RequestHead) -> tuple[str, str]:
    """Who sent the visitor here, and what he uses."""
    referer = agent = b""
    for name, value in request.fields:
        if len(name) == 7 and name.lower() == b"referer":
            referer = value
        elif len(name) == 10 and name.lower() == b"user-agent":
            agent = value
    return (quoted(without_query(referer)) if referer else "-"), quoted(agent) or "-"
