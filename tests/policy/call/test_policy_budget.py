"""How many retries a client may add: the budget under load, over quiet times and among threads; and the throttle."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mesh.codes import Code
from mesh.config.settings import BudgetConfig, RetryPolicy, ServiceConfig, ThrottleConfig
from mesh.model import Attempt
from mesh.policy.call.budget import TTL, Budget, Throttle
from tests.policy.driving import Driven, cluster_of


def budget_of(ratio: float = 0.1, min_per_second: float = 10.0, now: float = 0.0) -> Budget:
    return Budget(BudgetConfig(ratio, min_per_second), contextlib.nullcontext(), now)


def withdrawn(budget: Budget, now: float, tries: int = 100_000) -> int:
    """How many retries there are to be had at ``now``."""
    return next(count for count in range(tries) if not budget.withdraw(now))


def test_a_reserve_of_ten_seconds_is_there_from_the_start() -> None:
    assert withdrawn(budget_of(), now=0.0) == 100


def test_calls_earn_their_share() -> None:
    budget = budget_of(min_per_second=0.0)
    for _ in range(50):
        budget.call()
    assert withdrawn(budget, now=0.0) == 5


def test_a_few_each_second_are_there_whatever_the_traffic() -> None:
    budget = budget_of(ratio=0.0)
    withdrawn(budget, now=0.0)
    assert [withdrawn(budget, now=second) for second in (1.0, 2.0, 3.0)] == [10, 10, 10]


def test_with_nothing_allowed_there_is_nothing() -> None:
    budget = budget_of(0.0, 0.0)
    for _ in range(1000):
        budget.call()
    assert not budget.withdraw(1e9)
    assert repr(budget) == "<Budget balance=0.0>"


def test_the_balance_is_what_may_be_withdrawn_now() -> None:
    budget = budget_of(ratio=0.5, min_per_second=0.1)
    assert budget.balance(0.0) == pytest.approx(1.0)
    budget.call()
    budget.call()
    assert budget.balance(0.0) == pytest.approx(2.0)
    assert budget.withdraw(0.0)
    assert budget.withdraw(0.0)
    assert not budget.withdraw(0.0)
    assert budget.balance(0.0) == pytest.approx(0.0)


def test_what_is_not_used_leaks_away() -> None:
    budget = budget_of(ratio=1.0, min_per_second=0.0)
    for _ in range(100):
        budget.call()
    assert budget.withdraw(0.0)
    # Of the 99 that are left, half have leaked after half of the time.
    assert withdrawn(budget, now=TTL / 2) == 49
    assert not budget.withdraw(TTL)


@pytest.mark.parametrize("quiet", [TTL, 60.0, 86400.0])
def test_a_long_quiet_time_leaves_the_worth_of_ten_seconds_and_no_more(quiet: float) -> None:
    budget = budget_of()
    withdrawn(budget, now=0.0)
    assert withdrawn(budget, now=quiet) == 100


def test_calls_long_past_leave_the_worth_of_their_last_ten_seconds() -> None:
    budget = budget_of(ratio=0.1, min_per_second=0.0)
    for _ in range(6000):  # 100 a second for a minute
        budget.call()
    assert withdrawn(budget, now=60.0) in (99, 100)


def test_instants_out_of_order_earn_nothing_twice() -> None:
    budget = budget_of(ratio=0.0)
    withdrawn(budget, now=5.0)
    assert withdrawn(budget, now=0.0) == 0
    assert withdrawn(budget, now=5.0) == 0
    assert withdrawn(budget, now=6.0) == 10


@pytest.mark.slow
def test_while_everything_fails_retries_add_a_tenth_and_ten_a_second() -> None:
    # 1,000 calls/s for 10 s earn 0.1 × 1000 + 10 = 110 retries a second, 1.11 attempts a call with a call's own. The
    # reserve of 100 is spent in the first tenths; 2 % of slack for it and for rounding.
    cluster = cluster_of()
    policy = RetryPolicy(3)
    waiting: list[tuple[float, Driven]] = []
    calls = attempts = retried_late = 0
    for tick in range(10_000):
        now = tick / 1000
        due, waiting = [each for each in waiting if each[0] <= now], [each for each in waiting if each[0] > now]
        fresh = Driven(retry=policy, cluster=cluster, seed=tick, now=now)
        calls += 1
        for call in [fresh, *(call for _, call in due)]:
            if call is not fresh:
                call.elapses(at=now)
            step = call.step
            assert isinstance(step, Attempt)
            attempts += 1
            retried_late += call is not fresh and now >= 1.0
            call.fails(step.number, Code.UNAVAILABLE)
            if call.verdict is None:
                until = call.waits(until=(now, now + 1)).until
                assert until is not None
                waiting.append((until, call))
    assert calls == 10_000
    assert (attempts - 100) / calls <= 1.11 * 1.02
    assert 0.10 <= retried_late / 9_000 <= 0.11 * 1.02


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.slow
@pytest.mark.usefixtures("switching")
def test_threads_lose_no_call_and_no_retry() -> None:
    budget = Budget(BudgetConfig(0.5, 0.0), threading.Lock(), 0.0)

    def work(_: int) -> int:
        got = 0
        for _ in range(5000):
            budget.call()
            got += budget.withdraw(0.0)
        return got

    with ThreadPoolExecutor(4) as pool:
        got = sum(pool.map(work, range(4)))
    got += withdrawn(budget, now=0.0)
    assert got == 10_000  # half of the 20,000 calls, each counted once


# -- the throttle (A6; docs/correctness.md, R5)


def throttle_of(tokens: float = 10.0, ratio: float = 0.1) -> Throttle:
    return Throttle(ThrottleConfig(tokens, ratio), contextlib.nullcontext())


def test_the_throttle_starts_full_and_allows_strictly_above_half() -> None:
    throttle = throttle_of(4)
    allowed = []
    for _ in range(5):
        allowed.append(throttle.allows())
        throttle.record_failure()
    assert allowed == [True, True, False, False, False]
    assert repr(throttle) == "<Throttle 0/4>"


def test_successes_give_tokens_back_up_to_the_maximum() -> None:
    throttle = throttle_of(4, 0.75)
    throttle.record_failure()
    throttle.record_success()
    assert repr(throttle) == "<Throttle 3.75/4>"
    throttle.record_success()
    throttle.record_success()
    assert repr(throttle) == "<Throttle 4/4>"


def test_without_a_config_the_throttle_always_allows() -> None:
    throttle = Throttle(None, contextlib.nullcontext())
    for _ in range(100):
        throttle.record_failure()
    throttle.record_success()
    assert throttle.allows()
    assert repr(throttle) == "<Throttle off>"


@pytest.mark.usefixtures("switching")
def test_threads_lose_no_token() -> None:
    throttle = Throttle(ThrottleConfig(1000, 0.125), threading.Lock())

    def repeat(count: Callable[[], None]) -> None:
        for _ in range(200):
            count()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(repeat, [throttle.record_failure] * 4))
        assert repr(throttle) == "<Throttle 200/1000>"
        list(pool.map(repeat, [throttle.record_success] * 4))
    assert repr(throttle) == "<Throttle 300/1000>"


def test_one_throttle_is_for_all_methods_of_a_service() -> None:
    cluster = cluster_of(config=ServiceConfig(throttle=ThrottleConfig(2, 0.1)))
    Driven(retry=RetryPolicy(3), cluster=cluster).fails(1, Code.UNAVAILABLE)
    other = Driven(retry=RetryPolicy(3), cluster=cluster)
    other.call.method = "/weft.test.v1.Test/Other"
    other.fails(1, Code.UNAVAILABLE)
    other.ends(Code.UNAVAILABLE)
