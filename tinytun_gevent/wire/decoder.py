"""HPACK's decoder as a session needs it: the right error, and the field that the original leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.hpack import Decoder
from hpack.struct import HeaderTuple


class UndecodableError(ProtocolError):
    """A header block that HPACK cannot unpack; both sides' tables differ from now on (RFC 9113 §4.3)."""

    error_code = ErrorCodes.COMPRESSION_ERROR


class StrictDecoder(Decoder):
    """HPACK's decoder, whose errors h2 would take for ones of the protocol."""

    def decode(self, data: bytes, raw: bool = False) -> Iterable[Any]:
        try:
            return super().decode(data, raw=raw)
        except OversizedHeaderListError:  # h2 tells the peer to be calm
            raise
        except (HPACKError, IndexError, TypeError, UnicodeDecodeError) as error:
            # Not its words, which quote the block.
            raise UndecodableError(f"a header block does not unpack ({type(error).__name__})") from error


class RequestDecoder(StrictDecoder):
    """Adds the ``:authority`` that the original's server never sends and h2 insists on."""

    def decode(self, data: bytes, raw: bool = False) -> Iterable[Any]:
        fields = list(super().decode(data, raw=raw))
        names = {bytes(field[0]) if isinstance(field[0], bytes) else field[0] for field in fields}
        if b":method" in names and not names & {b":authority", b"host"}:
            pseudo = sum(1 for name, _ in fields if name.startswith(b":"))
            fields.insert(pseudo, HeaderTuple(b":authority", b"tunnel"))
        return fields
