"""What was wrong with an answer of the local service, in words for its owner."""

from __future__ import annotations

from typing import Final

from ..errors import SessionError, StreamResetError
from ..wire.answer_codes import AnswerCode
from .address import bracketed, is_loopback
from .target import Target

TEXTS: Final[dict[AnswerCode, str]] = {
    AnswerCode.NOT_HTTP: "does not speak HTTP; try `tinytun tcp {tcp}`",
    AnswerCode.TLS: "speaks TLS; try `tinytun http https://{address}`",
    AnswerCode.BAD_HEAD: "sent a malformed response head",
    AnswerCode.BAD_BODY: "sent a body whose chunks are malformed",
    AnswerCode.INCOMPLETE: "closed the connection before its answer was complete",
    AnswerCode.TOO_SLOW: "did not answer in the server's time",
}

RESET: Final = "reset the connection before it answered"
"""What the client sees by itself: it has reset the stream, because its socket to the service was."""


def fault_of(error: SessionError | None, target: Target, *, awaiting: bool) -> tuple[int, str] | None:
    """Returns the status that a visitor was told because of the service, and the reason in one line.

    ``error`` is how the visitor's stream ended, ``awaiting`` whether an answer was still to come on it. None
    if that says nothing of the service.
    """
    if not isinstance(error, StreamResetError):
        return None
    if not error.remote:
        return (502, f"{target} {RESET}") if awaiting else None
    if error.code not in set(AnswerCode):
        return None
    code = AnswerCode(error.code)
    address = f"{bracketed(target.host)}:{target.port}"
    tcp = f"unix:{target.path}" if target.path else str(target.port) if is_loopback(target.host) else address
    text = TEXTS[code].format(tcp=tcp, address=address)
    return 504 if code is AnswerCode.TOO_SLOW else 502, f"{target} {text}"
