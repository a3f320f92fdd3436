"""A self-hosted tunnel: one command puts a local web server or TCP port on the internet.

The public names, each imported when it is first used, so that importing the package costs
nothing and patches nothing::

    from tinytun_gevent import TunnelServer, Tunnel

    with TunnelServer(connection_port=0, proxy_port=0, base_domains=("localhost",)) as server:
        with Tunnel("127.0.0.1:3000", server=server.url) as tunnel:
            print(tunnel.url)

``TunnelServer`` and ``Tunnel`` work in a program that gevent has monkey-patched and in one
that it has not; ``TunnelError`` is the base of everything they raise on purpose.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .client.config import ClientConfig
    from .client.tunnel import Tunnel
    from .errors import (
        NameTakenError,
        RefusedError,
        TryLaterError,
        TunnelError,
        UnreachableError,
        UsageError,
    )
    from .server.app import TunnelServer
    from .server.config import ServerConfig

__version__ = "0.1.0"

__all__ = [
    "ClientConfig",
    "NameTakenError",
    "RefusedError",
    "ServerConfig",
    "TryLaterError",
    "Tunnel",
    "TunnelError",
    "TunnelServer",
    "UnreachableError",
    "UsageError",
    "__version__",
]

_HOMES: Final = {
    "ClientConfig": ".client.config",
    "NameTakenError": ".errors",
    "RefusedError": ".errors",
    "ServerConfig": ".server.config",
    "TryLaterError": ".errors",
    "Tunnel": ".client.tunnel",
    "TunnelError": ".errors",
    "TunnelServer": ".server.app",
    "UnreachableError": ".errors",
    "UsageError": ".errors",
}
"""Which module defines each public name."""


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
