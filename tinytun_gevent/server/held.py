"""What a reload cannot change: the master holds it, or has told the system.

A new worker reads the configuration anew, keeps these values as they were, and says which of them wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Final

from ..errors import UsageError
from .config import ServerConfig

HELD: Final = (
    "CONNECTION_PORT",
    "PROXY_PORT",
    "TCP_PROXY_PORT",
    "METADATA_PORT",
    "PROXY_TLS_PORT",
    "BIND",
    "METADATA_BIND",
    "BACKLOG",
    "STATE_DIR",
    "LOG_FORMAT",
    "DRAIN_TIMEOUT",
)
"""Sockets; the lock and the file by which the server is found; how the master logs, and how long it waits for
a worker's end."""

SWITCHED: Final = "TLS_DIR"
"""May be another directory, but there is a socket only if there was one from the start."""


def hold(config: ServerConfig) -> dict[str, str]:
    """The values that cannot change while a server with ``config`` runs, by variable, as text."""
    texts = _texts(config)
    return {variable: texts[variable] for variable in (*HELD, SWITCHED)}


def keep(config: ServerConfig, held: Mapping[str, str]) -> tuple[ServerConfig, list[str]]:
    """``config`` with the ``held`` values, and the variables that have others now.

    Raises UsageError if what is new makes no sense with what stays.
    """
    texts = _texts(config)
    waiting = [
        variable
        for variable, old in held.items()
        if variable in texts
        and (bool(texts[variable]) != bool(old) if variable == SWITCHED else texts[variable] != old)
    ]
    if not waiting:
        return config, []
    names = {option.metadata["variable"]: option.name for option in fields(ServerConfig)}
    try:
        changed = replace(config, **{names[variable]: held[variable] for variable in waiting})  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(f"{', '.join(waiting)} cannot change without a restart, and so: {error}") from None
    return changed, waiting


def _texts(config: ServerConfig) -> dict[str, str]:
    return {
        option.metadata["variable"]: option.metadata["form"].show(getattr(config, option.name))
        for option in fields(config)
    }
