"""A method is limited while load makes its calls miss their deadlines, and at no other time: in virtual time."""

import math
from collections.abc import Generator
from typing import Any

import pytest

from mesh.policy.server.admission import Mode
from mesh.policy.server.limiter import Ending, Limiter, is_out_of_time
from mesh.policy.server.reasons import Reason
from tests.policy.simulated import Behavior, Call, Cpu, Pool, Server, calls, waits, works

WINDOW = 0.1  # seconds; a look at each window's end
SAMPLES = 10  # that it needs for that
FAST = 1 / 128  # seconds; sums of it are exact


class TestHealthy:
    """Programs that run well without a limit: nobody is refused, nobody waits."""

    @pytest.mark.parametrize("at_once", [50, 200, 1000])
    @pytest.mark.parametrize("seconds", [0.05, 0.3, 2.0])
    @pytest.mark.parametrize("patience", [30.0, 1.5])
    def test_handlers_that_wait(self, at_once: int, seconds: float, patience: float) -> None:
        server = Server()
        server.serve("m", waits(seconds))
        ended = server.closed_loop("m", at_once, 3, max(1, patience) * seconds if patience < 30 else patience)
        server.run(30.0)
        assert (ended, server.refused, server.waited) == ({True: 3 * at_once}, {}, 0)

    @pytest.mark.parametrize("at_once", [21, 60, 600])
    @pytest.mark.parametrize("timeout", [30.0, 0.5])
    def test_a_service_that_calls_itself(self, at_once: int, timeout: float) -> None:
        server = Server()
        server.serve("m", calls("m"))
        ended = server.closed_loop("m", at_once, 5, timeout)
        server.run(30.0)
        assert (ended, server.refused, server.waited) == ({True: 5 * at_once}, {}, 0)

    def test_fan_out(self) -> None:
        server = Server()
        server.serve("m", calls("m", 2, fan_out=10))
        ended = server.closed_loop("m", 10, 3, 30.0)
        server.run(30.0)
        assert (ended, server.refused, server.waited) == ({True: 30}, {}, 0)

    @pytest.mark.parametrize(("slower", "timeout"), [(0.2, 0.5), (0.4, 0.5), (0.45, 0.5), (0.3, 0.4), (0.5, 1.0)])
    @pytest.mark.parametrize("seed", [1, 2])
    def test_a_downstream_that_becomes_slower_however_many_call_it(
        self, slower: float, timeout: float, seed: int
    ) -> None:
        server = Server(seed=seed)
        seconds = 0.05

        def behavior(_: Call) -> Generator[Any, None, None]:
            yield lambda call: call.server.after(seconds, call.resume)

        server.serve("m", behavior)
        ended = server.open_loop("m", 160, 20.0, timeout)
        server.run(10.0)
        seconds = slower
        server.run(25.0)
        assert (set(ended), server.refused) == ({True}, {})

    def test_a_burst_that_takes_most_of_its_time(self) -> None:
        server = Server()
        server.serve("m", works(Pool(server, 8), 0.05))
        server.open_loop("m", 20, 5.0, 5.0)
        server.run(5.5)
        ended = server.closed_loop("m", 60, 1, 0.5)
        server.run(7.0)
        assert (ended, server.refused) == ({True: 60}, {})

    def test_a_method_beside_one_whose_downstream_is_dead(self) -> None:
        server = Server()
        server.serve("dead", waits(1000.0))
        server.serve("m", waits(0.01))
        dead = server.open_loop("dead", 100, 20.0, 1.0)
        ended = server.open_loop("m", 200, 20.0, 1.0)
        server.run(25.0)
        assert (set(dead), set(ended)) == ({False}, {True})

    def test_threads_are_a_queue_to_the_deadline(self) -> None:
        server = Server(threaded=True, max_concurrency=8)
        server.serve("m", waits(0.3))
        ended = server.closed_loop("m", 200, 1, 5.0)
        server.run(10.0)
        # 16 rounds of 8 fit into five seconds.
        assert ended == {True: 128, False: 72}
        assert set(server.refused) <= {Reason.EXPIRED, Reason.LATE}


def downstream(server: Server) -> Behavior:
    return works(Pool(server, 8), 0.05)


def stubborn_downstream(server: Server) -> Behavior:
    return works(Pool(server, 8, cancels=False), 0.05)


def large_downstream(server: Server) -> Behavior:
    return works(Pool(server, 100), 0.05)


def computes(server: Server) -> Behavior:
    return works(Cpu(server), 0.01)


THREADS = {"threaded": True, "max_concurrency": 32}
ONE_AT_A_TIME = {"max_concurrency": 1}  # as handlers that hold an event loop


@pytest.mark.slow
class TestOverload:
    """Beyond its capacity a server does what it can: goodput stays near the capacity."""

    @pytest.mark.parametrize("timeout", [0.25, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize(
        ("make", "capacity", "config"),
        [
            (downstream, 160, {}),
            (stubborn_downstream, 160, {}),
            (large_downstream, 2000, {}),
            (computes, 100, {}),
            (computes, 100, ONE_AT_A_TIME),
            (stubborn_downstream, 160, THREADS),
            (computes, 100, THREADS),
        ],
    )
    def test_at_twice_the_capacity(self, make: Any, capacity: int, config: dict[str, Any], timeout: float) -> None:
        goodput, _ = overloaded(make, capacity, 2.0, timeout, **config)
        assert goodput >= 0.95

    @pytest.mark.parametrize("factor", [1.2, 1.5, 5.0, 10.0])
    def test_at_other_loads(self, factor: float) -> None:
        goodput, server = overloaded(downstream, 160, factor, 0.5)
        assert goodput >= 0.95
        assert server.methods["m"].limiter.limit < 40

    def test_without_a_limit_it_is_a_tenth(self) -> None:
        goodput, _ = overloaded(downstream, 160, 2.0, 0.5, overload=Mode.OFF)
        assert goodput < 0.1

    def test_the_limit_goes_when_the_overload_does(self) -> None:
        _, server = overloaded(downstream, 160, 2.0, 0.5)
        assert server.admission.limited
        server.run(server.now + 1.0)
        server.refused.clear()
        ended = server.open_loop("m", 80, 5.0, 0.5)
        server.run(server.now + 6.0)
        assert (set(ended), server.refused, server.admission.limited) == ({True}, {}, {})

    def test_a_limit_lets_more_through_when_the_downstream_grows(self) -> None:
        server = Server()
        pool = Pool(server, 8)
        server.serve("m", works(pool, 0.05))
        server.open_loop("m", 40, 4.0, 5.0)
        server.run(4.5)
        ended = server.open_loop("m", 320, 20.0, 0.5)
        server.run(12.0)
        assert server.methods["m"].limiter.limited
        pool.grow(24)
        server.run(16.0)
        before = ended[True]
        server.run(20.0)
        assert (ended[True] - before) / 4 == pytest.approx(320, rel=0.1)

    @pytest.mark.parametrize("timeout", [0.5, 1.0, 2.0])
    def test_calls_that_wait_for_each_other_cannot_lock_it_up(self, timeout: float) -> None:
        # What a limit holds back is what those that run wait for. Without a limit there is no goodput to speak of;
        # with one that stayed there would be none.
        limited, server = overloaded(nested, 160, 2.0, timeout)
        unlimited, _ = overloaded(nested, 160, 2.0, timeout, overload=Mode.OFF)
        assert limited > 2 * unlimited
        ended = server.closed_loop("m", 60, 3, 30.0)
        server.run(server.now + 40.0)
        assert ended == {True: 180}

    def test_a_limit_that_does_not_help_is_lifted_for_longer_and_longer(self) -> None:
        server = Server()
        server.serve("m", waits(1000.0))
        server.open_loop("m", 100, 60.0, 1.0)
        limited = []
        for tenth in range(600):
            server.run(tenth / 10)
            limited.append(server.methods["m"].limiter.limited)
        assert 0 < sum(limited) < 450
        assert server.methods["m"].limiter._cooldown > 8.0


def overloaded(make: Any, capacity: int, factor: float, timeout: float, **config: Any) -> tuple[float, Server]:
    """Goodput against capacity in half a minute of so much load (less of a large one), after a quiet time."""
    seconds = 30.0 if capacity < 1000 else 10.0
    server = Server(**config)
    server.serve("m", make(server))
    server.open_loop("m", capacity / 4, 4.0, 5.0)
    server.run(4.5)
    ended = server.open_loop("m", capacity * factor, seconds, timeout)
    server.run(4.5 + seconds)
    return ended[True] / seconds / capacity, server


def nested(server: Server) -> Behavior:
    """A method that calls itself once; the inner call needs the downstream."""
    return calls("m", then=stubborn_downstream(server), seconds=0.0)


def window(limiter: Limiter, seconds: float, now: float, *, left: float = math.inf) -> None:
    """A window's worth of calls that all took so long."""
    for _ in range(SAMPLES):
        limiter.sample(seconds, left, Ending.OK, now)


def learned() -> Limiter:
    """A limiter that has seen what its method takes unhindered."""
    limiter = Limiter(10, 1000, 1.0)
    window(limiter, FAST, 0.0)
    assert (limiter.limit, limiter.baseline) == (1000, FAST)
    return limiter


class TestTheBaseline:
    def test_an_overload_does_not_become_the_norm(self) -> None:
        _, server = overloaded(downstream, 160, 2.0, 0.5)
        assert server.methods["m"].limiter.baseline == pytest.approx(0.05, rel=0.1)

    def test_a_method_that_has_become_slower_is_believed_in_a_while(self) -> None:
        limiter = learned()
        for number in range(1, 301):
            window(limiter, 3 * FAST, number * WINDOW)
        assert limiter.baseline == pytest.approx(3 * FAST, rel=0.02)

    def test_but_not_while_many_run_at_once(self) -> None:
        limiter = learned()
        for number in range(1, 301):
            window(limiter, 20 * FAST, number * WINDOW)  # 16 at once
        assert limiter.baseline < 10 * FAST

    def test_one_that_has_become_quicker_at_once(self) -> None:
        limiter = learned()
        for number in range(1, 11):
            window(limiter, FAST / 2, number * WINDOW)
        assert limiter.baseline == pytest.approx(FAST / 2, rel=0.05)

    def test_calls_that_take_no_time_at_all_do_no_harm(self) -> None:
        limiter = Limiter(10, 1000, 1.0)
        for number in range(3):
            window(limiter, 0.0, number * WINDOW)
        assert not limiter.limited

    def test_seldom_calls_are_learned_from_too(self) -> None:
        limiter = Limiter(10, 1000, 1.0)
        limiter.sample(FAST, math.inf, Ending.OK, 0.0)
        assert limiter.baseline == FAST


class TestEndings:
    def test_failing_fast_is_not_being_fast(self) -> None:
        limiter = learned()
        assert not limiter.sample(0.0001, math.inf, Ending.FAILED, 10.0)
        assert limiter.median == pytest.approx(FAST, rel=0.6)

    def test_a_call_that_did_not_finish_counts_only_for_how_slow_it_already_was(self) -> None:
        limiter = learned()
        median = limiter.median
        limiter.sample(median / 2, math.inf, Ending.CANCELLED, 10.0)
        assert limiter.median == median
        limiter.sample(median * 2, math.inf, Ending.CANCELLED, 10.0)
        assert limiter.median > median

    @pytest.mark.parametrize(("left", "out_of_time"), [(-1.0, True), (0.0, True), (0.09, True), (0.1, False)])
    def test_a_client_s_clock_may_be_a_little_ahead(self, left: float, out_of_time: bool) -> None:
        assert is_out_of_time(1.0, left) is out_of_time


def test_looks_are_a_window_apart_and_need_samples_or_time() -> None:
    limiter = learned()
    assert limiter._succeeded == SAMPLES - 1  # the first call ever ends the first window
    limiter.sample(2 * FAST, math.inf, Ending.OK, WINDOW)
    assert limiter._succeeded == 0
    limiter.sample(2 * FAST, math.inf, Ending.OK, 1.5 * WINDOW)
    assert limiter._succeeded == 1
    limiter.sample(2 * FAST, math.inf, Ending.OK, WINDOW + 1.0)
    assert limiter._succeeded == 0


@pytest.mark.parametrize(("least", "most"), [(10, 8), (10, 100)])
def test_begins_without_a_limit(least: int, most: int) -> None:
    limiter = Limiter(least, most, 1.0)
    assert limiter.limit == most
    assert repr(limiter) == "<Limiter 0 in flight, no limit, baseline 0.0 ms, median 0.0 ms>"


def test_the_median_finds_the_middle_and_not_the_mean() -> None:
    limiter = Limiter(10, 1000, 1.0)
    assert limiter.median == 0.0  # unknown
    for number in range(400):
        # Two of three are fast, the third takes a second: the mean is over 300 ms.
        limiter.sample(1.0 if number % 3 == 0 else FAST, math.inf, Ending.OK, 0.0)
    # Each call moves it by a step of 5 %: the last few decide how far off it is.
    assert limiter.median == pytest.approx(FAST, rel=0.2)
