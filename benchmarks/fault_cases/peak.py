"""The most memory that processes have needed since a moment, and how many descriptors they have open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..processes import family

_FORGET = "5"  # in clear_refs: the peak resident size begins anew (proc(5))


class Peak:
    """Watches the families of some processes from now on, each process by itself."""

    def __init__(self, roots: Mapping[str, int]) -> None:
        """``roots``: process ids by name."""
        self._before: dict[int, int] = {}
        self._names: dict[int, str] = {}
        for name, root in roots.items():
            for member in family([root]):
                Path(f"/proc/{member.pid}/clear_refs").write_text(_FORGET)
                self._before[member.pid] = _size(member.pid, "VmRSS")
                self._names[member.pid] = name

    def growth(self) -> dict[str, int]:
        """Bytes by which the peak is above what was there at the beginning, of each name's worst process."""
        grown: dict[str, int] = {}
        for pid, before in self._before.items():
            name = self._names[pid]
            grown[name] = max(grown.get(name, 0), _size(pid, "VmHWM") - before)
        return grown


def _size(pid: int, which: str) -> int:
    """Bytes, of a line in ``/proc/PID/status``; 0 for a process that has ended."""
    try:
        found = re.search(rf"^{which}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def descriptors(roots: Iterable[int]) -> int:
    """How many the families of ``roots`` have open, together."""
    return sum(len(os.listdir(f"/proc/{member.pid}/fd")) for member in family(roots))


def mebibytes(grown: Mapping[str, int]) -> str:
    """For the table: ``server +1.2 MiB, client +0.3 MiB``."""
    return ", ".join(f"{name} +{size / 2**20:.1f} MiB" for name, size in grown.items())
