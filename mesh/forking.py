"""Forked children: which channels work in them, and how. ``docs/forking.md`` is the contract.

gRPC core's threads don't survive a fork. With core's fork support, core restarts them in the child. Without it, or
while grpc.aio is in use (its poller thread is always inside core, so core skips its fork handlers), a call in the child
hangs, crashes, or sends on the parent's connection. So a channel that can't work raises when it is used.

Rule 1: no core object of the parent is used or freed in the child.
Rule 2: all of this costs time at a fork, and none per call.
"""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc

from mesh import background

PAUSE_TIMEOUT = 1.0  # seconds that the background thread gets to end watches and leave gRPC before a fork
SETTLE_TIMEOUT = 0.2  # seconds that gRPC gets to shut down after its last channel was closed

generation = 0
"""The number of forks between the original process and this one."""

_REMEDY = (
    "Create channels after the fork (with gunicorn: in post_fork, or at a worker's first request), or close every "
    "{what} before it{setting}. See docs/forking.md."
)


class Channel(Protocol):
    """What this module needs from a channel."""

    blocking: bool
    closed: bool

    def forked(self) -> object:
        """In the child: drop all objects of the parent, and return them."""


class Pool(Protocol):
    """Work on the background loop that pauses for a fork."""

    closed: bool

    def pause(self) -> Coroutine[Any, Any, None]:
        """Stop using grpc.aio before the fork."""

    def resume(self) -> object:
        """Continue in the parent."""


class _State:
    """The state of this process's forks."""

    def __init__(self) -> None:
        self.channels: weakref.WeakSet[Channel] = weakref.WeakSet()  # those in use
        self.registered = False
        self.forking = threading.Lock()
        self.pools: weakref.WeakSet[Pool] = weakref.WeakSet()  # those that run on the background loop
        self.paused: list[Pool] = []
        self.release: Callable[[], object] = lambda: None
        self.inherited: list[object] = []  # the parent's objects, kept because of Rule 1
        self.core = self.aio = False  # whether the parent was using them at the fork
        self.refusal = self.aio_refusal = ""


_state = _State()


def register(channel: Channel, pool: Pool | None = None) -> None:
    """``channel`` is in use; ``pool``: its pool, if that runs on the background loop."""
    _state.channels.add(channel)
    _state.registered = True
    if pool is not None:
        _state.pools.add(pool)


def check(*, aio: bool) -> None:
    """Raise RuntimeError if core, or with ``aio`` grpc.aio, can't work in this process."""
    refusal = (_state.refusal or _state.aio_refusal) if aio else _state.refusal
    if refusal:
        raise RuntimeError(refusal)


def inherited() -> RuntimeError:
    """The error for an asyncio channel that was used in the parent."""
    return RuntimeError(_state.refusal or _state.aio_refusal or _refusal("this asyncio channel was", "asyncio channel"))


def core_in_use() -> bool:
    """Whether gRPC core runs in this process, whoever uses it. Recognized by its threads' names; if the system doesn't
    provide those: whether a channel of the mesh is in use."""
    try:
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    except OSError:
        return any(not channel.closed for channel in _state.channels)
    return any(name.startswith(("event_engine", "grpc_global_tim")) for name in names)


def aio_in_use() -> bool:
    """Whether grpc.aio is in use in this process, whoever uses it: then it has a thread."""
    return any("_poll_wrapper" in thread.name for thread in threading.enumerate())


def supported() -> bool:
    """Whether core's fork support is on. It is by default from grpcio 1.82 on; before that, core and its Python layer
    disagree about the default."""
    if "GRPC_ENABLE_FORK_SUPPORT" in os.environ:
        return bool(cygrpc.is_fork_support_enabled())
    return _restores()


def _restores() -> bool:
    """Whether core separates the connections of parent and child (grpc/grpc#41784)."""
    major, minor = grpc.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 82)


def _refusal(what: str, remedy: str, *, setting: bool = False) -> str:
    also = ", or set GRPC_ENABLE_FORK_SUPPORT=1 before the program starts" if setting else ""
    how = _REMEDY.format(what=remedy, setting=also)
    return f"process {os.getpid()} was forked from {os.getppid()} while {what} in use: calls can't work here. {how}"


def _before() -> None:
    _state.forking.acquire()  # one thread at a time forks; both sides release it
    _state.paused = [pool for pool in _state.pools if not pool.closed] if aio_in_use() else []
    background.pause([pool.pause for pool in _state.paused], PAUSE_TIMEOUT)
    if _state.registered:
        _settle()
    _state.release = background.hold(PAUSE_TIMEOUT)
    _state.core, _state.aio = core_in_use(), aio_in_use()


def _settle() -> None:
    """Wait until closed channels are gone: grpc.aio's thread and core shut down soon after the last one is freed."""
    still_open = [channel for channel in _state.channels if not channel.closed]

    def unsettled() -> bool:
        if not still_open and core_in_use():
            return True
        return all(channel.blocking for channel in still_open) and aio_in_use()

    if unsettled():
        gc.collect()
        end = time.monotonic() + SETTLE_TIMEOUT
        while unsettled() and time.monotonic() < end:
            time.sleep(0.001)


def _after_in_parent() -> None:
    _state.release()
    paused, _state.paused = _state.paused, []
    for pool in paused:
        background.call(pool.resume)
    _state.forking.release()


def _after_in_child() -> None:
    global generation
    generation += 1
    _state.forking = threading.Lock()
    _state.paused = []
    _state.inherited.append(background.forked())
    if _state.core and not supported():
        _state.refusal = _refusal("gRPC was", "channel", setting=True)
    elif _state.aio:
        _state.aio_refusal = _refusal("grpc.aio was", "asyncio channel and server")
        if not _restores():
            _state.refusal = _state.aio_refusal
    for channel in list(_state.channels):
        _state.inherited.append(channel.forked())
    _state.channels, _state.pools = weakref.WeakSet(), weakref.WeakSet()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
