"""The files without which a server does not start, and a reload fails."""

from __future__ import annotations

import os

from ..errors import UsageError
from .config import ServerConfig


def require_files(config: ServerConfig) -> None:
    """Raises UsageError if the certificates' directory, or the file of tokens, cannot be read. Blocks."""
    if config.tls_dir and not os.access(config.tls_dir, os.R_OK | os.X_OK):
        raise UsageError(f"TLS_DIR={config.tls_dir}: allowed: a directory that this user may read")
    if config.auth_file:
        from . import tokens  # what reads the file is for this and the worker only

        tokens.read(config)
