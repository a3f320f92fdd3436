"""Where the user's files are."""

from __future__ import annotations

import pytest

from tinytun_gevent.client.places import place


@pytest.mark.parametrize(
    ("environ", "platform", "expected"),
    [
        ({"HOME": "/home/me"}, "linux", "/home/me/.config/tinytun"),
        ({"HOME": "/home/me", "XDG": "/x"}, "linux", "/x/tinytun"),
        ({"HOME": "/home/me", "XDG": "x"}, "linux", "/home/me/.config/tinytun"),
        ({"HOME": "/Users/me", "XDG": "/x"}, "darwin", "/Users/me/Library/Application Support/tinytun"),
        ({"HOME": "/home/me", "WIN": "/c/data"}, "win32", "/c/data/tinytun"),
        ({"HOME": "/home/me"}, "win32", None),
        ({"HOME": "me"}, "linux", None),
        ({}, "linux", None),
        ({}, "darwin", None),
    ],
)
def test_the_custom_of_each_system(environ: dict[str, str], platform: str, expected: str | None) -> None:
    assert place(environ, "XDG", ".config", "WIN", platform) == expected
