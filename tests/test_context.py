"""What a call made while handling another inherits from it, and what becomes of it when the other is cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mesh.context import Scope, current, detach, enter, entered, remaining


def test_outside_of_an_inbound_call_nothing_remains_to_be_told() -> None:
    assert current() is None
    assert remaining() is None


def test_an_inbound_call_without_a_deadline_has_no_remaining_time() -> None:
    with entered(Scope()):
        assert remaining() is None


def test_the_remaining_time_is_that_of_the_inbound_call() -> None:
    with entered(Scope(time.monotonic() + 100)):
        first = remaining()
        second = remaining()
    assert first is not None
    assert second is not None
    assert 0 < second <= first <= 100


def test_an_inbound_call_that_is_over_has_0_left() -> None:
    with entered(Scope(time.monotonic() - 5)):
        assert remaining() == 0.0


def test_a_detached_call_inherits_nothing_and_what_follows_does_again() -> None:
    scope = Scope(time.monotonic() + 100)
    with entered(scope):
        with detach():
            assert current() is None
            assert remaining() is None
        assert current() is scope


def test_inbound_calls_nest_and_end_with_their_handlers_also_by_an_error() -> None:
    outer, inner = Scope(1.0), Scope(2.0)
    with entered(outer):
        with entered(inner):
            assert current() is inner
        assert current() is outer
        with pytest.raises(KeyError), entered(inner):
            raise KeyError
        assert current() is outer
    assert current() is None


def test_entering_for_the_rest_of_a_context_leaves_others_alone() -> None:
    scope = Scope()
    context = contextvars.copy_context()
    context.run(enter, scope)
    assert context.run(current) is scope
    assert current() is None


async def test_a_task_inherits_from_the_handler_that_made_it() -> None:
    async def inherited() -> Scope | None:
        await asyncio.sleep(0)
        return current()

    scope = Scope()
    with entered(scope):
        task = asyncio.create_task(inherited())
    assert await task is scope
    assert await asyncio.create_task(inherited()) is None


async def test_what_outlives_its_handler_inherits_nothing_more() -> None:
    ended = asyncio.Event()

    async def inherited() -> list[object]:
        before = [current(), remaining()]
        await ended.wait()
        return [*before, current(), remaining()]

    scope = Scope(time.monotonic() - 1)
    with entered(scope):
        task = asyncio.create_task(inherited())
        await asyncio.sleep(0)
    scope.close()
    ended.set()
    assert await task == [scope, 0.0, None, None]


def test_a_thread_of_a_users_own_inherits_only_when_it_is_given_the_context() -> None:
    scope = Scope()
    with entered(scope), ThreadPoolExecutor(1) as pool:
        assert pool.submit(current).result() is None
        assert pool.submit(contextvars.copy_context().run, current).result() is scope


# -- the calls made for an inbound call


class Child:
    """A call made for an inbound call."""

    def __init__(self, scope: Scope) -> None:
        self.cancelled = 0
        scope.adopt(self, self.cancel)

    def cancel(self) -> None:
        self.cancelled += 1


def test_cancelling_the_inbound_call_cancels_each_of_its_calls_once() -> None:
    scope = Scope()
    children = [Child(scope) for _ in range(3)]
    scope.cancel()
    scope.cancel()
    assert scope.cancelled
    assert [child.cancelled for child in children] == [1, 1, 1]


def test_a_call_that_has_ended_is_not_cancelled() -> None:
    scope = Scope()
    ended, running = Child(scope), Child(scope)
    scope.release(ended)
    scope.release(ended)
    scope.cancel()
    assert (ended.cancelled, running.cancelled) == (0, 1)


def test_a_call_made_after_the_cancel_is_cancelled_at_once() -> None:
    scope = Scope()
    scope.cancel()
    assert Child(scope).cancelled == 1


def test_what_a_handler_leaves_running_is_not_cancelled_after_its_end() -> None:
    scope = Scope()
    child = Child(scope)
    scope.close()
    scope.cancel()
    assert (child.cancelled, scope.cancelled) == (0, False)
    assert Child(scope).cancelled == 0


def test_a_call_that_ends_another_while_it_is_cancelled_does_no_harm() -> None:
    scope = Scope()
    first = Child(scope)
    scope.adopt(object(), lambda: scope.release(first))
    scope.cancel()
    assert first.cancelled == 0


def test_threads_that_cancel_at_once_cancel_each_call_once() -> None:
    scope = Scope()
    children = [Child(scope) for _ in range(2000)]
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(scope.cancel) for _ in range(4)]:
            done.result()
    assert all(child.cancelled == 1 for child in children)


def test_a_scope_says_what_it_is() -> None:
    scope = Scope(1.5, is_retry=True, criticality="high")
    assert repr(scope) == "<Scope deadline=1.5 is_retry=True cancelled=False>"
    assert (scope.criticality, scope.exhausted) == ("high", False)
