"""Faults on demand: replicas that fail, delay or drop calls. Servers inject them before the servicer is called, so the
client under test is as it is in production."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import grpc

from mesh.testing.methods import Methods

Metadata = Sequence[tuple[str, str | bytes]]


class Kind(Enum):
    FAIL = "fail"
    DELAY = "delay"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Where:
    """Which calls have a fault: of ``method`` at ``replica`` (None: all), after so many others, and so many times."""

    method: str | None
    matches: Callable[[str], bool]
    replica: str | None
    after: int
    times: int | None

    def __post_init__(self) -> None:
        if self.after < 0 or (self.times is not None and self.times < 1):
            raise ValueError(f"expected after from 0 and times from 1, not after={self.after} and times={self.times}")

    def __str__(self) -> str:
        after = f", after {self.after}" if self.after else ""
        return f"{self.method or 'all methods'} at {self.replica or 'all replicas'}{after}"


class Fault:
    """A fault that ``Faults`` made, in force until it is removed or used up::

        with faults.fail(grpc.StatusCode.UNAVAILABLE, times=2) as fault:
            ...
        assert fault.injected == 2

    ``injected``: how many calls have had it. Leaving the block removes it.
    """

    def __init__(
        self,
        kind: Kind,
        where: Where,
        *,
        code: grpc.StatusCode = grpc.StatusCode.OK,
        details: str = "",
        trailing_metadata: Metadata = (),
        seconds: float | None = None,
    ) -> None:
        self.kind = kind
        self.code = code
        self.details = details
        self.trailing_metadata = tuple(trailing_metadata)
        self.seconds = seconds
        self.injected = 0
        self._where = where
        self._seen = 0
        self._removed = False
        self._lock = threading.Lock()
        self._held: list[Callable[[], object]] = []

    def remove(self) -> None:
        """End the fault: delayed calls go on at once, dropped calls end UNAVAILABLE, and no other call has it."""
        with self._lock:
            self._removed = True
            held, self._held = self._held, []
        for release in held:
            release()

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        effect = {Kind.FAIL: f" {self.code.name}", Kind.DELAY: f" {self.seconds} s", Kind.DROP: ""}[self.kind]
        limit = "" if self._where.times is None else f" of {self._where.times}"
        removed = ", removed" if self._removed else ""
        return f"<Fault {self.kind.value}{effect}: {self._where}, injected {self.injected}{limit}{removed}>"

    @property
    def removed(self) -> bool:
        """Whether it was removed."""
        return self._removed

    # -- for the handlers that inject it

    def take(self, method: str, replica: str) -> bool:
        """Whether a call of ``method`` at ``replica`` has this fault; counts it."""
        where = self._where
        if not where.matches(method) or where.replica not in (None, replica):
            return False
        with self._lock:
            self._seen += 1
            if self._removed or self._seen <= where.after or self.injected == where.times:
                return False
            self.injected += 1
            return True

    def hold(self, release: Callable[[], object]) -> None:
        """Have ``release`` called, from any thread, when the fault is removed."""
        with self._lock:
            if not self._removed:
                self._held.append(release)
                return
        release()

    def let_go(self, release: Callable[[], object]) -> None:
        """The call that ``release`` is for is no longer held."""
        with self._lock:
            if release in self._held:
                self._held.remove(release)


class Faults:
    """The faults of a test mesh. Iterating over it gives those that were not removed.

    Each method that makes one takes ``method`` ("Method", or "package.Service/Method"; every method without one),
    ``replica`` (every replica without one), ``after`` (so many matching calls pass first) and ``times`` (so many calls
    have it; all without it). The third call alone: ``after=2, times=1``. Where several match a call, it has all of them
    in the order in which they were made, up to the first that ends it.

    Raises ValueError for a method that nobody serves.
    """

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._faults: list[Fault] = []

    def fail(
        self,
        code: grpc.StatusCode,
        details: str = "injected fault",
        *,
        trailing_metadata: Metadata = (),
        method: str | None = None,
        replica: object = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls end with this status, and no servicer sees them."""
        if code is grpc.StatusCode.OK:
            raise ValueError("a call can't fail with OK")
        where = self._where(method, replica, after, times)
        return self._add(Fault(Kind.FAIL, where, code=code, details=details, trailing_metadata=trailing_metadata))

    def delay(
        self,
        seconds: float,
        *,
        method: str | None = None,
        replica: object = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls wait for so long before the servicer is called. Those that their clients give up don't reach it."""
        if not 0 <= seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"expected seconds from 0, not {seconds!r}")
        return self._add(Fault(Kind.DELAY, self._where(method, replica, after, times), seconds=seconds))

    def drop(
        self, *, method: str | None = None, replica: object = None, after: int = 0, times: int | None = None
    ) -> Fault:
        """Calls get no answer: they last until their clients give them up, or the fault is removed."""
        return self._add(Fault(Kind.DROP, self._where(method, replica, after, times)))

    def clear(self) -> None:
        """Remove all faults."""
        for fault in self:
            fault.remove()

    def __iter__(self) -> Iterator[Fault]:
        return (fault for fault in tuple(self._faults) if not fault.removed)

    def __repr__(self) -> str:
        return f"<Faults {', '.join(map(repr, self)) or 'none'}>"

    def taken(self, method: str, replica: str) -> Iterator[Fault]:
        """The faults that a call has, one after the other; for the handlers that inject them."""
        return (fault for fault in self if fault.take(method, replica))

    def _where(self, method: str | None, replica: object, after: int, times: int | None) -> Where:
        return Where(method, self._methods.matching(method), None if replica is None else str(replica), after, times)

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault
