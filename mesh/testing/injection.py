"""The faults that replicas inject: which calls they affect, and which calls they currently hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import grpc

Metadata = Sequence[tuple[str, str | bytes]]


class Kind(Enum):
    FAIL = "fail"
    DELAY = "delay"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Where:
    """Which calls a fault affects: ``times`` calls (None: all) of ``method`` at ``replica`` (None: all), after
    the first ``after``."""

    method: str | None
    matches: Callable[[str], bool]
    replica: str | None
    after: int
    times: int | None

    def __post_init__(self) -> None:
        if not all(type(number) is int for number in (self.after, self.times or 0)):
            raise TypeError(f"expected whole numbers, got after={self.after!r} and times={self.times!r}")
        if self.after < 0 or (self.times is not None and self.times < 1):
            raise ValueError(f"expected after >= 0 and times >= 1, got after={self.after} and times={self.times}")

    def __str__(self) -> str:
        after = f", after {self.after}" if self.after else ""
        return f"{self.method or 'all methods'} at {self.replica or 'all replicas'}{after}"


@dataclass(frozen=True, slots=True)
class Effect:
    """What happens to a call: FAIL ends it with ``code``, ``details`` and ``metadata``, DELAY makes it wait for
    ``seconds``, DROP forever."""

    kind: Kind
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    metadata: Metadata = ()
    seconds: float | None = None

    def __str__(self) -> str:
        if self.kind is Kind.FAIL:
            return f"fail {self.code.name}"
        return "drop" if self.seconds is None else f"delay {self.seconds:g} s"


class Injection:
    """An effect on the calls of ``where``. Safe from any thread. ``count``: how many calls it has affected."""

    def __init__(self, effect: Effect, where: Where) -> None:
        self.effect = effect
        self.where = where
        self.count = 0
        self.removed = False
        self._seen = 0
        self._lock = threading.Lock()
        self._held: list[Callable[[], object]] = []

    def take(self, method: str, replica: str) -> bool:
        """Whether it affects a call of ``method`` at ``replica``; if so, counts the call."""
        where = self.where
        if not where.matches(method) or where.replica not in (None, replica):
            return False
        with self._lock:
            self._seen += 1
            if self.removed or self._seen <= where.after or self.count == where.times:
                return False
            self.count += 1
            return True

    def hold(self, release: Callable[[], object]) -> None:
        """Have ``release`` called, from any thread, when this is removed."""
        with self._lock:
            if not self.removed:
                self._held.append(release)
                return
        release()

    def let_go(self, release: Callable[[], object]) -> None:
        """The call that ``release`` belongs to is no longer held."""
        with self._lock:
            if release in self._held:
                self._held.remove(release)

    def remove(self) -> None:
        with self._lock:
            self.removed = True
            held, self._held = self._held, []
        for release in held:
            release()

    def __repr__(self) -> str:
        limit = "" if self.where.times is None else f" of {self.where.times}"
        removed = ", removed" if self.removed else ""
        return f"<Fault {self.effect}: {self.where}, injected {self.count}{limit}{removed}>"


class Injections:
    """All injections of a test mesh, in the order in which they were created."""

    def __init__(self) -> None:
        self._all: list[Injection] = []

    def add(self, injection: Injection) -> None:
        self._all.append(injection)

    def take(self, method: str, replica: str) -> list[Injection]:
        """The injections that affect a call, in order: delays, up to the first that ends it."""
        taken = []
        for injection in self:
            if injection.take(method, replica):
                taken.append(injection)
                if injection.effect.kind is not Kind.DELAY:
                    break
        return taken

    def __iter__(self) -> Iterator[Injection]:
        return (injection for injection in tuple(self._all) if not injection.removed)

    def __repr__(self) -> str:
        return f"<Injections {len([*self])}>"
