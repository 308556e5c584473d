"""A clock that a test moves."""

from __future__ import annotations

import threading


class FakeClock:
    """A clock for code that takes one: calling it returns seconds, as ``time.monotonic`` does; only the test moves it.

    ::

        clock = FakeClock()
        cache = Cache(ttl=60, clock=clock)
        clock.advance(61)

    ``start``: where it begins. ``tick``: seconds that it moves by itself after each look, so that no two looks see the
    same instant. Where code takes a ``sleep``, give it ``clock.advance``: sleeping then takes no time. It may be used
    from several threads.
    """

    def __init__(self, start: float = 0.0, *, tick: float = 0.0) -> None:
        self._now = start
        self._tick = _forwards(tick)
        self._lock = threading.Lock()

    def __call__(self) -> float:
        """The time now, in seconds."""
        with self._lock:
            now = self._now
            self._now += self._tick
            return now

    def advance(self, seconds: float) -> None:
        """Let so much time pass. Raises ValueError for a negative time: a monotonic clock never goes back."""
        with self._lock:
            self._now += _forwards(seconds)

    def jump(self, to: float) -> None:
        """Set the clock, also backwards: what a wall clock does when it is corrected."""
        with self._lock:
            self._now = to

    def __repr__(self) -> str:
        return f"<FakeClock {self._now:g}>"


def _forwards(seconds: float) -> float:
    if not seconds >= 0:
        raise ValueError(f"expected seconds from 0, not {seconds!r}; jump() also goes back")
    return seconds
