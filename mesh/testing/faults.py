"""Fault injection: replicas fail, delay or drop calls. Faults are injected in the server, before the servicer is
called, so the client under test is the same as in production."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import grpc

from mesh.testing.injection import Effect, Injection, Injections, Kind, Metadata, Where
from mesh.testing.methods import Methods


class NamedReplica(Protocol):
    """A replica, whose ``str`` is its name."""

    @property
    def running(self) -> bool: ...


class Fault:
    """A fault that ``Faults`` created, in effect until it is removed or used up::

        with faults.fail(grpc.StatusCode.UNAVAILABLE, times=2) as fault:
            ...
        assert fault.injected == 2

    Leaving the block removes it.
    """

    def __init__(self, injection: Injection) -> None:
        self._injection = injection

    @property
    def injected(self) -> int:
        """How many calls it has affected."""
        return self._injection.count

    def remove(self) -> None:
        """End the fault: delayed calls continue at once, dropped calls end with UNAVAILABLE, new calls pass."""
        self._injection.remove()

    def __enter__(self) -> Fault:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return repr(self._injection)


class Faults:
    """The faults of a test mesh. Iterating over it yields those that were not removed.

    Each method that creates one takes ``method`` ("Method", or "package.Service/Method"; default: all), ``replica``
    (default: all), ``after`` (how many matching calls are let through first) and ``times`` (how many calls it affects;
    default: all). Only the third call: ``after=2, times=1``. If several faults match a call, they apply in the order in
    which they were created, up to the first that ends the call.

    Raises ValueError for a method that no replica serves, and for a replica that doesn't exist.
    """

    def __init__(self, methods: Methods, injections: Injections, replicas: Callable[[], Iterable[str]]) -> None:
        self._methods = methods
        self._replicas = replicas
        self._injections = injections

    def fail(
        self,
        code: grpc.StatusCode,
        details: str = "injected fault",
        *,
        trailing_metadata: Metadata = (),
        method: str | None = None,
        replica: NamedReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls end with this status, and don't reach the servicer."""
        if not isinstance(code, grpc.StatusCode):
            raise TypeError(f"expected a grpc.StatusCode, got {code!r}")
        if code is grpc.StatusCode.OK:
            raise ValueError("a call can't fail with OK")
        effect = Effect(Kind.FAIL, code, details, tuple(trailing_metadata))
        return self._inject(effect, method, replica, after, times)

    def delay(
        self,
        seconds: float,
        *,
        method: str | None = None,
        replica: NamedReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls wait this long before the servicer is called. If the client gives up meanwhile, it isn't called."""
        if not 0 <= seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"expected 0 seconds or more, got {seconds!r}")
        return self._inject(Effect(Kind.DELAY, seconds=seconds), method, replica, after, times)

    def drop(
        self,
        *,
        method: str | None = None,
        replica: NamedReplica | str | None = None,
        after: int = 0,
        times: int | None = None,
    ) -> Fault:
        """Calls get no response: they last until their clients give up, or the fault is removed."""
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
        self, effect: Effect, method: str | None, replica: NamedReplica | str | None, after: int, times: int | None
    ) -> Fault:
        name = None if replica is None else str(replica)
        if name is not None and name not in (known := [*self._replicas()]):
            raise ValueError(f"no replica {name!r}; replicas: {', '.join(known) or 'none yet; serve first'}")
        injection = Injection(effect, Where(method, self._methods.matching(method), name, after, times))
        self._injections.add(injection)
        return Fault(injection)
