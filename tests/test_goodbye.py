"""Why the server ends a tunnel, as its client understands it."""

from __future__ import annotations

import pytest

from tinytun_gevent.wire.goodbye import INADEQUATE_SECURITY, NO_ACCESS, NOT_ALLOWED, REPLACED, ends_access


@pytest.mark.parametrize(
    ("code", "reason", "ends"),
    [
        (INADEQUATE_SECURITY, NO_ACCESS, True),
        (INADEQUATE_SECURITY, "its token has expired", True),
        (INADEQUATE_SECURITY, "", True),
        (INADEQUATE_SECURITY, NOT_ALLOWED, False),
        (8, REPLACED, False),
        (0, NO_ACCESS, False),
        (11, "the peer sent too many PING", False),
    ],
)
def test_only_a_token_that_is_not_valid_any_more_ends_access(code: int, reason: str, ends: bool) -> None:
    assert ends_access(code, reason.encode()) is ends
