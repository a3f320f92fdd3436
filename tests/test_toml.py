"""TOML whose cost is bounded."""

from __future__ import annotations

import contextlib
import tomllib
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytun_gevent import toml
from tinytun_gevent.toml import LINE_DOTS, MAX_DOTS, MAX_LINE, loads

MIB = 1024 * 1024


def keys(count: int, dot: str = ".") -> str:
    return dot.join(["a"] * count)


def memory(text: str) -> int:
    """Bytes that a refusal takes at the most."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            loads(text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        keys(20_000) + " = 1",
        "[" + keys(20_000) + "]",
        "[[" + keys(20_000, " . ") + "]]",
        "x = { " + keys(20_000) + " = 1 }",
        'x = { y = """\n# """, ' + keys(20_000) + " = 1 }",
        "\n".join(f"k{number}." + keys(60) + " = 1" for number in range(8000)),
        "x = " + "[" * 100_000,
        "x = " + "{x=" * 60_000,
    ],
)
def test_what_is_dear_is_refused_cheaply(text: str) -> None:
    assert memory(text) < 16 * MIB


def test_what_is_too_much_is_said_with_its_place() -> None:
    for text, says in (
        ("a = 1\n" + keys(LINE_DOTS + 2) + " = 1", f"more than {LINE_DOTS} dots in line 2"),
        ("#" + "x" * MAX_LINE, f"line 1 is longer than {MAX_LINE} characters"),
        (("#" + "." * LINE_DOTS + "\n") * (MAX_DOTS // LINE_DOTS + 1), f"more than {MAX_DOTS} dots"),
        ("x = " + "[" * 5000, "brackets are nested too deep"),
        ("x = ", "Invalid value"),
    ):
        with pytest.raises(ValueError, match=says):
            loads(text)


def test_what_is_within_bounds_is_read() -> None:
    label = "a" + "." * 62
    text = f'label = "{label}"\nlimits = {{ requests = 0.5 }}\n' + keys(LINE_DOTS + 1) + " = 1\n"
    assert loads(text) == tomllib.loads(text)
    assert loads("x = [" + ", ".join(['"' + "n" * 63 + '"'] * 256) + "]")["x"][255] == "n" * 63


def test_the_dearest_file_of_a_megabyte_is_affordable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of it, because it is counted while it is read."""
    monkeypatch.setattr(toml, "MAX_DOTS", MAX_DOTS // 16)
    lines, dots = [], 0
    while dots + 8 <= MAX_DOTS // 16:
        lines.append(f"[k{len(lines)}." + keys(8) + "]")
        dots += 8
    tracemalloc.start()
    loads("\n".join(lines))
    assert tracemalloc.get_traced_memory()[1] < 200 * MIB // 16
    tracemalloc.stop()


@given(st.text("a.[]{}=\"'#\n \\1,", max_size=200))
def test_it_says_what_the_standard_library_says(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert loads(text) == tomllib.loads(text)
