"""Rate-limited logging: at most one line a second of each kind, so that a burst of events makes few lines.

A line that comes too soon is held back. When the second is over, a short-lived thread logs the latest line of the kind,
with the number of lines left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass

PERIOD = 1.0
"""The time between two lines of a kind. Seconds."""

Destination = tuple[logging.Logger, int]
"""A logger and a level."""


@dataclass(slots=True)
class _Kind:
    logged_at: float
    held: str = ""
    to: Destination | None = None
    left_out: int = 0


class Limit:
    """Which lines to log at ``now`` (monotonic seconds). No IO; not thread-safe."""

    def __init__(self, period: float = PERIOD) -> None:
        self._period = period
        self._kinds: dict[str, _Kind] = {}
        self.holding = False

    def take(self, kind: str, now: float, to: Destination, text: str) -> str:
        """The text to log now; empty if it is held back."""
        known = self._kinds.get(kind)
        if known is not None and now < known.logged_at + self._period:
            known.left_out += bool(known.held)
            known.held, known.to = text, to
            self.holding = True
            return ""
        left_out = 0 if known is None else known.left_out + bool(known.held)
        self._kinds[kind] = _Kind(now)
        return _with(text, left_out)

    def due(self, now: float) -> list[tuple[Destination, str]]:
        """The held-back lines whose time has come."""
        lines = []
        self.holding = False
        for kind, known in self._kinds.items():
            if known.to is None:
                continue
            if now < known.logged_at + self._period:
                self.holding = True
                continue
            lines.append((known.to, _with(known.held, known.left_out)))
            self._kinds[kind] = _Kind(now)
        return lines


def _with(text: str, left_out: int) -> str:
    return f"{text} ({left_out} more such line{'s' if left_out > 1 else ''} left out)" if left_out else text


_lock = threading.Lock()
_flushing = False  # a thread is flushing
_limit = Limit()


def info(log: logging.Logger, kind: str, message: str, *arguments: object) -> None:
    """Log a line of ``kind`` at INFO, now or within about a second."""
    _log((log, logging.INFO), kind, message, *arguments)


def warning(log: logging.Logger, kind: str, message: str, *arguments: object) -> None:
    """Log a line of ``kind`` at WARNING, now or within about a second."""
    _log((log, logging.WARNING), kind, message, *arguments)


def _log(to: Destination, kind: str, message: str, *arguments: object) -> None:
    global _flushing
    log, level = to
    if log.isEnabledFor(level):
        text = message % arguments if arguments else message
        with _lock:
            text = _limit.take(kind, time.monotonic(), to, text)
            start = _limit.holding and not _flushing
            _flushing |= start
        if text:
            log.log(level, "%s", text)
        if start:
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                threading.Thread(target=_flush, name="mesh-lines", daemon=True).start()


def _flush() -> None:
    """Log the held-back lines, each when its time has come, until there are none."""
    global _flushing
    done = False
    while not done:
        time.sleep(PERIOD / 10)
        with _lock:
            lines = _limit.due(time.monotonic())
            _flushing = _limit.holding
            done = not _flushing
        for (log, level), text in lines:
            log.log(level, "%s", text)


def _forked() -> None:
    global _lock, _flushing
    _lock, _flushing = threading.Lock(), False


os.register_at_fork(after_in_child=_forked)
