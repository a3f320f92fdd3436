"""``tinytun-server --check``: whether the server could run, and what would surprise its operator."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import UsageError
from .addresses import listen_all
from .config import ServerConfig, notice
from .required import require_files


def run(overrides: Mapping[str, str]) -> int:
    """Prints what was found; returns the exit code. Raises UsageError."""
    config = ServerConfig.from_environ(os.environ, overrides)
    require_files(config)
    for sock in listen_all(config.listeners(), config.backlog):
        sock.close()
    certificates = report(config) if config.tls_dir else []
    verdict = "the configuration is valid, its ports are free"
    print("\n".join(filter(None, (config.summary(), *certificates, verdict))))
    if warning := notice(config):
        print(warning)
    return 0


def report(config: ServerConfig) -> list[str]:
    """What there is to say of the certificates. Raises UsageError."""
    from . import pem  # not for those who have no certificates

    try:
        return pem.report(config.tls_dir, config.base_domains)
    except OSError as error:
        raise UsageError(f"TLS_DIR={config.tls_dir}: {error.strerror or error}") from None
