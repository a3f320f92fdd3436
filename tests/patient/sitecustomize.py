"""Makes a server more patient with its peers than it is; Python imports this first, where PYTHONPATH says so.

Half a second is plenty between the servers of a cluster, and little for a machine that is busy with tests.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

CHANGED: dict[str, dict[str, float]] = {
    "tinytun_gevent.server.peers": {"ASK_TIMEOUT": 5.0, "REST_AFTER_FAILURE": 10.0},
    "tinytun_gevent.server.upstream": {"DIAL_TIMEOUT": 5.0},
}


class Finder:
    """Finds these modules as Python does, and changes them when they have run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            assert vars(module).keys() >= CHANGED[name].keys()
            vars(module).update(CHANGED[name])

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
