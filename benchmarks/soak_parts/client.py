"""A tunnel client that tells its counters: ``client.py SERVER TARGET KIND NAME``.

It is the command's own agent; the command shows the same counters on a terminal only.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent.event  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.soak_parts.counting import tell_on_signal  # noqa: E402
from tinytun_gevent.client.agent import Agent  # noqa: E402
from tinytun_gevent.client.config import make_config  # noqa: E402
from tinytun_gevent.client.events import Listener  # noqa: E402
from tinytun_gevent.garbage import calm  # noqa: E402


class Printing(Listener):
    """The URL on a line of its own, as the command prints it."""

    def url(self, url: str) -> None:
        print(url, flush=True)


def main(server: str, target: str, kind: str, name: str) -> None:
    """Serves until the process is ended."""
    options = {"subdomain": name} if kind == "http" else {}
    agent = Agent(make_config(target, kind=kind, server=server, wait=True, environ={}, **options), Printing())
    calm()
    tell_on_signal(lambda: asdict(agent.counters))
    agent.start()
    gevent.event.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
