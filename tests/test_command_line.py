"""What is checked of a command line before docopt reads it."""

from __future__ import annotations

from typing import Any

import pytest
from docopt import docopt
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent.cli import BLANK, CLIENT, SERVER, WITHOUT
from tinytun_gevent.command_line import CommandLineError, Grammar

DOC = """\
Usage:
  tool put <file> [-n NAME] [--force] [options]
  tool get <file> [<copy>] [--all] [options]
  tool key new --label NAME [options]
  tool key list [options]
  tool (-h | --help | -V | --version)

What to do:
  put   send a file
  get   fetch a file, and
        keep it

Options:
  -n NAME, --name NAME  Name of it; a long text goes
                        on here
  --force               Even so
  --all                 Everything
  --label NAME          Whose key
  --where PLACE         Where
  -q, --quiet           Say nothing
  -h, --help            Print help
  -V, --version         Print version

Exit codes: 0
"""

TOOL = Grammar("tool", DOC, {"get": {"--where": "it is everywhere"}, "key list": {"--quiet": ""}})


def wrong(*argv: str) -> str:
    """The message for a command line."""
    with pytest.raises(CommandLineError) as caught:
        TOOL.check(argv, {"--where"})
    return str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [
        ["put", "f"],
        ["put", "f", "-n", "a", "--force", "-q"],
        ["put", "f", "-qna"],
        ["put", "f", "--name=a=b"],
        ["-q", "put", "f"],
        ["put", "f", "-n", "-x"],  # a value may begin like an option
        ["put", "-"],
        ["get", "f", "copy", "--all"],
        ["key", "new", "--label", "me", "--where", ""],
        ["key", "list"],
    ],
)
def test_what_is_right_passes_as_it_is(argv: list[str]) -> None:
    assert TOOL.check(argv) == argv


def test_two_hyphens_end_the_options() -> None:
    assert TOOL.check(["put", "--", "f"]) == ["put", "f"]
    assert "'-q' is not expected" in wrong("put", "--", "-q")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("", "say what to do, for example: tool put FILE"),
        ("putt f", "'putt' is no command; did you mean put?"),
        ("frobnicate", "'frobnicate' is no command: commands are put, get, key"),
        ("key", "say what to do: key new | key list"),
        ("key nwe", "say what to do: key new | key list"),
        ("put", "the file is missing, for example: tool put FILE"),
        ("put a b", "'b' is not expected"),
        ("key list x", "key list takes options only"),
        ("put a tt_abc", "a token is not expected"),
        ("tt_abc", "a token is no command: commands are put, get, key"),
        ("key new", "--label is missing"),
        ("put f --na a", "'--na' is not an option; did you mean --name?"),
        ("put f --nmae a", "'--nmae' is not an option; did you mean --name?"),
        ("put f --zzzz", "'--zzzz' is not an option"),
        ("put f -x", "'-x' is not an option"),
        ("put f -qx", "'-x' is not an option"),
        ("put f -n", "-n needs a value"),
        ("put f -n --force", "-n needs a value"),
        ("put f --name -- x", "--name needs a value"),
        ("put f --force=1", "--force takes no value"),
        ("put f -n a --name b", "--name is given twice"),
        ("put f -q -q", "-q is given twice"),
        ("put f --name=", "--name has an empty value: leave it out instead"),
        ("put f --all", "--all does not go with put; it is for get"),
        ("get f --where x", "--where does not go with get: it is everywhere"),
        ("key list -q", "--quiet does not go with key list; it is for put, get, key new"),
    ],
)
def test_what_is_wrong_is_said(argv: str, says: str) -> None:
    assert wrong(*argv.split()) == says


def test_the_usage_that_fits_comes_with_it() -> None:
    with pytest.raises(CommandLineError) as caught:
        TOOL.check(["get", "f", "--force"])
    assert caught.value.usage == "tool get <file> [<copy>] [--all] [options]"
    assert caught.value.exit_code == 2


def test_help_shows_what_goes_with_the_command() -> None:
    text = TOOL.help(["get", "-h"])
    assert text.startswith("Usage:\n  tool get <file> [<copy>] [--all] [options]\n")
    assert "  get   fetch a file, and\n        keep it\n" in text
    assert "--all" in text
    assert "--where" not in text
    assert "on here" in TOOL.help(["put"])
    assert "key list" in TOOL.help_on(["key"])
    assert "key list" not in TOOL.help_on(["key", "new"])
    assert TOOL.help(["-h"]) == DOC
    with pytest.raises(CommandLineError):
        TOOL.help_on(["gte"])


WORDS = st.one_of(
    st.sampled_from(["http", "tcp", "demo", "login", "logout", "token", "new", "status", "3000", "--", "-"]),
    st.sampled_from(["-s", "-sx", "-q", "-qp1", "--server", "--server=x", "--quiet", "--label", "--qu", ""]),
    st.text(alphabet="-=aqs <>[]", max_size=5),
)


@pytest.mark.parametrize(("program", "doc"), [("tinytun", CLIENT), ("tinytun-server", SERVER)])
@given(argv=st.lists(WORDS, max_size=7))
def test_what_passes_is_what_docopt_reads(program: str, doc: str, argv: list[str]) -> None:
    grammar = Grammar(program, doc, WITHOUT[program])
    try:
        checked = grammar.check(argv, BLANK.get(program))
    except CommandLineError:
        return
    read: dict[str, Any] = docopt(doc, checked, default_help=False)
    assert all(read[word] for word in checked if read.get(word) is False and word.startswith("--"))
