"""A process that visits an honest tunnel every 50 ms.

It has a small web service and reads lines from standard input: ``serve URL`` opens a tunnel ``good`` to the
service through the server at URL, and says so; ``visit PORT`` begins to visit ``good.localhost`` there;
``take`` prints how often the page has come until now. It ends with its input, or with a visit that fails.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback

from support import Service, get

from tinytun_gevent import Tunnel

PAUSE = 0.05
"""Seconds from one visit to the next."""


class Visits:
    """Visits a tunnel all the time, in a thread."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.count = 0
        #: Set when a visit may fail, because the tunnel is about to go.
        self.over = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            while not self.over.is_set():
                assert get(self._port, "good").status == 200
                self.count += 1
                time.sleep(PAUSE)
        except BaseException:
            if not self.over.is_set():
                traceback.print_exc()
                os._exit(1)


def main() -> None:
    visits: Visits | None = None
    tunnels: list[Tunnel] = []
    with Service() as service:
        for line in sys.stdin:
            command, *arguments = line.split()
            if command == "serve":
                tunnels.append(Tunnel(service.target, server=arguments[0], proxy="", subdomain="good"))
                tunnels[-1].open()
                print("open", flush=True)
            elif command == "visit":
                visits = Visits(int(arguments[0]))
            elif visits is not None:
                print(visits.count, flush=True)
        if visits is not None:
            visits.over.set()
        for tunnel in tunnels:
            tunnel.close(grace=0)


if __name__ == "__main__":
    main()
