"""A server in virtual time: what ``mesh.policy.server.admission`` makes of a load, without the noise of a machine.

Its handlers wait, share a downstream of fixed capacity, share one CPU, or call the server that they run on.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Generator
from typing import Any

from mesh.criticality import Criticality
from mesh.policy.server.admission import Admission, AdmissionConfig
from mesh.policy.server.limiter import Ending
from mesh.policy.server.queue import Method, Ticket

CRITICAL = Criticality.CRITICAL

SWEEP = 0.05
"""Seconds between two checks of the queue while no call ends, as in ``ServerAdmission``."""


class Pool:
    """So many slots, each taken for the time that a piece of work needs, first come first served.

    ``cancels``: work whose call is over is not begun; else the downstream does it all the same.
    """

    def __init__(self, server: Server, slots: int, *, cancels: bool = True) -> None:
        self._server = server
        self._free = slots
        self._waiting: deque[tuple[Call, float]] = deque()
        self._cancels = cancels

    def work(self, call: Call, seconds: float) -> None:
        self._waiting.append((call, seconds))
        self._next()

    def grow(self, slots: int) -> None:
        self._free += slots
        self._next()

    def _next(self) -> None:
        while self._free and self._waiting:
            call, seconds = self._waiting.popleft()
            if self._cancels and call.over:
                continue
            self._free -= 1
            self._server.after(seconds, functools.partial(self._done, call))

    def _done(self, call: Call) -> None:
        self._free += 1
        call.resume()
        self._next()


class Cpu:
    """One CPU, shared in turns of ``QUANTUM`` as threads share Python's: all that work are slowed down."""

    QUANTUM = 0.005

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ready: deque[tuple[Call, float]] = deque()
        self._busy = False

    def work(self, call: Call, seconds: float) -> None:
        self._ready.append((call, seconds))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._ready)
        if self._ready:
            call, seconds = self._ready.popleft()
            spent = min(seconds, self.QUANTUM)
            self._server.after(spent, lambda: self._spent(call, seconds - spent))

    def _spent(self, call: Call, seconds: float) -> None:
        if seconds > 1e-9:
            self._ready.append((call, seconds))
        else:
            call.resume()
        self._next()


Behavior = Callable[["Call"], Generator[Any, None, None]]
"""A handler: it yields what it waits for, a function that takes the call and resumes it in the end."""


class Call:
    """A call from its arrival to its end."""

    def __init__(
        self, server: Server, name: str, deadline: float, done: Callable[[bool], None], *, level: int = 0
    ) -> None:
        self.server = server
        self.name = name
        self.deadline = deadline
        self.over = False
        self.level = level
        self.ticket: Ticket | None = None
        self._arrived = self._started = server.now
        self._done = done
        self._handler: Generator[Any, None, None] | None = None
        server.at(deadline, self._expire)
        if server.admission.enter(self.method, CRITICAL):
            self._start()
            return
        server.waited += 1
        self.ticket = Ticket(self.method, CRITICAL, self._arrived, self._woken, deadline)
        server.wake(server.admission.wait(self.ticket))
        server.settle()

    @property
    def method(self) -> Method:
        return self.server.methods[self.name]

    def _woken(self) -> None:
        assert self.ticket is not None
        if self.ticket.refused:
            self.server.refused[self.ticket.refused] += 1
            self._end(False)
        else:
            self._start()

    def _start(self) -> None:
        self._started = self.server.now
        self._handler = self.server.behaviors[self.name](self)
        self.resume()

    def resume(self) -> None:
        if self.over:
            # A thread goes on although its client is gone.
            if self.server.threaded and self._handler is not None:
                self._step()
            return
        self._step()

    def _step(self) -> None:
        assert self._handler is not None
        try:
            next(self._handler)(self)
        except StopIteration:
            self._leave(Ending.CANCELLED if self.over else Ending.OK)

    def _leave(self, ending: Ending) -> None:
        server = self.server
        server.admission.leave(
            self.method,
            CRITICAL,
            self._started - self._arrived,
            server.now - self._started,
            self.deadline - server.now,
            ending,
            server.now,
        )
        self._handler = None
        if not self.over:
            self._end(ending is Ending.OK)
        server.settle()

    def fail(self) -> None:
        """A call that this one made failed: so does this."""
        if not self.over:
            self._leave(Ending.FAILED)

    def _expire(self) -> None:
        if self.over:
            return
        self.over = True
        self._end(False)
        if self._handler is None:
            assert self.ticket is not None
            self.server.admission.abandon(self.ticket, self.server.now)
            self.server.settle()
        elif not self.server.threaded:
            self._leave(Ending.CANCELLED)

    def _end(self, ok: bool) -> None:
        self.over = True
        self._done(ok)


class Server:
    """The server, its clock and its clients."""

    def __init__(self, *, threaded: bool = False, seed: int = 1, **config: Any) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.threaded = threaded
        self.admission = Admission(AdmissionConfig(**config), contextlib.nullcontext())
        self.behaviors: dict[str, Behavior] = {}
        self.methods: dict[str, Method] = {}
        self.refused: Counter[Any] = Counter()
        self.waited = 0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._sweep()

    def serve(self, name: str, behavior: Behavior) -> None:
        self.behaviors[name] = behavior
        self.methods[name] = self.admission.method()

    def at(self, when: float, do: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._order), do))

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        self.at(self.now + seconds, do)

    def wake(self, settled: Any) -> None:
        for ticket in settled:
            ticket.wake()

    def settle(self) -> None:
        self.wake(self.admission.dispatch(self.now))

    def _sweep(self) -> None:
        self.settle()
        self.after(SWEEP, self._sweep)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, do = heapq.heappop(self._events)
            do()
        self.now = until

    def open_loop(
        self,
        name: str,
        rate: float,
        seconds: float,
        timeout: float,
    ) -> Counter[bool]:
        """Calls at random, ``rate`` a second on average, whatever becomes of them; how many will have succeeded."""
        ended: Counter[bool] = Counter()
        when = self.now
        while (when := when + self.rng.expovariate(rate)) < self.now + seconds:
            self.at(when, functools.partial(Call, self, name, when + timeout, lambda ok: ended.update([ok])))
        return ended

    def closed_loop(self, name: str, at_once: int, rounds: int, timeout: float) -> Counter[bool]:
        """So many callers at once, each with so many calls in a row."""
        ended: Counter[bool] = Counter()

        def again(left: int) -> None:
            def done(ok: bool) -> None:
                ended[ok] += 1
                if left > 1:
                    self.after(0.0, lambda: again(left - 1))

            Call(self, name, self.now + timeout, done)

        for _ in range(at_once):
            self.after(0.0, lambda: again(rounds))
        return ended


def waits(seconds: float) -> Behavior:
    """A handler that waits for something that has room for all."""

    def behavior(call: Call) -> Generator[Any, None, None]:
        yield lambda call: call.server.after(seconds, call.resume)

    return behavior


def works(on: Pool | Cpu, seconds: float) -> Behavior:
    """A handler that needs so much of a thing that is shared."""

    def behavior(call: Call) -> Generator[Any, None, None]:
        yield lambda call: on.work(call, seconds)

    return behavior


def calls(
    name: str, depth: int = 1, *, fan_out: int = 1, seconds: float = 0.01, then: Behavior | None = None
) -> Behavior:
    """A handler that takes a while and then calls ``name`` on its own server, so many levels deep, with its own
    deadline. The last level does ``then``."""

    def behavior(call: Call) -> Generator[Any, None, None]:
        yield lambda call: call.server.after(seconds, call.resume)
        if call.level >= depth:
            yield from then(call) if then is not None else ()
            return
        left = fan_out

        def done(ok: bool) -> None:
            nonlocal left
            left -= 1
            if not ok:
                call.fail()
            elif not left:
                call.resume()

        def inner(call: Call) -> None:
            for _ in range(fan_out):
                Call(call.server, name, call.deadline, done, level=call.level + 1)

        yield inner

    return behavior
