"""Who is measured.

To add one, write a subclass of `Contender` in a file of its own and put it into `CONTENDERS`.
"""

from __future__ import annotations

from .anchors import ChainedHaproxy, Direct
from .base import Contender, Ground, Role, Running, Server, Via, wait_until_open
from .bore import Bore
from .chisel import Chisel
from .frp import Frp
from .ours import Tinytun
from .rathole import Rathole
from .ssh import SshReverse

OURS = "tinytun http"
OURS_TCP = "tinytun tcp"
DIRECT = "direct"
HAPROXY = "haproxy x2"

CONTENDERS: tuple[Contender, ...] = (
    Tinytun("http"),
    Tinytun("tcp"),
    Tinytun("http", limits=True),
    Tinytun("tcp", limits=True),
    Bore(),
    Rathole(),
    SshReverse(),
    Frp("tcp"),
    Frp("http"),
    Chisel(),
    ChainedHaproxy(),
    Direct(),
)

__all__ = [
    "CONTENDERS",
    "DIRECT",
    "HAPROXY",
    "OURS",
    "OURS_TCP",
    "Contender",
    "Ground",
    "Role",
    "Running",
    "Server",
    "Via",
    "wait_until_open",
]
