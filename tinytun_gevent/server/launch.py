"""The command ``tinytun-server``: gunicorn's master, and nothing that a worker should import anew.

The master checks the configuration, binds the ports (so a taken one is reported before
anything starts, and a worker's death refuses nobody), and keeps one worker alive. It imports
gunicorn, this module and what checks the configuration; no gevent. Everything else is
imported by each worker for itself, so ``kill -HUP`` runs new code without closing a port.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, Final

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker

from ..errors import UsageError
from ..lines import line_handler
from .addresses import listen_all
from .config import ServerConfig
from .given import CONFIG
from .held import hold
from .logs import formatter
from .required import require_files
from .statedir import default_directory, lock_directory
from .verdict import Ready, Record, Report

BOOT_TIMEOUT: Final = 10.0
"""Seconds for a new worker to serve; importing takes about half of one."""

AFTER_DRAIN: Final = 5.0
"""Seconds between the end of the worker's own drain and the master's SIGKILL."""

WORKER_TIMEOUT: Final = 30
"""Seconds without a sign of life after which a worker is taken for hung and replaced."""

_PR_SET_PDEATHSIG: Final = 1


def main(overrides: Mapping[str, str] | None = None) -> int:
    """Runs the server until a signal ends it.

    ``overrides`` are the flags that were given, by flag or by variable; see `given.collect`. Returns the exit
    code. Raises UsageError for a wrong value or a port that is taken, with nothing left bound.
    """
    flags = dict(overrides or {})
    if flags.get(CONFIG):
        flags[CONFIG] = os.path.abspath(flags[CONFIG])
    given = ServerConfig.given(os.environ, flags)
    config = ServerConfig.of(given)
    require_files(config)
    inherited = "GUNICORN_FD" in os.environ  # re-executed by USR2: the old master's sockets come along
    sockets = [] if inherited else listen_all(config.listeners(), config.backlog)
    raise_file_limit()
    ports = [sock.getsockname()[1] for sock in sockets]
    state = config.state_dir or default_directory(ports[1] if ports else config.connection_port)
    try:
        lock = None if inherited else lock_directory(state)
    except UsageError:
        for sock in sockets:
            sock.close()
        raise
    binds = [f"fd://{sock.detach()}" for sock in sockets]
    app = Application(settings(config, binds), {**flags, "STATE_DIR": state})
    app.file, app.held = given.file, hold(config)
    app.record.lock(lock, ports)
    master = os.getpid()
    try:
        TunnelArbiter(app).run()
    except SystemExit as stop:
        if os.getpid() != master:
            raise  # a worker: its exit code tells the master why
        return 1 if stop.code else 0
    finally:
        app.record.close()
    return 0


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


class Application(BaseApplication):  # type: ignore[misc]
    """What gunicorn wants to know of an application."""

    def __init__(self, options: Mapping[str, Any], overrides: Mapping[str, str]) -> None:
        self._options = options
        #: The flags and the state directory, for the worker to read its configuration from.
        self.overrides = overrides
        #: What the configuration file said when it was last good, for a worker that replaces one that died.
        self.file: Mapping[str, str] = {}
        #: See `held`.
        self.held: Mapping[str, str] = {}
        #: Where reloads are written down.
        self.record = Record(overrides.get("STATE_DIR", ""))
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
        self.app.record.begin()
        try:
            super().handle_hup()
        except _NotServingError as error:
            self.app.record.end(error.report)
            self.log.error("reload failed: %s; the old worker goes on", error.report.reason)
        finally:
            self._reloading = False

    def spawn_worker(self) -> Any:
        """Forks a worker and waits until it serves."""
        ready = self.app.ready = Ready()
        self.app.reloading = self._reloading
        pid = super().spawn_worker()  # the child never returns from this
        report = ready.wait(BOOT_TIMEOUT)
        if self._reloading:
            if not report.serves:
                self._give_up(pid)
                raise _NotServingError(report)
            self.app.file = report.file
            self.app.record.end(report)
        return pid

    def maybe_promote_master(self) -> None:
        """After USR2: takes over the state directory when the old master has left it."""
        super().maybe_promote_master()
        if self.master_pid == 0 and not self.app.record.is_locked:
            self.app.record.claim([listener.sock.getsockname()[1] for listener in self.LISTENERS])

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

    def __init__(self, report: Report) -> None:
        super().__init__(report.reason)
        self.report = report


class WorkerShell(Worker):  # type: ignore[misc]
    """All that the master knows of a worker; in the worker's process it becomes a `TunnelWorker`."""

    def init_process(self) -> None:
        die_with(self.ppid)
        forget_package()
        try:
            importlib.import_module("tinytun_gevent.server.worker").adopt(self)
        except Exception as error:
            ready = getattr(self.app, "ready", None)  # the plain gunicorn command has none
            if ready is not None:
                ready.tell(Report(reason=f"{type(error).__name__}: {error}".partition("\n")[0]))
            raise


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
