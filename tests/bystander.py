"""A process that visits an honest tunnel every 50 ms, and tells what others cost it.

``bystander.py PID`` has a small web service and reads lines from standard input: ``serve URL`` opens a tunnel
``good`` to the service through the server at URL, and says so; ``visit PORT`` begins to visit
``good.localhost`` at that port; ``take`` prints how many visits there have been and the worst of them since
the last ``take``, in processor seconds that process PID used meanwhile. While PID is busy with an attack that
is how long the visitor waited, however little of a processor this machine gives it. It ends with its input.
"""

from __future__ import annotations

import sys
import threading
import time

from support import Service, get

from tinytun_gevent import Tunnel

PAUSE = 0.05
"""Seconds from one visit to the next."""


def clock_of(pid: int) -> int:
    """The id of the clock of another process's processor time, as `clock_getcpuclockid` has it on Linux."""
    return (~pid << 3) | 2


class Visits:
    """Visits a tunnel all the time, in a thread."""

    def __init__(self, pid: int, port: int) -> None:
        self._clock = clock_of(pid)
        self._port = port
        self.count = 0
        self.worst = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            before = time.clock_gettime(self._clock)
            assert get(self._port, "good").status == 200
            self.worst = max(self.worst, time.clock_gettime(self._clock) - before)
            self.count += 1
            time.sleep(PAUSE)


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
                visits = Visits(int(sys.argv[1]), int(arguments[0]))
            elif visits is not None:
                worst, visits.worst = visits.worst, 0.0
                print(visits.count, worst, flush=True)
        for tunnel in tunnels:
            tunnel.close(grace=0)


if __name__ == "__main__":
    main()
