"""A thread for users' code: their callbacks and serializers.

The background thread (``background.py``) serves all sync channels and never runs it: code that blocks there would stop
discovery, timers and every other channel.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

_LOG = logging.getLogger("mesh.channel")

IDLE = 1.0
"""Seconds without work after which the thread ends."""


class Worker:
    """Runs functions in order on one daemon thread, which starts with the first and ends when idle.

    Safe from any thread, but not from a finalizer: ``run`` takes a lock.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._work: deque[Callable[[], object]] = deque()
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, work: Callable[[], object]) -> None:
        """Run ``work`` soon. Exceptions are logged."""
        with self._condition:
            self._work.append(work)
            if self._thread is not None and self._thread.is_alive():
                self._condition.notify()
                return
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is shutting down
                self._thread = None

    def close(self) -> None:
        """End the thread as soon as it has no work, without waiting for more."""
        with self._condition:
            self._closed = True
            self._condition.notify()

    def for_child(self) -> Worker:
        """A new worker for a forked child, where the lock may be held by a thread that doesn't exist."""
        return Worker(self._name)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._work or self._closed, IDLE)
                if not self._work:
                    self._thread = None
                    return
                work = self._work.popleft()
            try:
                work()
            except BaseException:  # even SystemExit: the thread serves other calls
                _LOG.exception("Exception in callback %r", work)
            del work  # not kept alive while idle

    def __repr__(self) -> str:
        return f"<Worker {self._name} {len(self._work)} waiting>"
