"""Drives a flow in threads: by events, or in the thread that waits for the call."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import grpc

from mesh import background
from mesh.channel import driver
from mesh.channel.driver import START, LockedDriver, until
from mesh.channel.outcome import NEVER_SENT, failed, retry_metadata
from mesh.channel.pool import Pool
from mesh.channel.replay import Replay
from mesh.channel.subchannel import Method
from mesh.channel.worker import Worker
from mesh.codes import Code
from mesh.model import Attempt, CallSpec, Elapsed, Outcome, Verdict, Wake
from mesh.policy.call.flow import Flow


class Owner(driver.Owner, Protocol):
    """What a call needs of its channel."""

    closed: bool
    stepping: Worker
    callbacks: Worker

    def start(self) -> None:
        """Bring the channel to life; once."""

    def adopt(self, driver: Driver) -> None:
        """Have the call cancelled when the channel closes."""


class Driver(LockedDriver):
    """Drives a call over grpc's futures and rendezvous."""

    channel: Owner
    replay: Replay | None

    def __init__(
        self,
        channel: Owner,
        method: Method,
        call: CallSpec,
        flow: Flow,
        requests: Any,
        serializer: Any,
        credentials: grpc.CallCredentials | None,
        compression: grpc.Compression | None,
    ) -> None:
        super().__init__(channel, method, call, flow, requests, serializer, credentials, compression)
        self.channel = channel
        self.replay = Replay(requests, serializer, self._overflowed) if method.kind.startswith("stream") else None
        self.refused = False  # grpc would not even start an attempt
        self._watched = False  # whether a thread waits for each attempt's headers
        self._unary = method.kind.endswith("unary")
        self._timer: background.Timer | None = None
        self._condition = threading.Condition()
        self._callbacks: list[Callable[[], object]] | None = []
        if self._scope is not None:
            self._scope.adopt(self, self.cancel)

    def forked(self) -> None:
        self._lock, self._condition = threading.Lock(), threading.Condition()
        super().forked()
        self._callbacks = None

    def begin(self, attempt: Attempt) -> None:
        policy = self.call.policy
        self.hedged = policy.hedge.max_attempts > 1
        self._watched = not self._unary and (self.hedged or policy.receive_timeout < math.inf)
        number, address = attempt.number, attempt.endpoint.address
        subchannel = self.pool.get(address)
        if subchannel is None:
            self.ended(number, NEVER_SENT)
            return
        core = subchannel.call(self._method, attempt.previous)
        requests = self._request if self.replay is None else self.replay.requests()
        wait = self.call.wait_for_ready if self.pool.connected_by_core else None
        sent = retry_metadata(attempt)
        try:
            invoke = core.future if self._unary else core
            inner = invoke(requests, attempt.timeout, sent, self._credentials, wait, self._compression)
        except grpc.RpcError as error:
            self.refused = True
            self.ended(number, outcome_of(error, self.pool, address))
            return
        except ValueError:
            if self.channel.closed or not subchannel.closed:
                raise
            self.ended(number, NEVER_SENT)
            return
        self.running[number] = inner
        # (add_done_callback would have the inner call refer to itself, and so outlive its user.)
        over = functools.partial(self._over, number, address, inner)
        if not inner.add_callback(over):
            over()
        elif (self.hedged or self.replay is not None) and self._unrepeatable():
            self.overflow(number)
        elif self._watched:
            # The user's thread can wait for one attempt's headers, when it reads; of several, or with a time by which
            # they are to come, each has a thread that does.
            threading.Thread(target=self._await_headers, args=(number, inner), daemon=True).start()

    def wake_at(self, until: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if until is None else background.Timer(until - time.monotonic(), self.timer_fired)

    def changed(self) -> None:
        if self.committed is not None and self.replay is not None:
            self.replay.release()
        with self._condition:
            self._condition.notify_all()
            if self.verdict is None or self._callbacks is None:
                return
            callbacks, self._callbacks = self._callbacks, None
        self._leave_scope(self.verdict)
        for callback in callbacks:
            self.channel.callbacks.run(callback)

    # What follows these may run the caller's serializer, and they come in any thread: the one of the timers, or of
    # another call, that found out that an endpoint is lost.

    def timer_fired(self) -> None:
        self.channel.stepping.run(super().timer_fired)

    def picker_replaced(self) -> None:
        self.channel.stepping.run(super().picker_replaced)

    def add_callback(self, callback: Callable[[], object]) -> bool:
        """Have ``callback`` called when the call is over; False when it is."""
        with self._condition:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def wait(self, timeout: float | None = None) -> Verdict | None:
        """Wait until the call is over; None when that takes longer than ``timeout``."""
        with self._condition:
            self._condition.wait_for(lambda: self.verdict is not None, timeout)
            return self.verdict

    def pull(self) -> Any:
        """Wait until an attempt is the call, and return it; None when the mesh itself ended the call.

        Headers come to nobody but who asks for them, so this thread, the user's, asks.
        """
        asked = 0
        while self.committed is None:
            with self._condition:
                self._condition.wait_for(lambda asked=asked: self._settled() or max(self.running, default=0) > asked)  # type: ignore[misc]
                if self.verdict is not None:
                    return self.verdict.outcome.result
                number, inner = max(self.running.items(), key=lambda item: item[0], default=(0, None))
            if number > asked and not self._watched:
                self._await_headers(number, inner)
            asked = max(asked, number)
        return self.committed

    def _settled(self) -> bool:
        return self.committed is not None or self.verdict is not None

    def _await_headers(self, number: int, inner: Any) -> None:
        if inner.initial_metadata() or inner.is_active():
            self.headers(number)

    def _over(self, number: int, address: str, inner: Any) -> None:
        if inner.code() is grpc.StatusCode.OK:
            if self.pool.cluster.reads_reports:
                self.pool.answered(address, inner.trailing_metadata())
            self.ended(number, Outcome(0, result=inner))
        elif self._unary and self.replay is None:
            self._failed(number, address, inner)
        else:
            # This is the thread that has yet to handle the headers of a stream: they come right after, and may be asked
            # for on another.
            self.channel.stepping.run(functools.partial(self._failed, number, address, inner))

    def _failed(self, number: int, address: str, inner: Any) -> None:
        self.ended(number, outcome_of(inner, self.pool, address, final=self._unrepeatable()))

    def broken(self, inner: Any) -> None:
        """``inner`` has failed for its reader. (When a response can't be parsed it tells nobody else.)"""
        for number, running in tuple(self.running.items()):
            if running is inner:
                self._failed(number, self.call.attempts[number - 1].endpoint.address, inner)


class BlockingDriver(Driver):
    """Drives a call over futures in the thread that waits for it: what happens elsewhere is put into its mailbox."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._mail: SimpleQueue[Wake | None] = SimpleQueue()
        self._due: float | None = None

    def run(self) -> Verdict:
        """Run the call to its end."""
        try:
            self._drain(START)
            while self.verdict is None:
                try:
                    wake = self._mail.get(timeout=until(self._due))
                except Empty:
                    wake = Elapsed(time.monotonic())
                self._drain(wake)
        finally:
            if self._conclude(Verdict(Outcome(Code.CANCELLED, "interrupted", cancelled=True))):
                self._clean_up()
        return self.verdict

    def _send(self, wake: Wake | None) -> None:
        self._mail.put(wake)

    def picker_replaced(self) -> None:
        self._send(Elapsed(time.monotonic()))

    def wake_at(self, until: float | None) -> None:
        self._due = until


def outcome_of(error: Any, pool: Pool, address: str, *, final: bool = False) -> Outcome:
    """The outcome of an attempt that grpc says has failed. ``final``: it can't be made again."""
    code, initial, trailing = error.code().value[0], error.initial_metadata(), error.trailing_metadata()
    return failed(pool, address, code, error.details(), initial, trailing, error, final=final)
