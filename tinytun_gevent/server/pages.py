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
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{status} {title}</title>
<style>
body {{ font: 1.05rem/1.6 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto; padding: 0 1.5rem;
  color: #222; background: #fafafa; overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; line-height: 1.3 }}
code {{ background: #eee; padding: .1em .35em; border-radius: .25em }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ddd; background: #161616 }}
  code {{ background: #2a2a2a }} }}
</style>
<h1>{title}</h1>
{paragraphs}<p><small>tinytun · {status} {phrase} · request {request_id}</small></p>
</html>
"""

_TITLES: Final = {
    308: "This site is reached by https",
    404: "There is no such tunnel",
    408: "The request came too slowly",
    414: "The address is too long",
    421: "This host cannot be a tunnel",
    429: "Too many requests",
    431: "The request is too large",
    500: "This server made a mistake",
    502: "The tunnel is up, but the service behind it failed",
    503: "This tunnel takes no visitor at the moment",
    504: "The service behind this tunnel does not answer in time",
}
_NOT_UNDERSTOOD: Final = "The request was not understood"
"""The title of what has none of its own: 400, 417, 501, 505."""

_ADVICE: Final = {
    404: "Check the address. If this is your tunnel: start its client (tinytun), then reload this page.",
    408: "Try again.",
    421: "The name of a tunnel is one label before the server's domain. Check the address.",
    429: "Wait a moment, then try again.",
    431: "Clearing the cookies of this site often helps.",
    500: "Try again. Whoever runs this server finds the request in its log.",
    502: "If this is your tunnel: look at what the service and the client say, then try again.",
    503: "Try again in a few seconds. If this is your tunnel: see whether its client still runs.",
    504: "Try again later. If this is your tunnel: see whether the service is overloaded or stuck.",
}
"""What to do, where the answer says nothing more exact."""


def accept_of(head: bytes | bytearray) -> bytes:
    """The Accept field of a request head that could not be read as one; blank if none is found."""
    match = _ACCEPT.search(head)
    return bytes(match[1]) if match is not None else b""


def new_request_id() -> str:
    """What a visitor can name when he asks, and the operator finds in the logs: 12 hexadecimal digits."""
    return secrets.token_hex(6)


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer of the server itself instead of the local service's. ``retry_after`` is in seconds."""

    status: int
    reason: str
    retry_after: int | None = None
    #: The limit that was reached, by its name; blank if it is none of `account.Limits`.
    limit: str = ""
    #: Where a redirect leads: an absolute URL in ASCII.
    location: str = ""
    #: The title and what to do, where those of the status do not fit.
    title: str = ""
    advice: str = ""
    request_id: str = field(default_factory=new_request_id)

    def answer(self, accept: bytes, *, close: bool, head_only: bool = False) -> bytes:
        """The whole HTTP/1.1 answer: HTML where ``accept`` asks for it, else JSON.

        ``head_only`` leaves the body out, as the answer to HEAD.
        """
        fields = {"request_id": self.request_id, "status": self.status}
        log.debug("request %s answered %d: %r", self.request_id, self.status, self.reason, extra=fields)
        phrase = HTTPStatus(self.status).phrase
        advice = self.advice or _ADVICE.get(self.status, "")
        if _HTML.search(accept):
            kind = "text/html; charset=utf-8"
            body = self._page(phrase, advice)
        else:
            kind = "application/json"
            about = {"status": self.status, "title": self._title, "reason": self.reason}
            if self.status >= 400:
                about["error"] = phrase
            if self.limit:
                about["limit"] = self.limit
            if advice:
                about["advice"] = advice
            if self.location:
                about["location"] = self.location
            body = json.dumps({**about, "request_id": self.request_id})
        payload = body.encode()
        lines = [
            f"HTTP/1.1 {self.status} {phrase}",
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

    @property
    def _title(self) -> str:
        return self.title or _TITLES.get(self.status, _NOT_UNDERSTOOD)

    def _page(self, phrase: str, advice: str) -> str:
        """What a browser shows: a title in words, the cause, what to do."""
        paragraphs = [html.escape(text) for text in (self.reason, advice) if text]
        if self.location:
            url = html.escape(self.location)
            paragraphs.append(f'<a href="{url}">{url}</a>')
        return _PAGE.format(
            status=self.status,
            phrase=phrase,
            title=html.escape(self._title),
            paragraphs="".join(f"<p>{text}</p>\n" for text in paragraphs),
            request_id=self.request_id,
        )
