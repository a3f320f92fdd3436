"""Names that wait for their owners: kept beyond the process, given up when their time is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

import gevent
from gevent.event import Event

from ..rare import Rare
from ..registry import Record, Registry, Tunnel
from .storage import Storage

log = logging.getLogger("tinytun_gevent.server")
rare = Rare(log)

PAUSE: Final = 1.0
"""Seconds between two writes of the file at least, however fast tunnels come and go."""

COME_BACK: Final = 10.0
"""Seconds at least for the clients of a process that still ran, whose visitors wait here: they come within
one or two, also where LEASE_SECONDS is 0."""

LAST_WRITE: Final = 2.0
"""Seconds for a write that is under way when the server stops; a disk that hangs is not waited for."""


class Leases:
    """Keeps the lease file true to the registry, and ends the leases that nobody took up.

    It is watched by the server's clock.
    """

    def __init__(self, registry: Registry, storage: Storage, give_up: Callable[[Tunnel], None]) -> None:
        """``give_up`` gets each tunnel whose lease is over; it releases it and must not block."""
        self._registry = registry
        self._storage = storage
        self._give_up = give_up
        self._dirty = Event()
        self._stopping = Event()
        self._greenlet: gevent.Greenlet[[], None] | None = None
        self._failing = False

    def start(self, records: list[Record] | None = None) -> list[Tunnel]:
        """Leases the names of ``records`` (None: those in the file), and follows the registry from now on."""
        now = time.monotonic()
        known = self._storage.read_leases() if records is None else records
        at_least = 0.0 if records is None else COME_BACK
        restored = [tunnel for record in known if (tunnel := self._registry.restore(record, now, at_least))]
        self._registry.on_change = self._dirty.set
        if self._storage.directory is not None:
            if records is not None:
                self._dirty.set()
            self._greenlet = gevent.spawn(self._keep)
        return restored

    def freeze(self) -> None:
        """Writes the names as they are now, and none that come or go later; blocks while it writes.

        For a server that stops: its clients say goodbye then, and are to have their names again.
        """
        greenlet = self._greenlet
        self.abandon()
        if greenlet is not None:
            greenlet.join(LAST_WRITE)  # two at a time could leave either's, or a mixture
            if greenlet.ready():
                self._write(self._registry.lasting())

    def abandon(self) -> None:
        """Leaves the file to another process, which has taken over the names. Never blocks."""
        self._registry.on_change = self._greenlet = None
        self._stopping.set()
        self._dirty.set()

    def tick(self, now: float) -> None:
        """Ends the leases that are over at monotonic time ``now``."""
        for tunnel in self._registry.expired(now):
            rare.info("tunnel %s: its client did not come back, its name is free", tunnel.name)
            self._give_up(tunnel)

    def _keep(self) -> None:
        """The greenlet that writes the file after each change, at most once a :data:`PAUSE`."""
        while True:
            self._dirty.wait()
            if self._stopping.is_set():
                return
            self._dirty.clear()
            records = self._registry.lasting()
            gevent.get_hub().threadpool.apply(self._write, (records,))
            self._stopping.wait(PAUSE)

    def _write(self, records: list[Record]) -> None:
        """Blocks its thread. A disk that is full, or gone, is told once, and again when it is back."""
        try:
            self._storage.write_leases(records)
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written: %s; names opened from now on may not outlive a restart",
                    self._storage.directory,
                    error.strerror or error,
                )
            self._failing = True
            self._dirty.set()
            return
        if self._failing:
            log.warning("%s can be written again", self._storage.directory)
        self._failing = False
