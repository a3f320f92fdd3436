"""Many clients in one process: ``crowd.py SERVER PORT PREFIX COUNT`` keeps COUNT tunnels to a port open.

They are the command's own agents, each with its own connection, without its terminal. They end with
the process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gevent import monkey

monkey.patch_all()

import gevent.event  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tinytun_gevent.client.agent import Agent  # noqa: E402
from tinytun_gevent.client.config import make_config  # noqa: E402
from tinytun_gevent.client.events import Listener  # noqa: E402


def main(server: str, port: str, prefix: str, count: str) -> None:
    """Blocks until the process is ended."""
    names = [f"{prefix}-{number}" for number in range(int(count))]
    configs = [make_config(port, server=server, subdomain=name, wait=True, environ={}) for name in names]
    agents = [Agent(config, Listener()) for config in configs]
    for agent in agents:
        agent.start()
    gevent.event.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
