"""What is done to every contender, and what is counted meanwhile.

To add one, write a subclass of `Scenario`, put it into `SCENARIOS`, and its measures into `measures.py`.
"""

from __future__ import annotations

from .base import LongPath, Processes, Scenario, Stage
from .bulk import BesideStalled, Bulk, ManyDownloads
from .far import Burst, FarBulk, FarMixed, FarRequest, FirstByte
from .memory import IdleVisitors, ManyTunnels
from .messages import Chunks, WebSockets
from .mixed import Mixed
from .requests import GrowingCrowd, KeptRequests, NewConnections, WholeAnswers
from .start import StartUp, Version

SCENARIOS: tuple[Scenario, ...] = (
    Bulk(upload=False),
    Bulk(upload=True),
    ManyDownloads(),
    BesideStalled(),
    KeptRequests(1),
    WholeAnswers(),
    KeptRequests(32),
    KeptRequests(256),
    NewConnections(),
    GrowingCrowd(10),
    GrowingCrowd(100),
    GrowingCrowd(1000),
    WebSockets(1),
    WebSockets(100),
    Chunks(),
    Mixed(),
    IdleVisitors(2000),
    IdleVisitors(10000),
    ManyTunnels(),
    StartUp(),
    Version(),
    FirstByte(),
    Burst(),
    FarRequest(),
    FarBulk("50ms", 1),
    FarBulk("50ms", 8),
    FarBulk("50ms-4MiB", 1),
    FarBulk("50ms-4MiB", 8),
    FarBulk("100ms-1Gbit", 1),
    FarBulk("100ms-1Gbit", 8),
    FarMixed(),
)

#: Measured only when asked for by name: the other combinations of delay and limit.
EXTRA: tuple[Scenario, ...] = (
    FarBulk("50ms-1Gbit", 1),
    FarBulk("50ms-1Gbit", 8),
    FarBulk("100ms", 1),
    FarBulk("100ms", 8),
)

__all__ = ["EXTRA", "SCENARIOS", "LongPath", "Processes", "Scenario", "Stage"]
