"""The command ``tinytun-server``: gunicorn's master, and nothing that a worker should import anew.

The master checks the configuration, binds the ports (so a taken one is reported before
anything starts, and a worker's death refuses nobody), and keeps one worker alive. It imports
gunicorn, this module and what checks the configuration; no gevent. Everything else is
imported by each worker for itself, so ``kill -HUP`` runs new code without closing a port.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker

from .. import files
from ..errors import UsageError
from ..lines import line_handler
from .addresses import listen_all
from .config import ServerConfig, notice
from .logs import formatter

BOOT_TIMEOUT: Final = 10.0
"""Seconds for a new worker to serve; importing takes about half of one."""

AFTER_DRAIN: Final = 5.0
"""Seconds between the end of the worker's own drain and the master's SIGKILL."""

WORKER_TIMEOUT: Final = 30
"""Seconds without a sign of life after which a worker is taken for hung and replaced."""

_PR_SET_PDEATHSIG: Final = 1


def main(overrides: Mapping[str, str] | None = None, check: bool = False) -> int:
    """Runs the server until a signal ends it; with ``check`` only says whether it could run.

    ``overrides`` are the flags that were given, by flag or by variable; they win over the
    environment. Returns the exit code. Raises UsageError for a wrong value or a port that
    is taken, with nothing left bound.
    """
    config = ServerConfig.from_environ(os.environ, overrides)
    if config.tls_dir and not os.access(config.tls_dir, os.R_OK | os.X_OK):
        raise UsageError(f"TLS_DIR={config.tls_dir}: allowed: a directory that this user may read")
    if config.auth_file:
        from . import tokens  # what reads the file is for this and the worker only

        tokens.read(config)
    inherited = "GUNICORN_FD" in os.environ  # re-executed by USR2: the old master's sockets come along
    sockets = [] if inherited else listen_all(config.listeners(), config.backlog)
    if check:
        for sock in sockets:
            sock.close()
        certificates = report(config) if config.tls_dir else []
        verdict = "the configuration is valid, its ports are free"
        print("\n".join(filter(None, (config.summary(), *certificates, verdict))))
        if warning := notice(config):
            print(warning)
        return 0
    raise_file_limit()
    port = sockets[1].getsockname()[1] if sockets else config.connection_port
    state = config.state_dir or default_directory(port)
    try:
        lock = None if inherited else lock_directory(state)
    except UsageError:
        for sock in sockets:
            sock.close()
        raise
    binds = [f"fd://{sock.detach()}" for sock in sockets]
    master = os.getpid()
    try:
        TunnelArbiter(Application(settings(config, binds), {**(overrides or {}), "STATE_DIR": state})).run()
    except SystemExit as stop:
        if os.getpid() != master:
            raise  # a worker: its exit code tells the master why
        return 1 if stop.code else 0
    finally:
        if lock is not None:
            os.close(lock)
    return 0


def report(config: ServerConfig) -> list[str]:
    """What ``--check`` says of the certificates. Raises UsageError."""
    from . import pem  # what it needs is for ``--check`` and the worker only

    try:
        return pem.report(config.tls_dir, config.base_domains)
    except OSError as error:
        raise UsageError(f"TLS_DIR={config.tls_dir}: {error.strerror or error}") from None


def default_directory(port: int) -> str:
    """Where a server keeps its state that was not told: for each connection port a place of its own.

    systemd's if it offers one, the user's own, and for root, or who has no home, the system's.
    """
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    state = os.environ.get("XDG_STATE_HOME", "")
    home = os.path.expanduser("~")
    if given:
        base = given
    elif os.geteuid() and (os.path.isabs(state) or os.path.isabs(home)):
        base = os.path.join(state if os.path.isabs(state) else f"{home}/.local/state", "tinytun-server")
    else:
        base = "/var/lib/tinytun-server"
    return os.path.join(base, str(port))


def lock_directory(path: str) -> int | None:
    """Keeps other servers out of a state directory; the descriptor that does, None if it cannot be used.

    Two would take each other's names for their own. Raises UsageError if one is there.
    """
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        files.check_directory(path)
        lock = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None  # the worker says so
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"STATE_DIR={path}: another tinytun-server uses it; each needs its own") from None
    return lock


def settings(config: ServerConfig, binds: list[str]) -> dict[str, Any]:
    """gunicorn's settings for a server, each with its reason; ``binds`` are its addresses."""
    return {
        "bind": binds,
        "worker_class": WorkerShell,
        "workers": 1,  # tunnels live in one process's memory
        "max_requests": 0,  # a worker that restarts would drop them
        "worker_connections": config.max_connections,
        "backlog": config.backlog,
        "timeout": WORKER_TIMEOUT,
        "graceful_timeout": round(config.drain_timeout + AFTER_DRAIN),
        "control_socket_disable": True,  # it would be a file in the home directory
        "worker_tmp_dir": heartbeat_directory(),
        "logger_class": JsonLogger if config.log_format == "json" else CalmLogger,
        "loglevel": {"off": "critical", "warn": "warning", "trace": "debug"}.get(
            config.log_level, config.log_level
        ),
        "proc_name": "tinytun-server",
    }


def heartbeat_directory() -> str | None:
    """Where the worker's sign of life is kept: in memory if there is such a place.

    On a disk, an overloaded one could make a healthy worker look hung.
    """
    shared = "/dev/shm"  # nosec B108 # no name in it is predictable
    return shared if os.path.isdir(shared) and os.access(shared, os.W_OK | os.X_OK) else None


def raise_file_limit() -> None:
    """Allows as many open files as the system lets us: each visitor is one or two."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            pass  # macOS says "unlimited" and then refuses it


class Ready:
    """How a new worker tells the master that it serves: one byte through a pipe."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def tell(self) -> None:
        """In the worker: it serves now. Later calls do nothing."""
        if self._write >= 0:
            os.write(self._write, b"1")
            self._close_write()

    def wait(self, timeout: float) -> bool:
        """In the master: whether the worker came to serve, before it died or ``timeout`` seconds passed."""
        self._close_write()
        readable, _, _ = select.select([self._read], [], [], timeout)
        answer = os.read(self._read, 1) if readable else b""
        os.close(self._read)
        return answer == b"1"

    def _close_write(self) -> None:
        os.close(self._write)
        self._write = -1


class Application(BaseApplication):  # type: ignore[misc]
    """What gunicorn wants to know of an application."""

    def __init__(self, options: Mapping[str, Any], overrides: Mapping[str, str]) -> None:
        self._options = options
        #: The flags, for the worker to read its configuration from.
        self.overrides = overrides
        #: Set while a worker is being started.
        self.ready: Ready | None = None
        #: Whether that is to replace one that serves, also if it learns nothing from it.
        self.reloading = False
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> None:
        """There is no WSGI application in the master: the worker makes its own."""


class TunnelArbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's master, which on HUP lets the old worker go only when the new one serves."""

    _reloading = False

    def handle_hup(self) -> None:
        """Reload, and upgrade: if the new worker does not come to serve, the old one stays."""
        self._reloading = True
        self.log.error_log.info("reload: starting a new worker")
        try:
            super().handle_hup()
        except _NotServingError:
            self.log.error("reload failed: the new worker did not come up; the old one goes on")
        finally:
            self._reloading = False

    def spawn_worker(self) -> Any:
        """Forks a worker and waits until it serves."""
        ready = self.app.ready = Ready()
        self.app.reloading = self._reloading
        pid = super().spawn_worker()  # the child never returns from this
        if not ready.wait(BOOT_TIMEOUT) and self._reloading:
            self._give_up(pid)
            raise _NotServingError
        return pid

    def _give_up(self, pid: int) -> None:
        """Ends a worker that does not serve, without the arbiter's conclusion that none ever will."""
        worker = self.WORKERS.pop(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        worker.tmp.close()

    def handle_ttin(self) -> None:
        """One more worker would be a second server that knows none of the first one's tunnels."""
        self.log.warning("the number of workers stays 1")

    handle_ttou = handle_ttin


class _NotServingError(Exception):
    """The worker of a reload died or took too long."""


class WorkerShell(Worker):  # type: ignore[misc]
    """All that the master knows of a worker; in the worker's process it becomes a `TunnelWorker`."""

    def init_process(self) -> None:
        die_with(self.ppid)
        forget_package()
        importlib.import_module("tinytun_gevent.server.worker").adopt(self)


def die_with(parent: int) -> None:
    """Makes this process end at once when its parent does, however that ends.

    An orphan would keep the ports from the next master. Without Linux, gunicorn's worker
    notices within a second.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0 and os.getppid() != parent:
        os._exit(0)  # it died before the call


def forget_package() -> None:
    """Makes the next import of the package read its files anew; this module stays as it is."""
    package = __name__.partition(".")[0]
    for name in list(sys.modules):
        if (name == package or name.startswith(package + ".")) and name != __name__:
            del sys.modules[name]
    importlib.invalidate_caches()


class CalmLogger(Logger):  # type: ignore[misc]
    """gunicorn's own comings and goings are for debugging; what goes wrong is for everybody."""

    log_format = "text"

    def info(self, msg: object, *args: object, **kwargs: Any) -> None:
        self.debug(msg, *args, **kwargs)

    def _set_handler(self, log: logging.Logger, output: str | None, fmt: Any, stream: Any = None) -> None:
        """Gives gunicorn's own log our form; what it would write to standard error itself, we do."""
        super()._set_handler(log, output, fmt, stream)
        plain = self._get_gunicorn_handler(log)
        if log is not self.error_log or plain is None:
            return
        plain.setFormatter(formatter(self.log_format))
        if output == "-":
            log.removeHandler(plain)
            handler: Any = line_handler(stream)
            handler.setFormatter(plain.formatter)
            handler._gunicorn = True  # so that a reload replaces it
            log.addHandler(handler)


class JsonLogger(CalmLogger):
    """The same where LOG_FORMAT is json."""

    log_format = "json"
