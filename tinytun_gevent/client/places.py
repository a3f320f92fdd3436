"""Where the user's files are, by the custom of each system."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping


def place(
    environ: Mapping[str, str], xdg: str, usual: str, windows: str, platform: str = sys.platform
) -> str | None:
    """Our directory among the user's; None where the environment does not tell where those are.

    On Windows in the one that the variable ``windows`` names, on macOS in Application Support, elsewhere
    (the XDG specification) in the one that ``xdg`` names, or in ``usual`` of the home directory.
    """
    home = environ.get("HOME", "")
    if platform == "win32":
        base = environ.get(windows, "")
    elif platform == "darwin":
        base = home and os.path.join(home, "Library", "Application Support")
    else:
        base = environ.get(xdg, "")
        if not os.path.isabs(base):  # the specification: a relative path is ignored
            base = home and os.path.join(home, usual)
    return os.path.join(base, "tinytun") if os.path.isabs(base) else None
