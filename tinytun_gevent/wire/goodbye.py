"""Reasons for which the server ends a tunnel, as its GOAWAY names them (RFC 9113 §6.8). Ours.

The code tells the kind, the debug data says it in words. The original's programs only see that the session
is over.
"""

from __future__ import annotations

from typing import Final

REPLACED: Final = "replaced"
"""The tunnel's owner has opened it anew; with the code CANCEL (8)."""

NO_ACCESS: Final = "its token was revoked or has expired"
NOT_ALLOWED: Final = "its token does not allow the name any more"
"""The opener may not have the tunnel any more; both with the code INADEQUATE_SECURITY."""

SILENT: Final = "no answer came from you"
"""The connection was taken for dead; with the code NO_ERROR. It is read if the other side was only asleep."""

INADEQUATE_SECURITY: Final = 12
"""RFC 9113 §7. Nothing else between our two programs is told with it."""


def ends_access(code: int, reason: bytes) -> bool:
    """Whether a GOAWAY says that the token itself is not valid any more.

    Words that are not known here count as well: another version of the server may say more precisely why.
    """
    return code == INADEQUATE_SECURITY and reason != NOT_ALLOWED.encode()
