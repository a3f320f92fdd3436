"""Who is measured.

To add one, write a subclass of `Contender` in a file of its own and put it into `CONTENDERS`.
"""

from __future__ import annotations

from .anchors import ChainedHaproxy, Direct
from .base import Contender, Ground, Role, Running, Server, Via, wait_until_open
from .bore import Bore
from .chisel import Chisel
from .frp import Frp
from .ours import Tinytun, TinytunTls
from .rathole import Rathole, RatholeTls
from .ssh import SshReverse

OURS = "tinytun http"
OURS_TCP = "tinytun tcp"
OURS_TLS = "tinytun tls"
OURS_HTTPS = "tinytun https"
OURS_BOTH = "tinytun tls+https"
DIRECT = "direct"
HAPROXY = "haproxy x2"

CONTENDERS: tuple[Contender, ...] = (
    Tinytun("http"),
    Tinytun("tcp"),
    TinytunTls(OURS_TLS, session=True, visitors=False),
    TinytunTls(OURS_HTTPS, session=False, visitors=True),
    TinytunTls(OURS_BOTH, session=True, visitors=True),
    Tinytun("http", limits=True),
    Tinytun("tcp", limits=True),
    Bore(),
    Rathole(),
    RatholeTls(),
    SshReverse(),
    Frp("tcp"),
    Frp("tcp", tls=True),
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
    "OURS_BOTH",
    "OURS_HTTPS",
    "OURS_TCP",
    "OURS_TLS",
    "Contender",
    "Ground",
    "Role",
    "Running",
    "Server",
    "Via",
    "wait_until_open",
]
