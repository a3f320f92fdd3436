"""HTTP/1 heads at the server's edge: bytes in, values out, bytes out again.

One exchange passes through here like this::

    end = head_end(buffer)                       # -1: read more; too_large() once over the limit
    request = parse_request_head(buffer[:end])   # then route by request.host
    build_request_head(request, forwarding)      # for the local service
    end = response_head_end(answer)              # -1: read more; response_too_large()
    response = parse_response_head(answer[:end], request.method, bool(request.upgrade))
    build_response_head(response, close=..., minor_visitor=request.minor)

llhttp (``httptools``) reads every head with a parser of its own, which gets exactly the bytes
of that head. What it lets pass and must not be forwarded is refused here. An ambiguous message
is never repaired, because the service behind us might read it otherwise than we do (request
smuggling, RFC 9112 section 11.2). Bodies are framed by ``wire.body``.

A head is rebuilt, not copied. ``Connection`` and what it names, ``Keep-Alive``,
``Proxy-Connection``, ``TE`` and ``Upgrade`` belong to one connection (RFC 9110 section 7.6.1)
and are written anew for the next one, as are ``Host`` and the forwarding fields.

Everything malformed raises ``MessageError``, whose ``status`` answers the *visitor*.
"""

from __future__ import annotations

from tinytun_gevent.wire.fields import (
    CHUNKED,
    REQUEST,
    RESPONSE,
    HeadLimits,
    head_end,
    normalize_host,
    response_head_end,
    response_too_large,
    too_large,
)
from tinytun_gevent.wire.forwarded import Forwarding, client_from_forwarding
from tinytun_gevent.wire.request import IDEMPOTENT, RequestHead, build_request_head, parse_request_head
from tinytun_gevent.wire.response import (
    INTERIM_MAX,
    UNTIL_CLOSE,
    ResponseHead,
    build_response_head,
    parse_response_head,
)

__all__ = [
    "CHUNKED",
    "IDEMPOTENT",
    "INTERIM_MAX",
    "REQUEST",
    "RESPONSE",
    "UNTIL_CLOSE",
    "Forwarding",
    "HeadLimits",
    "RequestHead",
    "ResponseHead",
    "build_request_head",
    "build_response_head",
    "client_from_forwarding",
    "head_end",
    "normalize_host",
    "parse_request_head",
    "parse_response_head",
    "response_head_end",
    "response_too_large",
    "too_large",
]
