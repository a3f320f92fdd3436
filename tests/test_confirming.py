"""What a 101 confirms: a warning where comfort is missing, a refusal where something would be open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tinytun_gevent.client.confirming import HOST_HEADER, WARNINGS, check_confirmed, warnings
from tinytun_gevent.errors import RefusedError
from tinytun_gevent.wire.handshake import Kind, OpenReply, OpenRequest
from tinytun_gevent.wire.options import Options, Rewrite

EVERYTHING = Options(rewrite=Rewrite("http://localhost:3000"), forwarded_host=False)


def asking(options: Any = None, host_header: str | None = None) -> OpenRequest:
    return OpenRequest(Kind.HTTP, "server.test:5554", host_header=host_header, options=options)


def granting(*names: str, host_header: bool = False, kind: Kind | None = None) -> OpenReply:
    return OpenReply("0" * 32, host_header=host_header, options=names, kind=kind)


def test_a_request_without_wishes_needs_no_confirmation() -> None:
    check_confirmed(asking(), granting())
    assert warnings(asking(), granting()) == []


def test_what_is_confirmed_is_no_warning() -> None:
    request, reply = asking(EVERYTHING, "localhost:3000"), granting(*EVERYTHING.names, host_header=True)
    check_confirmed(request, reply)
    assert warnings(request, reply) == []


def test_comfort_that_is_missing_is_a_warning() -> None:
    request = asking(EVERYTHING)
    check_confirmed(request, granting())
    told = warnings(request, granting())
    assert told == [WARNINGS["rewrite"], WARNINGS["forwarded_host"]]
    assert warnings(request, granting("rewrite")) == [WARNINGS["forwarded_host"]]


def test_a_server_that_knows_no_host_header_is_told_of_in_one_line() -> None:
    options = Options(rewrite=Rewrite("http://localhost:3000"))
    assert warnings(asking(options, "localhost:3000"), granting()) == [HOST_HEADER]


def test_an_option_that_must_hold_ends_the_attempt() -> None:
    """An option that nobody has called a comfort is one."""
    request = asking(SimpleNamespace(names=("rewrite", "visitors")))
    check_confirmed(request, granting("visitors"))
    with pytest.raises(RefusedError, match="visitors") as caught:
        check_confirmed(request, granting("rewrite"))
    assert caught.value.exit_code == 3
    assert "rewrite" not in str(caught.value)


def test_every_comfort_is_an_option() -> None:
    assert set(WARNINGS) <= set(Options.__struct_fields__)


def test_another_type_than_was_asked_for_ends_the_attempt() -> None:
    check_confirmed(asking(), granting(kind=Kind.HTTP))
    with pytest.raises(RefusedError, match="type tcp, not http") as caught:
        check_confirmed(asking(), granting(kind=Kind.TCP))
    assert caught.value.exit_code == 3
