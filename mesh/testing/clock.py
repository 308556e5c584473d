"""A clock that a test controls."""

from __future__ import annotations

import threading


class FakeClock:
    """A clock for code that takes one: calling it returns seconds, as ``time.monotonic`` does; only the test moves it.

    ::

        clock = FakeClock()
        cache = Cache(ttl=60, clock=clock)
        clock.advance(61)

    ``start``: the first time it returns. ``tick``: seconds by which each call advances it, so that no two calls return
    the same time. Where code takes a ``sleep``, give it ``clock.advance``: sleeping then takes no time. It may be used
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
        """Advance the clock. Raises ValueError for negative seconds: a monotonic clock never goes back."""
        with self._lock:
            self._now += _forwards(seconds)

    def jump(self, to: float) -> None:
        """Set the clock, forwards or backwards, as when a wall clock is corrected."""
        with self._lock:
            self._now = to

    def __repr__(self) -> str:
        return f"<FakeClock {self._now:g}>"


def _forwards(seconds: float) -> float:
    if not seconds >= 0:
        raise ValueError(f"expected 0 seconds or more, got {seconds!r}; to go back, use jump()")
    return seconds
