"""Random names for tunnels whose owner asked for none."""

from __future__ import annotations

import secrets
from typing import Final

_CONSONANTS: Final = "bdfghjkmnprstvwz"
_VOWELS: Final = "aeiou"
_WORD: Final = (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS, _CONSONANTS)

COMBINATIONS: Final = (len(_CONSONANTS) ** 3 * len(_VOWELS) ** 2) ** 2
"""How many names there are: 102,400 words squared, 1.05e10."""


def random_name() -> str:
    """Two words such as ``bakod-tuvim``: 11 characters that can be read out over the phone.

    There are no digits to mistake for letters, and none of the letters that are hard to tell
    from a digit or by ear (l, q, c, x, y). Drawn from the system's secure source. The odds, of 1.05e10 names:
    while 10,000 tunnels are open, a fresh name is one of theirs once in a million draws (the
    registry then draws again), and so is a stranger's guess.
    """
    return f"{random_word()}-{random_word()}"


def random_word() -> str:
    """Five letters."""
    return "".join(secrets.choice(letters) for letters in _WORD)


def random_id() -> str:
    """32 hexadecimal digits (128 bits): what a tunnel is called in logs and in its 101."""
    return secrets.token_hex(16)
