"""What the relay can carry by itself: ``python -m benchmarks.relay_alone``, about 25 seconds.

A plain sender and receiver in C with nothing but the relay between them. If it carried less than a
tunnel does, or added to the delay that it was asked for, no figure over it would mean anything.
"""

from __future__ import annotations

import argparse

from .processes import Process, Workspace, cpu_seconds, memory_bytes
from .tools import Tools, build, first_bytes, read_bulk, start_echo, start_relay, websocket_load

HOST = "localhost"
BULK = "/bytes/100000000000"  # more than any machine takes in the time
SECONDS = 4.0
SKIP = 1.0
#: What is tried beside the delay: name, rate (bytes a second), window (bytes).
LIMITS = (("no limit", 0, 0), ("1 Gbit/s", 125_000_000, 0), ("4 MiB in flight", 0, 4 << 20))


def _bulk(workspace: Workspace, tools: Tools, relay: Process, port: int, visitors: int) -> str:
    cpu = cpu_seconds([relay.pid])
    result = read_bulk(workspace, tools, HOST, port, BULK, visitors=visitors, seconds=SECONDS, skip=SKIP)
    share = (cpu_seconds([relay.pid]) - cpu) / SECONDS
    memory = memory_bytes([relay.pid]) / (1 << 20)
    failed = f", {result.failures} FAILED: {result.reason}" if result.failures else ""
    speed = result.rate_bytes_per_s / 1e6
    return f"{visitors} visitor(s) {speed:.0f} MB/s, {share:.0%} of a processor, {memory:.0f} MiB{failed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--delay-ms", type=float, default=25.0, help="each way (default 25)")
    delay = parser.parse_args().delay_ms / 1000
    with Workspace() as workspace:
        tools = build(workspace)
        _, service = start_echo(workspace, tools)
        for name, rate, window in LIMITS:
            relay, port = start_relay(workspace, tools, service, delay=delay, rate=rate, window=window)
            print(f"{delay * 1e3:g} ms each way, {name}:", flush=True)
            for visitors in (1, 8):
                print("  " + _bulk(workspace, tools, relay, port, visitors), flush=True)
            echo = websocket_load(workspace, tools, HOST, port, sockets=1, seconds=SECONDS)
            more = [(value - delay * 2e3) * 1e3 for value in (echo.p50_ms, echo.p99_ms)]
            print(f"  an echo takes {more[0]:.0f} us more than the round trip (p50), {more[1]:.0f} us (p99)")
            first = first_bytes(workspace, tools, HOST, port, "/bytes/1", visitors=1)
            extra = (first.p50_ms - delay * 4e3) * 1e3
            print(f"  a first byte on a new connection {extra:.0f} us more than two round trips", flush=True)
            workspace.stop([relay])


if __name__ == "__main__":
    main()
