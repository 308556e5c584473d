"""Faults on demand: replicas that fail, delay or drop calls. Servers inject them before the servicer is called, so the
client under test is as it is in production."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc

from mesh.testing.injection import Effect, Injection, Injections, Kind, Metadata, Where
from mesh.testing.methods import Methods

if TYPE_CHECKING:
    from mesh.testing.base import BaseReplica


class Fault:
    """A fault that ``Faults`` made, in force until it is removed or used up::

        with faults.fail(grpc.StatusCode.UNAVAILABLE, times=2) as fault:
            ...
        assert fault.injected == 2

    Leaving the block removes it.
    """

    def __init__(self, injection: Injection) -> None:
        self._injection = injection

    @property
    def injected(self) -> int:
        """How many calls have had it."""
        return self._injection.count

    def remove(self) -> None:
        """End the fault: delayed calls go on at once, dropped calls end UNAVAILABLE, and no other call has it."""
        self._injection.remove()

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return repr(self._injection)


class Faults:
    """The faults of a test mesh. Iterating over it gives those that were not removed.

    Each method that makes one takes ``method`` ("Method", or "package.Service/Method"; every method without one),
    ``replica`` (every replica without one), ``after`` (so many matching calls pass first) and ``times`` (so many calls
    have it; all without it). The third call alone: ``after=2, times=1``. Where several match a call, it has all of them
    in the order in which they were made, up to the first that ends it.

    Raises ValueError for a method that nobody serves.
    """

    def __init__(self, methods: Methods, injections: Injections) -> None:
        self._methods = methods
        self._injections = injections

    def fail(
        self,
        code: grpc.StatusCode,
        details: str = "injected fault",
        *,
        trailing_metadata: Metadata = (),
        method: str | None = None,
        replica: BaseReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls end with this status, and no servicer sees them."""
        if code is grpc.StatusCode.OK:
            raise ValueError("a call can't fail with OK")
        effect = Effect(Kind.FAIL, code, details, tuple(trailing_metadata))
        return self._inject(effect, method, replica, after, times)

    def delay(
        self,
        seconds: float,
        *,
        method: str | None = None,
        replica: BaseReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls wait for so long before the servicer is called. Those that their clients give up don't reach it."""
        if not 0 <= seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"expected seconds from 0, not {seconds!r}")
        return self._inject(Effect(Kind.DELAY, seconds=seconds), method, replica, after, times)

    def drop(
        self,
        *,
        method: str | None = None,
        replica: BaseReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls get no answer: they last until their clients give them up, or the fault is removed."""
        return self._inject(Effect(Kind.DROP), method, replica, after, times)

    def clear(self) -> None:
        """Remove all faults."""
        for fault in self:
            fault.remove()

    def __iter__(self) -> Iterator[Fault]:
        return map(Fault, self._injections)

    def __repr__(self) -> str:
        return f"<Faults {', '.join(map(repr, self)) or 'none'}>"

    def _inject(
        self, effect: Effect, method: str | None, replica: BaseReplica | str | None, after: int, times: int | None
    ) -> Fault:
        name = None if replica is None else str(replica)
        injection = Injection(effect, Where(method, self._methods.matching(method), name, after, times))
        self._injections.add(injection)
        return Fault(injection)
