"""The file of tokens: what may stand in it, what is wrong with it, and what each token may have."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server import token_command, tokens
from tinytun_gevent.server.account import Account, Limits
from tinytun_gevent.server.tokens import Rules, Token, TokenPermit, hash_of, parse_tokens, read_tokens

HASHES = [hash_of(f"token {number}") for number in range(5)]
NOW = datetime(2030, 6, 1, tzinfo=UTC)


def one(lines: str = "") -> Token:
    (token,) = parse_tokens(f'[[tokens]]\nlabel = "a"\nsha256 = "{HASHES[0]}"\n{lines}'.encode())
    return token


def many(*blocks: str) -> tuple[Token, ...]:
    text = "".join(
        f'[[tokens]]\nlabel = "{"abcde"[number]}"\nsha256 = "{HASHES[number]}"\n{block}\n'
        for number, block in enumerate(blocks)
    )
    return parse_tokens(text.encode())


def test_an_entry_needs_a_label_and_a_hash_only() -> None:
    token = one()
    assert (token.names, token.ports, token.reserve, token.expires) == (None, None, (), None)
    assert token.account == Account(HASHES[0][:32], "a")
    assert HASHES[0] == hashlib.sha256(b"token 0").hexdigest()


def test_all_that_an_entry_may_say() -> None:
    token = one(
        'names = ["Shop", "acme-*"]\nreserve = ["shop"]\nports = [20000, "20005-20007"]\n'
        'reserve_ports = ["20000"]\nexpires = 2030-12-31\n'
        "limits = {tunnels = 3, requests = 1.5}\n[tokens.each]\nvisitors = 5\nrate = 100\n"
    )
    assert token.names == ("shop", "acme-*")
    assert token.ports == (range(20000, 20001), range(20005, 20008))
    assert token.reserve_ports == (range(20000, 20001),)
    assert token.limits == Limits(tunnels=3, requests=1.5)
    assert token.each == Limits(visitors=5, rate=100)


def test_what_is_not_said_is_as_the_server_has_it() -> None:
    text = f'[[tokens]]\nlabel = "a"\nsha256 = "{HASHES[0]}"\neach = {{rate = 0}}\n'
    (token,) = parse_tokens(text.encode(), Limits(tunnels=7), Limits(rate=9, visitors=8))
    assert token.limits == Limits(tunnels=7)
    assert token.each == Limits(rate=0, visitors=8)


def test_the_example_in_the_readme_is_one() -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")
    (example,) = re.findall(r"(?s)```toml\n(.*?)```", readme)
    (token,) = parse_tokens(example.encode())
    assert token.reserve == ("shop", "shop-*")
    assert token.limits.tunnels == 5
    keys = set(re.findall(r"(?m)^(\w+) =", example))
    assert keys == {field.name for field in dataclasses.fields(Token)}


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("2030-12-31", datetime(2031, 1, 1, tzinfo=UTC)),
        ("2030-12-31T18:00:00Z", datetime(2030, 12, 31, 18, tzinfo=UTC)),
        ("2030-12-31T18:00:00+02:00", datetime(2030, 12, 31, 16, tzinfo=UTC)),
        ("2030-12-31 18:00:00", datetime(2030, 12, 31, 18, tzinfo=UTC)),
    ],
)
def test_when_a_token_ends(text: str, until: datetime) -> None:
    token = one(f"expires = {text}\n")
    assert token.expires == until
    assert token.has_expired(until)
    assert not token.has_expired(until.replace(year=2029))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("name = 1", "tokens[1]: Object contains unknown field `name`"),
        ('names = "a"', "tokens[1].names: Expected"),
        ('names = ["ok", "-no"]', "tokens[1].names[1]: allowed: "),
        ('reserve = [""]', "tokens[1].reserve[0]: allowed: "),
        ('ports = ["1-x"]', "tokens[1].ports[0]: allowed: a port"),
        ("ports = [1, 70000]", "tokens[1].ports[1]: allowed: a port"),
        ('reserve_ports = ["9-8"]', "tokens[1].reserve_ports[0]: allowed: "),
        ('expires = "2030-12-31"', "tokens[1].expires: allowed: a date"),
        ("expires = 12:00:00", "tokens[1].expires: allowed: a date"),
        ("expires = 9999-12-31", "tokens[1].expires: allowed: a date"),
        ("limits = {tunnels = -1}", "tokens[1].limits.tunnels: Expected"),
        ("each = {speed = 1}", "tokens[1].each: Object contains unknown field `speed`"),
        ("names = [" + "'a'," * 257 + "]", "tokens[1].names: Expected"),
    ],
)
def test_an_error_has_its_path(line: str, problem: str) -> None:
    with pytest.raises(ValueError) as wrong:
        many("", line)
    assert str(wrong.value).startswith(problem)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[token]]\n", "unknown field `token`"),
        ("tokens = 1\n", "tokens: Expected"),
        ("[[tokens]]\nlabel = 'x'\n", "tokens[0]: Object missing required field `sha256`"),
        (f"[[tokens]]\nlabel = ' x'\nsha256 = '{HASHES[0]}'\n", "tokens[0].label: allowed: 1 to 64"),
        (f"[[tokens]]\nlabel = '{'x' * 65}'\nsha256 = '{HASHES[0]}'\n", "tokens[0].label: Expected"),
        (f"[[tokens]]\nlabel = \"a\\u001b\"\nsha256 = '{HASHES[0]}'\n", "tokens[0].label: allowed: "),
        ("[[tokens]]\nlabel = \n", "it is not TOML: line 2, column"),
        ("a = " + "[" * 10_000, "it is not TOML: it is nested too deeply"),
        ("#" * (tokens.MAX_FILE + 1), "it is longer than"),
    ],
)
def test_what_is_no_list_of_tokens(text: str, problem: str) -> None:
    with pytest.raises(ValueError) as wrong:
        parse_tokens(text.encode())
    assert problem in str(wrong.value)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="byte 0 is not UTF-8"):
        parse_tokens(b"\xff")


@pytest.mark.parametrize("key", ["label", "sha256"])
def test_nothing_is_there_twice(key: str) -> None:
    first, second = {"label": "a", "sha256": HASHES[0]}, {"label": "b", "sha256": HASHES[1]}
    second[key] = first[key]
    blocks = (
        "[[tokens]]\n" + "".join(f'{k} = "{v}"\n' for k, v in entry.items()) for entry in (first, second)
    )
    with pytest.raises(ValueError) as wrong:
        parse_tokens("".join(blocks).encode())
    assert str(wrong.value) == f"tokens[1].{key}: is that of tokens[0] as well"


def test_a_token_in_place_of_its_hash_is_not_repeated() -> None:
    secret = "tt_my-secret-token"
    for text in (f"[[tokens]]\nlabel='a'\nsha256='{secret}'", f"[[tokens]]\nlabel='a'\nsha256={secret}"):
        with pytest.raises(ValueError) as wrong:
            parse_tokens(text.encode())
        assert "secret" not in str(wrong.value)


def test_there_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"[[tokens]]\nlabel='{n}'\nsha256='{n:064x}'\n" for n in range(10_001))
    with pytest.raises(ValueError, match="tokens: Expected `array` of length <= 10000"):
        parse_tokens(text.encode())


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"AUTH_FILE=.*No such file"):
        read_tokens(str(tmp_path / "none.toml"))
    (tmp_path / "bad.toml").write_text("x = 1")
    with pytest.raises(UsageError, match=r"AUTH_FILE=.*bad.toml: .*unknown field `x`"):
        read_tokens(str(tmp_path / "bad.toml"))


# -- what it means ------------------------------------------------------------


def test_a_token_is_found_by_its_text() -> None:
    rules = Rules(many("", ""))
    found = rules.find("token 1")
    assert found is not None
    assert found.label == "b"
    assert rules.find("token 7") is None
    assert rules.find(HASHES[1]) is None, "the hash is no token"


def test_the_whole_hash_counts() -> None:
    wrong = HASHES[0][:32] + "0" * 32
    rules = Rules(parse_tokens(f"[[tokens]]\nlabel='a'\nsha256='{wrong}'".encode()))
    assert rules.find("token 0") is None


def test_names_and_ports_of_confined_reserving_and_other_tokens() -> None:
    found = many(
        'names = ["a", "a-*"]\nports = ["20000-20002"]',
        'reserve = ["shop", "b-*"]\nreserve_ports = [20001]',
        "",
        'reserve = ["shop"]\nnames = ["x"]',
    )
    rules = Rules(found, ["www", "adm*"])
    confined, reserving, free, sharing = found

    def allowed(token: Token | None, *names: str | int) -> list[str | int]:
        return [name for name in names if not rules.why_not(token, name)]

    names = ("a", "a-1", "shop", "b-1", "x", "other", "www", "admin", 20000, 20001, 30000)
    assert allowed(confined, *names) == ["a", "a-1", 20000]
    assert allowed(reserving, *names) == ["a", "a-1", "shop", "b-1", "x", "other", 20000, 20001, 30000]
    assert allowed(free, *names) == ["a", "a-1", "x", "other", 20000, 30000]
    assert allowed(sharing, *names) == ["shop", "x", 20000, 30000]
    assert allowed(None, *names) == ["a", "a-1", "x", "other", 20000, 30000]
    assert rules.why_not(free, "shop") == "This subdomain is reserved for somebody else"
    assert rules.why_not(free, 20001) == "This port is reserved for somebody else"
    assert rules.why_not(confined, "x") == "This token does not allow that subdomain"
    assert rules.why_not(confined, 30000) == "This token does not allow that port"
    assert rules.why_not(reserving, "www") == "This subdomain is reserved"


def test_reserved_by_the_server_beats_reserved_for_a_token() -> None:
    (token,) = many('reserve = ["www"]')
    assert Rules([token], ["www"]).why_not(token, "www")


@pytest.mark.parametrize(
    ("lines", "pattern"),
    [
        ('names = ["a", "b"]', r"a|b"),
        ('names = ["a", "b-*"]', r"b-[a-z]{5}-[a-z]{5}"),
        ('reserve = ["b-*"]', r"[a-z]{5}-[a-z]{5}"),
        ("", r"[a-z]{5}-[a-z]{5}"),
        ("names = []", "never"),
    ],
)
def test_names_for_who_asks_for_none(lines: str, pattern: str) -> None:
    (token,) = many(lines)
    offered = list(itertools.islice(TokenPermit(Rules([token]), token).names(), 20))
    assert all(re.fullmatch(pattern, name) for name in offered)
    assert len(set(offered)) == {"a|b": 2, "never": 0}.get(pattern, 20)


def test_ports_for_who_asks_for_none() -> None:
    (token,) = many("ports = ['19999-20001', 20005]")
    assert list(TokenPermit(Rules([token]), token).ports(range(20000, 20003))) == [20000, 20001]
    assert TokenPermit(Rules(), None).ports(range(5)) == range(5)


def test_the_next_expiry_is_the_first_that_is_to_come() -> None:
    rules = Rules(many("expires = 2029-01-01", "expires = 2031-01-01", "expires = 2032-01-01", ""))
    assert rules.next_expiry(NOW) == datetime(2031, 1, 2, tzinfo=UTC)
    assert Rules(many("")).next_expiry(NOW) is None


# -- the command's parts ------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=64)


@given(TEXT, st.lists(st.sampled_from(["a", "b-*", "*-c"]), max_size=3), st.booleans())
def test_what_new_writes_is_what_the_server_reads(label: str, names: list[str], ports: bool) -> None:
    options: dict[str, Any] = {"--names": ",".join(names), "--ports": "20000, 20002-20004" if ports else None}
    text = token_command.build_entry(label, "tt_x", options)
    (token,) = parse_tokens(f"[[tokens]]\n{text}".encode())
    assert (token.label, token.sha256, token.names) == (label, hash_of("tt_x"), tuple(names))
    assert token.ports == ((range(20000, 20001), range(20002, 20005)) if ports else None)


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("2030-12-31", datetime(2031, 1, 1, tzinfo=UTC)),
        ("2030-12-31T18:00:00Z", datetime(2030, 12, 31, 18, tzinfo=UTC)),
        ("2030-12-31T18:00:00+02:00", datetime(2030, 12, 31, 16, tzinfo=UTC)),
        ("12h", datetime(2030, 6, 1, 12, tzinfo=UTC)),
        ("30d", datetime(2030, 7, 1, tzinfo=UTC)),
    ],
)
def test_expiries_as_people_write_them(text: str, until: datetime) -> None:
    lines = token_command.build_entry("a", "t", {"--expires": text}, NOW)
    (token,) = parse_tokens(f"[[tokens]]\n{lines}".encode())
    assert token.expires == until


@pytest.mark.parametrize("text", ["", "soon", "0d", "2030-05-31", "999999d", "2030-13-01", "9999-12-31"])
def test_expiries_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="--expires"):
        token_command.build_entry("a", "t", {"--expires": text}, NOW)


def test_which_token_is_meant() -> None:
    found = many("", "", "")
    assert token_command.the_one(found, "b") is found[1]
    assert token_command.the_one(found, HASHES[2][:6].upper()) is found[2]
    for which in ("nobody", HASHES[0][:3], ""):
        with pytest.raises(UsageError, match="no token has"):
            token_command.the_one(found, which)
    alike = [one(), *many("")]
    with pytest.raises(UsageError, match=r"may be any of a .*, a "):
        token_command.the_one(alike, HASHES[0][:8])


def test_the_table_shows_no_token() -> None:
    found = many(
        'names = ["a", "b-*"]\nports = [20000]', 'reserve = ["s"]\nexpires = 2029-01-01', "names = []"
    )
    lines = token_command.table(found, NOW)
    assert lines[0].split() == ["LABEL", "NAMES", "PORTS", "EXPIRES", "SHA256"]
    assert lines[1].split() == ["a", "a,b-*", "20000", "never", HASHES[0][:12]]
    assert lines[2].split() == ["b", "any;", "reserved:", "s", "any", "expired", HASHES[1][:12]]
    assert lines[3].split() == ["c", "none", "any", "never", HASHES[2][:12]]
