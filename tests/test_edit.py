"""The text of the file of tokens, changed."""

from __future__ import annotations

import tomllib
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import UsageError
from tinytun_gevent.server.authfile import digest, parse
from tinytun_gevent.server.edit import append, remove, tokens_of

HASH = digest("tt_secret")
OTHER = digest("tt_other")

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
    before = tokens_of(text)
    added = append(text, {"label": "new", "sha256": digest("new")})
    assert added.startswith(text)
    assert remove(added, len(before)).rstrip("\n") == text.rstrip("\n")
    if blocks:
        number = data.draw(st.integers(0, len(blocks) - 1))
        start, stop = places[number]
        left = remove(text, number)
        assert left in (text[:start] + text[stop:], text[: start - 1] + text[stop:])
        assert tokens_of(left) == before[:number] + before[number + 1 :]
