"""Changing the file of tokens: one entry, and not a byte more; whole or not at all."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.errors import TunnelError, UsageError
from tinytun_gevent.server import token_file
from tinytun_gevent.server.token_file import appended, edit, without
from tinytun_gevent.server.tokens import Token, parse_tokens

OPERATORS = """\
# Our tokens. [[tokens]] below, one a colleague.

[[ tokens ]]  # the first one
label = "alice [[tokens]]"
sha256 = "{0}"
names = [
  "a",   # ] not the end
  "b",
]

# Bob came in May.
[["tokens"]]
sha256 = '{1}'
label = '''bob
'''

[tokens.limits]
tunnels = 3 # enough

# Carol is last.
[[tokens]]
label = "carol"
sha256 = "{2}"
expires = 2099-01-01
# the end"""


def digest(number: int) -> str:
    return f"{number:064x}"[::-1]


def text_of(count: int = 3) -> str:
    return OPERATORS.replace("'''bob\n'''", '"bob"').format(*(digest(n) for n in range(1, count + 1)))


def labels(text: str) -> list[str]:
    return [token.label for token in parse_tokens(text.encode())]


def entry(label: str, number: int = 9) -> str:
    return f'label = "{label}"\nsha256 = "{digest(number)}"\n'


def test_an_entry_is_added_behind_everything_else() -> None:
    text = text_of()
    changed = appended(text, entry("dave"))
    assert changed == f"{text}\n\n[[tokens]]\n{entry('dave')}"
    assert labels(changed)[-1] == "dave"
    assert appended("", entry("dave")) == f"[[tokens]]\n{entry('dave')}"


@pytest.mark.parametrize(
    ("index", "gone"),
    [
        (0, '[[ tokens ]]  # the first one\nlabel = "alice [[tokens]]"\n'),
        (1, '[["tokens"]]\n'),
        (2, '[[tokens]]\nlabel = "carol"\n'),
    ],
)
def test_an_entry_is_removed_and_nothing_else(index: int, gone: str) -> None:
    text = text_of()
    changed = without(text, index)
    names = labels(text)
    assert labels(changed) == names[:index] + names[index + 1 :]
    assert gone not in changed
    for comment in ("# Our tokens.", "# Bob came in May.", "# Carol is last.", "# the end"):
        assert comment in changed
    start = text.index(gone)
    assert changed.startswith(text[:start].rstrip("\n"))
    lines = iter(text.splitlines())
    assert all(line in lines for line in changed.splitlines()), "what stays, stays in its order"


def test_all_can_be_removed_one_by_one() -> None:
    text = text_of()
    for _ in range(3):
        text = without(text, 0)
    assert labels(text) == []
    assert text.count("#") == 4 + 0


@pytest.mark.parametrize(
    "text", ["tokens = []\n", 'tokens = [{label = "a", sha256 = "' + digest(1) + '"}]\n']
)
def test_tokens_in_an_array_are_left_to_the_operator(text: str) -> None:
    with pytest.raises(UsageError, match="by hand"):
        appended(text, entry("dave"))
    if labels(text):
        with pytest.raises(UsageError, match="by hand"):
            without(text, 0)


LINES = st.lists(
    st.sampled_from(
        ["", "# a comment", "# [[tokens]]", "   ", '\t# \u00e4 \'quoted """', "#]", "# '''", "", "#\r"]
    ),
    max_size=4,
).map(lambda lines: "".join(line + "\n" for line in lines))
ENDS = st.sampled_from(["\n", " # [[tokens]]\n", "\r\n", "  \n"])
NAMES = st.sampled_from(
    [
        "",
        'names = ["a", "b-*"]\n',
        "names = [\n 'a', # ']\n\n]\n",
        "names = [\"\"\"a\"\"\", '''b''']\n",
        "[tokens.each]\nrate = 5\n",
        "limits = {tunnels = 1}\n",
        '"reserve" = [ "\\u0061" ]\n',
    ]
)


@given(LINES, st.lists(st.tuples(LINES, ENDS, NAMES, LINES), max_size=4), st.data())
def test_whatever_it_looks_like_only_the_entry_changes(
    top: str, blocks: list[tuple[str, str, str, str]], data: st.DataObject
) -> None:
    text = top
    spans = []
    for number, (inside, end, names, behind) in enumerate(blocks):
        start = len(text)
        text += f"[[tokens]]{end}{inside}label = 'l{number}'{end}sha256 = '{digest(number + 1)}'{end}{names}"
        spans.append((start, len(text)))
        text += behind
    before = parse_tokens(text.encode())
    added = appended(text, entry("new", 77))
    assert added.startswith(text)
    assert parse_tokens(added.encode())[:-1] == before
    assert without(added, len(before)).rstrip("\n") == text.rstrip("\n")
    if blocks:
        index = data.draw(st.integers(0, len(blocks) - 1))
        start, end = spans[index]
        left = without(text, index)
        assert left in (text[:start] + text[end:], text[: start - 1] + text[end:])
        assert parse_tokens(left.encode()) == before[:index] + before[index + 1 :]


# -- on the disk --------------------------------------------------------------


def add(label: str, number: int = 9) -> object:
    return lambda text, tokens: appended(text, entry(label, number))


def test_a_new_file_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    edit(str(path), add("alice"))  # type: ignore[arg-type]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert labels(path.read_text()) == ["alice"]
    assert os.listdir(tmp_path) == ["tokens.toml"]


def test_mode_owner_and_link_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    real.write_text(text_of())
    real.chmod(0o640)
    link.symlink_to(real)
    before = real.stat()
    edit(str(link), add("dave"))  # type: ignore[arg-type]
    after = real.stat()
    assert link.is_symlink()
    assert labels(real.read_text())[-1] == "dave"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino, "replaced, not written over"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(text_of())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_file.os, call, full)
    with pytest.raises(TunnelError, match="No space left on device"):
        edit(str(path), add("dave"))  # type: ignore[arg-type]
    assert path.read_text() == text_of()
    assert os.listdir(tmp_path) == ["tokens.toml"]


def test_a_file_that_makes_no_sense_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    for content in (b"[[tokens]]\nlabel = 1\n", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(UsageError):
            edit(str(path), add("dave"))  # type: ignore[arg-type]
        assert path.read_bytes() == content


def test_one_edit_at_a_time(tmp_path: Path) -> None:
    """While an edit is under way the next one waits, for a lock that goes with its process."""

    def change(text: str, _: Sequence[Token]) -> str:
        other = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(other)
        return appended(text, entry("alice"))

    edit(str(tmp_path / "tokens.toml"), change)
    edit(str(tmp_path / "tokens.toml"), add("bob", 10))  # type: ignore[arg-type]
    assert labels((tmp_path / "tokens.toml").read_text()) == ["alice", "bob"]
