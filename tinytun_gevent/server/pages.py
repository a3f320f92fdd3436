"""Answers of the server itself: what went wrong, for people and for programs."""

from __future__ import annotations

import html
import json
import logging
import re
import secrets
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

log: Final = logging.getLogger(__name__)

_HTML: Final = re.compile(rb"text/html|application/xhtml\+xml", re.IGNORECASE)

_ACCEPT: Final = re.compile(rb"\nAccept:([^\r\n]*)", re.IGNORECASE)

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{status} {title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:36rem;margin:12vh auto;padding:0 1rem;color:#222}}
h1{{font-size:1.4rem}}small{{color:#777}}
@media(prefers-color-scheme:dark){{body{{background:#181818;color:#ddd}}}}</style></head>
<body><h1>{status} {title}</h1><p>{reason}</p>
<p><small>tinytun · request {request_id}</small></p></body></html>
"""


def accept_of(head: bytes | bytearray) -> bytes:
    """The Accept field of a request head that could not be read as one; blank if none is found."""
    match = _ACCEPT.search(head)
    return bytes(match[1]) if match is not None else b""


def new_request_id() -> str:
    """What a visitor can name when he asks, and the operator finds in the logs: 12 hexadecimal digits."""
    return secrets.token_hex(6)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a visitor gets no answer of the local service. ``retry_after`` is in seconds."""

    status: int
    reason: str
    retry_after: int | None = None
    #: The limit that was reached, by its name; blank if it is none of `account.Limits`.
    limit: str = ""
    #: Where a redirect leads: an absolute URL in ASCII.
    location: str = ""
    request_id: str = field(default_factory=new_request_id)

    def answer(self, accept: bytes, *, close: bool, head_only: bool = False) -> bytes:
        """The whole HTTP/1.1 answer: HTML where ``accept`` asks for it, else JSON.

        ``head_only`` leaves the body out, as the answer to HEAD.
        """
        fields = {"request_id": self.request_id, "status": self.status}
        log.debug("request %s answered %d: %r", self.request_id, self.status, self.reason, extra=fields)
        title = HTTPStatus(self.status).phrase
        if _HTML.search(accept):
            kind = "text/html; charset=utf-8"
            body = _PAGE.format(
                status=self.status, title=title, reason=html.escape(self.reason), request_id=self.request_id
            )
        else:
            kind = "application/json"
            about = {"status": self.status, "error": title, "reason": self.reason}
            if self.limit:
                about["limit"] = self.limit
            body = json.dumps({**about, "request_id": self.request_id})
        payload = body.encode()
        lines = [
            f"HTTP/1.1 {self.status} {title}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(payload)}",
            f"X-Request-Id: {self.request_id}",
            "Cache-Control: no-store",
        ]
        if self.location:
            lines.append(f"Location: {self.location}")
        if self.retry_after is not None:
            lines.append(f"Retry-After: {self.retry_after}")
        if self.limit:
            lines.append(f"X-Tinytun-Limit: {self.limit}")
        if close:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else payload)
