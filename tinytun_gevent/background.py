"""One shared thread with a gevent hub of its own, for programs that are not patched.

`Tunnel` and `TunnelServer` are written for gevent: they live in a hub. A program that called
``gevent.monkey.patch_all()`` has one that runs whenever the program waits, so there they
simply run in place. In a plain threading program nobody would run that hub: there they
run in a daemon thread that is started on first use and shared by all of them::

    server = run_in_hub(start_server, config)     # blocks; returns or raises what the call does
    ...
    run_in_hub(server.stop)

Greenlets that a call spawns stay in the hub that ran it; objects made by one call may only be
touched by further calls, except for plain reads of their attributes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

import gevent
import gevent.event
import greenlet
from gevent import monkey
from gevent.threadpool import ThreadPool

P = ParamSpec("P")
T = TypeVar("T")


def runs_in_place() -> bool:
    """Whether `run_in_hub` runs a call directly, in the caller's hub.

    True when the process is monkey-patched, and for a caller that is itself a greenlet of
    some hub (so also for a call made from within `run_in_hub`).
    """
    return bool(monkey.is_module_patched("socket")) or greenlet.getcurrent().parent is not None


def run_in_hub(func: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call ``func`` where a gevent hub runs, wait for it, and return its result.

    Whatever it raises is raised here. Blocks the calling thread; the shared hub goes on
    serving everybody else, and any number of threads may call at once. When the wait itself
    is interrupted (KeyboardInterrupt), the call is killed with GreenletExit.
    """
    if runs_in_place():
        return func(*args, **kwargs)
    return _shared_thread().call(lambda: func(*args, **kwargs))


def in_a_thread(func: Callable[[], T], *, of_its_own: bool = False) -> T:
    """Call ``func`` in a thread of this hub, which goes on meanwhile; returns or raises what it does.

    The hub has a few threads. One ``of_its_own`` does not wait until others have done: names that nobody
    resolves hold theirs for half a minute.
    """
    pool = ThreadPool(1) if of_its_own else gevent.get_hub().threadpool
    try:
        outcome: tuple[T, Exception | None] = pool.apply(_outcome, (func,))
    finally:
        if of_its_own:
            pool.kill()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _outcome(func: Callable[[], T]) -> tuple[Any, Exception | None]:
    """What a call comes to: gevent's pool would print an error that its caller expects."""
    try:
        return func(), None
    except Exception as error:
        return None, error


class _HubThread:
    """The thread, its hub, and the calls on their way to it."""

    def __init__(self) -> None:
        #: Work for the hub, each item run in the hub itself and therefore never blocking.
        self._pending: deque[Callable[[], object]] = deque()
        #: Set once `_wake` exists.
        self._ready = threading.Event()
        #: The async watcher: its `send` is the one thing another thread may do to a hub's loop.
        self._wake: Any = None
        threading.Thread(target=self._run, name="tinytun-hub", daemon=True).start()
        self._ready.wait()

    def call(self, func: Callable[[], T]) -> T:
        """Run ``func`` in a new greenlet of the hub; blocks until it has ended."""
        future: Future[T] = Future()
        job: list[gevent.Greenlet[..., None]] = []  # a greenlet belongs to the thread that makes it
        self._post(lambda: job.append(gevent.spawn(_settle, future, func)))
        try:
            return future.result()
        except BaseException:
            if not future.done():  # the wait was interrupted, not the call
                self._post(lambda: job[0].kill(block=False))
            raise

    def _post(self, work: Callable[[], object]) -> None:
        self._pending.append(work)
        self._wake.send()

    def _run(self) -> None:
        self._wake = gevent.get_hub().loop.async_()
        self._wake.start(self._take)
        self._ready.set()
        gevent.event.Event().wait()  # for ever: a daemon thread ends with the process

    def _take(self) -> None:
        """Run all that is pending; one `send` may stand for several posts."""
        while self._pending:
            self._pending.popleft()()


def _settle(future: Future[T], func: Callable[[], T]) -> None:
    """Call ``func`` and put what it returns or raises into ``future``."""
    try:
        future.set_result(func())
    except BaseException as error:
        future.set_exception(error)


_lock = threading.Lock()
_thread: _HubThread | None = None


def _shared_thread() -> _HubThread:
    global _thread
    with _lock:
        if _thread is None:
            _thread = _HubThread()
        return _thread


def _forget_after_fork() -> None:
    """Threads do not survive a fork: the child starts its own when it needs one."""
    global _thread, _lock
    _thread, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
