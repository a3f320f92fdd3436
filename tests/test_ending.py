"""Why a tunnel takes no visitors any more, in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tinytun_gevent.client.ending import why_ended
from tinytun_gevent.errors import PeerSilentError, SessionClosedError, SessionError
from tinytun_gevent.liveness import Pauses, waking_time
from tinytun_gevent.wire.goodbye import SILENT

SERVER = "tunnel.example.com:5554"


def session(error: SessionError | None = None, reason: str = "", asleep: float = 0.0) -> Any:
    """A session that has ended, after a pause of so many seconds."""
    pauses = Pauses(waking_time() - asleep)
    return SimpleNamespace(
        error=error, goaway_reason=reason.encode(), keep_alive=SimpleNamespace(pauses=pauses)
    )


def test_what_a_server_says_counts_most() -> None:
    assert why_ended(session(asleep=45), SERVER, "the server says: revoked", False) == (
        "the server says: revoked"
    )


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("error", [None, SessionClosedError("lost: reset"), PeerSilentError("silent")])
@pytest.mark.parametrize("reason", ["", SILENT])
def test_a_computer_that_was_asleep(error: SessionError | None, reason: str, stops: bool) -> None:
    """Also with a server that does not say why it closes: that looks like one that stops."""
    assert why_ended(session(error, reason, asleep=45.3), SERVER, "", stops) == (
        f"no answer from {SERVER} for 45 s: this computer was asleep or offline"
    )


def test_a_server_that_says_nothing_any_more() -> None:
    said = why_ended(session(PeerSilentError("the peer fell silent")), SERVER, "", False)
    assert said == f"no answer from {SERVER} for 9 s"


def test_a_server_that_heard_nothing() -> None:
    said = why_ended(session(reason=SILENT), SERVER, "", True)
    assert said == f"{SERVER} got no answer from this computer: one of them was offline"


def test_a_server_that_stops() -> None:
    assert why_ended(session(), SERVER, "", True) == "the server is stopping"


def test_whatever_else() -> None:
    lost = SessionClosedError("the connection was lost: reset")
    assert why_ended(session(lost), SERVER, "", False) == "the connection was lost: reset"
    assert why_ended(session(), SERVER, "", False) == "the server closed the tunnel"
