"""The file of tokens as text."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.rights import Names
from tinytun_gevent.server.account import Limits
from tinytun_gevent.server.authfile import digest, parse

HASH = digest("tt_secret")
OTHER = digest("tt_other")


def token(label: str = "anna", sha256: str = HASH, more: str = "") -> str:
    return f'[[tokens]]\nlabel = "{label}"\nsha256 = "{sha256}"\n{more}\n'


def test_all_that_a_token_may_have() -> None:
    more = """
names = ["anna", "Anna-*"]
ports = [20000, "20010-20019"]
reserved = ["shop"]
reserved_ports = [25565]
expires = 2027-01-31T12:00:00Z
limits = { tunnels = 2, requests = 1.5 }
each = { rate = 1000 }
"""
    usual, each = Limits(100, 200, 300.0, 400), Limits(0, 20, 30.0, 40)
    (grant,) = parse(token(more=more), usual=usual, usual_each=each, nobody=Names(["www"]))
    account = grant.account
    assert (account.label, account.id, grant.sha256) == ("anna", HASH[:32], HASH)
    assert account.limits == Limits(2, 200, 1.5, 400)
    assert account.each == Limits(0, 20, 30.0, 1000)
    assert grant.expires == datetime(2027, 1, 31, 12, tzinfo=UTC).timestamp()
    allowed = ["anna", "anna-x", "shop", 20000, 20019, 25565]
    assert [name for name in (*allowed, "other", "www", 20001) if account.rights.allows(name)] == allowed


def test_a_token_without_anything_may_all_that_is_not_reserved() -> None:
    first, second = parse(token(more='reserved = ["shop"]') + token("bob", OTHER))
    assert first.account.rights.allows("shop")
    assert not second.account.rights.allows("shop")
    assert second.account.rights.allows("other")
    assert second.expires is None


def test_a_date_counts_to_its_end_and_a_time_without_zone_is_utc() -> None:
    (day,) = parse(token(more="expires = 2027-01-31"))
    (moment,) = parse(token(more="expires = 2027-01-31T23:00:00"))
    assert day.expires is not None
    assert moment.expires is not None
    assert 3599 < day.expires - moment.expires < 3600


def test_an_empty_file_has_no_tokens() -> None:
    assert parse("") == parse("# nobody yet\n") == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tokens = 3", "tokens: Expected `array`"),
        ("[[token]]\n", "unknown field `token`"),
        ("[[tokens]\n", "it is not TOML: .*line 1"),
        (token(more="name = []"), r"tokens\[0\]: .*unknown field `name`"),
        ('[[tokens]]\nlabel = "x"\n', r"tokens\[0\]: .*sha256"),
        (token("a b"), r"tokens\[0\]\.label: "),
        (token(sha256=HASH.upper()), r"tokens\[0\]\.sha256: not 64"),
        (token(more='names = ["ok", "no_t"]'), r"tokens\[0\]\.names\[1\]: 'no_t'"),
        (token(more="names = [3]"), r"tokens\[0\]\.names\[0\]: 3"),
        (token(more='names = "x"'), r"tokens\[0\]\.names: Expected `array"),
        (token(more='ports = ["2-1"]'), r"tokens\[0\]\.ports\[0\]: '2-1'"),
        (token(more="ports = [70000]"), r"tokens\[0\]\.ports\[0\]: 70000"),
        (token(more="ports = [true]"), r"tokens\[0\]\.ports\[0\]: True"),
        (token(more='reserved = ["-"]'), r"tokens\[0\]\.reserved\[0\]"),
        (token(more='expires = "soon"'), r"tokens\[0\]\.expires: not a date"),
        (token(more="expires = 12:00:00"), r"tokens\[0\]\.expires: not a date"),
        (token(more="limits = { tunnels = -1 }"), r"tokens\[0\]\.limits\.tunnels: Expected `int` >= 0"),
        (token(more="limits = { tunnels = " + "1" * 5000 + " }"), "it is not TOML: Exceeds the limit"),
        (token(more="limits = { bytes = 1 }"), r"tokens\[0\]\.limits: .*unknown field `bytes`"),
        (token(more="each = { tunnels = 1 }"), r"tokens\[0\]\.each"),
        (token() + token("bob"), r"tokens\[1\]\.sha256: the same as of tokens\[0\]"),
        (token() + token(sha256=OTHER), r"tokens\[1\]\.label: the same as of tokens\[0\]"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse(text)


def test_what_is_wrong_is_not_repeated_at_length() -> None:
    for more in ('names = ["' + "_" * 9000 + '"]', 'ports = ["' + "_" * 9000 + '"]'):
        with pytest.raises(UsageError) as caught:
            parse(token(more=more))
        assert len(str(caught.value)) < 200


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse(text)
