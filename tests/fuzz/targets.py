"""All parsers that are fuzzed, by name."""

from __future__ import annotations

from . import (
    body,
    clienthello,
    forwarded,
    frames,
    handshake,
    observe,
    peers,
    proxyproto,
    request,
    response,
    session,
)
from .engine import Target

MODULES = (
    *(proxyproto, request, response, forwarded, body, frames, session, handshake, observe, peers),
    clienthello,
)
TARGETS = {target.name: target for target in map(Target.of, MODULES)}
