"""Whether memory is flat: samples over time, a line through them, and what counts as noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM = 0.3  # of the time, at the beginning, that is left out: pools, caches and code are being filled
TENTHS = 10
ALWAYS = 3 << 20
"""Bytes of growth that are never a leak: a burst of visitors, as after a restart, leaves 256 idle greenlets
behind, 10 KiB each, and there is what an allocator's arenas come to."""
SIGMAS = 3.0  # of what the line leaves over, which growth must exceed to be one


@dataclass(frozen=True)
class Trend:
    """What became of one process's memory, in bytes."""

    start: float
    growth: float  # of the line, over the time that was looked at
    noise: float  # standard deviation of the medians around the line

    @property
    def flat(self) -> bool:
        """Growth is less than `ALWAYS`, or than `SIGMAS` times the noise."""
        return self.growth < max(ALWAYS, SIGMAS * self.noise)


def trend(samples: Sequence[tuple[float, int]]) -> Trend:
    """The least-squares line through the medians of each tenth of the time after `WARM`.

    ``samples`` are (seconds, bytes) in order; of fewer than two tenths no line can be said to rise.
    """
    begin, end = samples[0][0], samples[-1][0]
    warm = begin + WARM * (end - begin)
    width = (end - warm) / TENTHS
    points = []
    for number in range(TENTHS):
        low, high = warm + number * width, warm + (number + 1) * width
        values = [size for at, size in samples if low <= at <= high]
        if values:
            points.append(((low + high) / 2, statistics.median(values)))
    if len({at for at, _ in points}) < 2:
        return Trend(float(samples[-1][1]), 0.0, 0.0)
    line = statistics.linear_regression([at for at, _ in points], [size for _, size in points])
    left = [size - (line.intercept + line.slope * at) for at, size in points]
    return Trend(line.intercept + line.slope * warm, line.slope * (end - warm), statistics.pstdev(left))
