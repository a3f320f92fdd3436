"""What the test suite has and cases use as it is: messages and peers that break rules, a service for them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))

import framing_corpus  # type: ignore[import-not-found]
import malice  # type: ignore[import-not-found]
import support  # type: ignore[import-not-found]

__all__ = ["framing_corpus", "malice", "support"]
