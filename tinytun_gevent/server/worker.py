"""gunicorn's worker: one process with all four listeners and every tunnel.

Everything it needs is imported in the worker itself, after the fork, so a HUP to the master
is both reload and upgrade. `adopt` is what the launcher calls.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from types import FrameType
from typing import Any, Final, NoReturn

import gevent
from gevent.event import Event
from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from gunicorn.workers.ggevent import GeventWorker

from .. import __version__, garbage
from ..errors import UsageError
from ..registry import Record
from . import logs
from .app import Serving
from .config import ServerConfig, notice
from .given import overridden
from .handover import Handover, Predecessor, Successor, take_over
from .held import keep
from .required import require_files
from .verdict import Report

log = logging.getLogger("tinytun_gevent.server")

NOTIFY: Final = 1.0
"""Seconds between two signs of life to the master, which kills a worker after 30 without one."""


def adopt(shell: Worker) -> None:
    """Makes the launcher's bare worker a `TunnelWorker` and runs it; returns when it has stopped.

    The object stays the same because the arbiter's own code, further up the stack, goes on
    using it; only the class is chosen here, after the fork.
    """
    shell.__class__ = TunnelWorker
    shell.init_process()


class TunnelWorker(GeventWorker):  # type: ignore[misc]
    """Serves the four listening sockets until TERM (drains) or QUIT (leaves at once)."""

    _stopping: Event
    _serving: Serving
    _config: ServerConfig
    #: What the master is told when this worker serves.
    _report: Report
    #: Waits for the worker of the next reload; None where it could not be heard.
    _handover: Handover | None = None
    #: QUIT or INT was received: nothing is waited for.
    _hurried = False

    def load_wsgi(self) -> None:
        """Called last before `run`, when the sockets are gevent's and signals are ours."""
        try:
            self._report = self._read_configuration()
        except UsageError as error:
            self._refuse(error)
        logs.adopt(gevent.get_hub())
        self._stopping = Event()
        self._serving = Serving(self._config, self.sockets)

    def _read_configuration(self) -> Report:
        """Reads it, on a reload from the file as well; what the master holds stays. Raises UsageError."""
        flags, reloading = dict(getattr(self.app, "overrides", {})), getattr(self.app, "reloading", False)
        held: Mapping[str, str] = getattr(self.app, "held", {})
        state = flags.pop("STATE_DIR", None) if held else None
        given = ServerConfig.given(os.environ, flags, None if reloading else getattr(self.app, "file", None))
        config, restart = keep(ServerConfig.of(given), held)
        if reloading:
            require_files(config)
        self._config = config if state is None else replace(config, state_dir=state)
        logs.configure(config.log_level, config.log_format)
        for line in given.ignored:
            log.warning("%s", line)
        overrules = overridden(fields(ServerConfig), given) if reloading else []
        for line in overrules:
            log.warning("%s; it changes with a restart only", line)
        if restart:
            log.warning("unchanged until the server is restarted: %s", ", ".join(map(str.lower, restart)))
        return Report(True, "", restart, overrules, dict(given.file))

    def _refuse(self, error: UsageError) -> NoReturn:
        """Leaves: there is nothing that this worker could serve. On a reload the master says why."""
        ready = getattr(self.app, "ready", None) if hasattr(self.app, "held") else None
        if ready is not None and self.app.reloading:
            ready.tell(Report(reason=str(error)))
        else:
            self.log.error("no worker can serve: %s", error)
        sys.exit(Arbiter.WORKER_BOOT_ERROR)

    def run(self) -> None:
        """Serves; returns when everything has been drained."""
        predecessor = self._take_over()
        try:
            self._serving.start(predecessor, strict=getattr(self.app, "reloading", False))
        except UsageError as error:  # AUTH_FILE has been edited since the worker before has read it
            self._refuse(error)
        garbage.calm()
        self._offer()
        if predecessor is not None:
            self._welcome(predecessor)
        self._announce()
        if predecessor is None and (warning := notice(self._serving.config)):
            log.warning("%s", warning)
        while self.alive:
            self.notify()
            self._stopping.wait(NOTIFY)
        self._drain()

    def _take_over(self) -> Predecessor | None:
        """What the worker that serves until now leaves to this one, on a reload."""
        directory = self._serving.core.storage.directory
        return None if directory is None else take_over(directory, self.ppid)

    def _welcome(self, predecessor: Predecessor) -> None:
        """Takes the visitors of the worker before, which learns now that it may go."""
        try:
            predecessor.confirm()
        except OSError as error:
            log.warning("the previous worker ended before it could hand over its visitors: %s", error)
            return
        self._serving.follow(predecessor)

    def _offer(self) -> None:
        """Lets the worker of the next reload take over."""
        directory = self._serving.core.storage.directory
        if directory is not None:
            self._handover = Handover(directory, self.ppid, self)
            self._handover.start()

    def pause(self) -> tuple[list[Record], dict[int, int]]:
        """See `handover.Old`."""
        return self._serving.pause()

    def resume(self) -> None:
        self._serving.resume()

    def hand_over(self, successor: Successor) -> None:
        """Another worker serves: this one ends when its visitors have moved or left."""
        self._serving.hand_over(successor)
        self.alive = False
        self._stopping.set()

    def _announce(self) -> None:
        """Tells the log, and the master, that this worker serves."""
        config = self._serving.config
        log.info(
            "tinytun-server %s serves: clients on port %d, visitors on %d, TCP proxies on %d, metadata on %d",
            __version__,
            config.connection_port,
            config.proxy_port,
            config.tcp_proxy_port,
            config.metadata_port,
        )
        if config.tls_dir:
            log.info("visitors by https on %d", config.proxy_tls_port)
        ready = getattr(self.app, "ready", None)
        if ready is not None and hasattr(self.app, "held"):
            ready.tell(self._report)
        elif ready is not None:  # a master of an earlier version
            ready.tell()

    def _drain(self) -> None:
        """Stops accepting at once; running exchanges finish within their time, unless hurried."""
        if self._handover is not None and self._serving.core.successor is None:
            self._handover.stop()
        patience = 0.0 if self._hurried else self._patience()
        busy = self._serving.core.busy
        log.info("stopping: %s", f"{busy} exchanges may take {patience:g} s to finish" if busy else "idle")
        drain = gevent.spawn(self._serving.stop, time.monotonic() + patience)
        while not drain.ready():
            self.notify()
            self._stopping.clear()
            either: list[Any] = [drain, self._stopping]
            gevent.wait(either, timeout=NOTIFY, count=1)
            if self._hurried and patience:
                drain.kill(block=False)
                break
        self._serving.close_logs()
        log.info("stopped%s", "" if drain.ready() and drain.value else ": some exchanges were cut off")

    def _patience(self) -> float:
        """Seconds for what runs: more of them where another worker serves, and nobody waits for this one."""
        if self._serving.core.successor is None:
            return self._config.drain_timeout
        return self._config.reload_timeout

    def handle_usr1(self, sig: int, frame: FrameType | None) -> None:
        """USR1, which the master passes on: the log files have been moved away."""
        super().handle_usr1(sig, frame)
        serving = getattr(self, "_serving", None)
        if serving is not None:
            gevent.spawn(serving.reopen_logs)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """TERM: drain."""
        self.alive = False
        self._stopping.set()

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """QUIT and INT: leave without waiting for anybody."""
        self._hurried = True
        self.handle_exit(sig, frame)
