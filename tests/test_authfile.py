"""The file of tokens as text."""

from __future__ import annotations

import contextlib
import tomllib
from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.rights import Names
from tinytun_gevent.server.account import Limits
from tinytun_gevent.server.authfile import append, digest, parse, remove, tomllib_tokens

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


# -- changing the text --------------------------------------------------------

FILE = f"""# tokens of the office

[[tokens]] # the first
label = "anna"
sha256 = "{HASH}"
names = [
    "anna",  # hers
    "a-*",
]
[tokens.limits]
tunnels = 2

# Bob's, until spring
[[tokens]]
label = "bob"
sha256 = "{OTHER}"
expires = 2027-03-01

# the end
"""


def test_a_token_is_added_behind_what_is_there() -> None:
    entry = {"label": "eve", "sha256": "0" * 64, "names": ["e", "e-*"], "expires": date(2027, 1, 31)}
    for before in ("", FILE, FILE.rstrip()):
        after = append(before, entry)
        assert after.startswith(before)
        assert tomllib.loads(after)["tokens"][-1] == entry
        parse(after)


def test_a_file_in_another_form_is_not_damaged() -> None:
    inline = f'tokens = [{{ label = "anna", sha256 = "{HASH}" }}]\n'
    with pytest.raises(UsageError):
        append(inline, {"label": "eve", "sha256": "0" * 64})
    with pytest.raises(UsageError, match="by hand"):
        remove(inline, 0)


def test_a_token_is_cut_out_with_its_lines_and_no_others() -> None:
    without_anna = remove(FILE, 0)
    assert without_anna == "# tokens of the office\n\n" + FILE[FILE.index("# Bob's") :]
    without_bob = remove(FILE, 1)
    assert without_bob == FILE[: FILE.index('[[tokens]]\nlabel = "bob"')] + "\n# the end\n"
    parse(without_anna)
    parse(without_bob)


comments = st.lists(st.sampled_from(["", "# note", "  # [[tokens]]", "\t"]), max_size=3).map(
    lambda lines: "".join(f"{line}\n" for line in lines)
)


@given(st.lists(comments, min_size=1, max_size=5), st.data())
def test_what_was_appended_can_be_cut_out_again(remarks: list[str], data: st.DataObject) -> None:
    text = ""
    for number, remark in enumerate(remarks):
        text = append(text + remark, {"label": f"t{number}", "sha256": f"{number:064x}", "ports": ["1-2"]})
    number = data.draw(st.integers(0, len(remarks) - 1))
    after = remove(text, number)
    assert [t["label"] for t in tomllib.loads(after).get("tokens", [])] == [
        f"t{other}" for other in range(len(remarks)) if other != number
    ]
    kept = [line for line in text.splitlines() if line.startswith(("# ", "  #"))]
    assert [line for line in after.splitlines() if line.startswith(("# ", "  #"))] == kept


REMARKS = st.lists(
    st.sampled_from(
        [
            "",
            "# a comment",
            "# [[tokens]]",
            "   ",
            '\t# \u00e4 \'quoted """',
            "#]",
            "# '''",
            "#\r",
            "# \u2028 x",
        ]
    ),
    max_size=4,
).map(lambda lines: "".join(line + "\n" for line in lines))
ENDS = st.sampled_from(["\n", " # [[tokens]]\n", "\r\n", "  \n"])
REST = st.sampled_from(
    [
        "",
        'names = ["a", "b-*"]\n',
        "names = [\n 'a', # ']\n\n]\n",
        "names = [\"\"\"a\"\"\", '''b''']\n",
        "[tokens.each]\nrate = 5\n",
        '[ tokens . "limits" ] # x\nrate = 1\n',
        "limits = {tunnels = 1}\n",
        '"reserved" = [ "\\u0061" ]\n',
    ]
)


@given(REMARKS, st.lists(st.tuples(REMARKS, ENDS, REST, REMARKS), max_size=4), st.data())
def test_however_it_is_written_the_rest_stays_byte_for_byte(
    top: str, blocks: list[tuple[str, str, str, str]], data: st.DataObject
) -> None:
    text, places = top, []
    for number, (inside, end, rest, behind) in enumerate(blocks):
        start = len(text)
        text += f"[[tokens]]{end}{inside}label = 'l{number}'{end}sha256 = '{digest(str(number))}'{end}{rest}"
        places.append((start, len(text)))
        text += behind
    before = tomllib_tokens(text)
    added = append(text, {"label": "new", "sha256": digest("new")})
    assert added.startswith(text)
    assert remove(added, len(before)).rstrip("\n") == text.rstrip("\n")
    if blocks:
        number = data.draw(st.integers(0, len(blocks) - 1))
        start, stop = places[number]
        left = remove(text, number)
        assert left in (text[:start] + text[stop:], text[: start - 1] + text[stop:])
        assert tomllib_tokens(left) == before[:number] + before[number + 1 :]
