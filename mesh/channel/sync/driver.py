"""Runs a flow in threads: by events, or in the thread that waits for the call."""

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
    """What a call needs from its channel."""

    closed: bool
    flow_worker: Worker
    callbacks: Worker

    def start(self) -> None:
        """Start the channel, once."""

    def adopt(self, driver: Driver) -> None:
        """Cancel the call when the channel closes."""


class Driver(LockedDriver):
    """Runs a call over grpc's futures and streams."""

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
        self.refused = False  # grpc could not start an attempt, as with a request that it can't serialize
        self._awaits_headers = False  # whether a thread waits for each attempt's headers
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

    def start_attempt(self, attempt: Attempt) -> None:
        policy = self.call.policy
        self.hedged = policy.hedge.max_attempts > 1
        self._awaits_headers = not self._unary and (self.hedged or policy.receive_timeout < math.inf)
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
            self.ended(number, outcome_of_error(error, self.pool, address))
            return
        except ValueError:
            if self.channel.closed or not subchannel.closed:
                raise
            self.ended(number, NEVER_SENT)
            return
        self.running[number] = inner
        # (add_done_callback would make the core call refer to itself, and so outlive its user.)
        over = functools.partial(self._core_call_ended, number, address, inner)
        if not inner.add_callback(over):
            over()
        elif (self.hedged or self.replay is not None) and self._unrepeatable():
            self.replay_overflowed(number)
        elif self._awaits_headers:
            # The user's thread waits for one attempt's headers when it reads. With several attempts, or with a timeout
            # for the headers, each has a thread that waits.
            threading.Thread(target=self._await_headers, args=(number, inner), daemon=True).start()

    def set_timer(self, until: float | None) -> None:
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
        if self._scope is not None:
            self._leave_scope(self._scope, self.verdict)
        for callback in callbacks:
            self.channel.callbacks.run(callback)

    # These two may run the caller's serializer and come on any thread: the timers', or that of another call which found
    # that an endpoint was lost. So the flow continues on the channel's own thread.

    def timer_fired(self) -> None:
        self.channel.flow_worker.run(super().timer_fired)

    def picker_changed(self) -> None:
        self.channel.flow_worker.run(super().picker_changed)

    def add_callback(self, callback: Callable[[], object]) -> bool:
        """Call ``callback`` when the call has ended; False if it already has."""
        with self._condition:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def wait(self, timeout: float | None = None) -> Verdict | None:
        """Wait until the call has ended; None when that takes longer than ``timeout``."""
        with self._condition:
            self._condition.wait_for(lambda: self.verdict is not None, timeout)
            return self.verdict

    def committed_call(self) -> Any:
        """Wait until an attempt is committed, and return its core call; None when the mesh itself ended the call.

        Headers arrive only where somebody waits for them, so this thread, the user's, does.
        """
        asked = 0
        while self.committed is None:
            with self._condition:
                self._condition.wait_for(lambda asked=asked: self._settled() or max(self.running, default=0) > asked)  # type: ignore[misc]
                if self.verdict is not None:
                    return self.verdict.outcome.result
                number, inner = max(self.running.items(), key=lambda item: item[0], default=(0, None))
            if number > asked and not self._awaits_headers:
                self._await_headers(number, inner)
            asked = max(asked, number)
        return self.committed

    def _settled(self) -> bool:
        return self.committed is not None or self.verdict is not None

    def _await_headers(self, number: int, inner: Any) -> None:
        if inner.initial_metadata() or inner.is_active():
            self.headers_received(number)

    def _core_call_ended(self, number: int, address: str, inner: Any) -> None:
        if inner.code() is grpc.StatusCode.OK:
            if self.pool.cluster.reads_reports:
                self.pool.take_load_report(address, inner.trailing_metadata())
            self.ended(number, Outcome(0, result=inner))
        elif self._unary and self.replay is None:
            self._failed(number, address, inner)
        else:
            # This thread has yet to handle the headers of a stream, which come right after; another thread may wait for
            # them.
            self.channel.flow_worker.run(functools.partial(self._failed, number, address, inner))

    def _failed(self, number: int, address: str, inner: Any) -> None:
        self.ended(number, outcome_of_error(inner, self.pool, address, final=self._unrepeatable()))

    def response_failed(self, inner: Any) -> None:
        """``inner`` has failed for its reader. (grpc reports a response that can't be parsed nowhere else.)"""
        for number, running in tuple(self.running.items()):
            if running is inner:
                self._failed(number, self.call.attempts[number - 1].endpoint.address, inner)


class BlockingDriver(Driver):
    """Runs a call over futures in the thread that waits for it; events from other threads are queued for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._events: SimpleQueue[Wake | None] = SimpleQueue()
        self._timer_at: float | None = None

    def run(self) -> Verdict:
        """Run the call until it has ended."""
        try:
            self._drain(START)
            while self.verdict is None:
                try:
                    wake = self._events.get(timeout=until(self._timer_at))
                except Empty:
                    wake = Elapsed(time.monotonic())
                self._drain(wake)
        finally:
            if self._conclude(Verdict(Outcome(Code.CANCELLED, "interrupted", cancelled=True))):
                self._clean_up()
        return self.verdict

    def _deliver(self, wake: Wake | None) -> None:
        self._events.put(wake)

    def picker_changed(self) -> None:
        self._deliver(Elapsed(time.monotonic()))

    def set_timer(self, until: float | None) -> None:
        self._timer_at = until


def outcome_of_error(error: Any, pool: Pool, address: str, *, final: bool = False) -> Outcome:
    """The outcome of an attempt that failed with grpc's ``error``. ``final``: it must not be retried."""
    code, initial, trailing = error.code().value[0], error.initial_metadata(), error.trailing_metadata()
    return failed(pool, address, code, error.details(), initial, trailing, error, final=final)
