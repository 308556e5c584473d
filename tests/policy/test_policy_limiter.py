"""The limit follows latency: it falls while calls are slower than they are by themselves, else it grows."""

import pytest

from mesh.policy.limiter import LEAST_SAMPLES, WINDOW, Ending, Latency, Limiter

FAST = 1 / 128  # seconds; sums of it are exact


def window(
    limiter: Limiter, latency: Latency, seconds: float, in_flight: int, now: float, queued: bool = False
) -> None:
    """A window's worth of calls that all took so long."""
    limiter.queued = queued
    for _ in range(LEAST_SAMPLES):
        limiter.sample(latency, seconds, in_flight, Ending.OK, now)


def learned(limit: int = 100) -> tuple[Limiter, Latency]:
    """A limiter that has seen what its method takes unhindered."""
    limiter, latency = Limiter(limit, 10, 1000), Latency()
    window(limiter, latency, FAST, 1, 0.0)
    assert (limiter.limit, latency.baseline) == (limit, FAST)
    return limiter, latency


class TestTheLimit:
    def test_falls_while_calls_are_slow_but_not_below_the_least(self) -> None:
        limiter, latency = learned()
        seen = [limiter.limit]
        for number in range(1, 60):
            window(limiter, latency, 10 * FAST, limiter.limit, number * WINDOW, queued=True)
            seen.append(limiter.limit)
        assert seen == sorted(seen, reverse=True)
        assert 10 <= limiter.limit < 20

    def test_grows_while_it_is_in_use_and_calls_are_not_slow(self) -> None:
        limiter, latency = learned(20)
        for number in range(1, 21):
            window(limiter, latency, FAST * 1.2, limiter.limit, number * WINDOW)
        # From 20 to hundreds in two seconds, so that a start under load is short.
        assert 300 < limiter.limit <= 1000
        for number in range(21, 40):
            window(limiter, latency, FAST, limiter.limit, number * WINDOW)
        assert limiter.limit == 1000

    def test_stays_when_it_is_not_in_use_however_slow_calls_are(self) -> None:
        limiter, latency = learned()
        window(limiter, latency, 50 * FAST, limiter.limit // 2 - 1, WINDOW)
        assert limiter.limit == 100

    def test_is_looked_at_once_a_window_and_with_samples_enough(self) -> None:
        limiter, latency = learned()
        told = [limiter.sample(latency, FAST, 100, Ending.OK, WINDOW) for _ in range(LEAST_SAMPLES + 1)]
        assert told == [False] * (LEAST_SAMPLES - 1) + [True, False]
        assert not any(limiter.sample(latency, FAST, 100, Ending.OK, 1.5 * WINDOW) for _ in range(50))

    def test_a_change_in_the_mix_of_methods_is_no_slowness(self) -> None:
        limiter, quick = learned()
        slow = Latency()
        window(limiter, slow, 100 * FAST, 1, WINDOW)
        window(limiter, slow, 100 * FAST, 100, 2 * WINDOW)
        assert limiter.limit > 100
        assert (quick.baseline, slow.baseline) == (FAST, 100 * FAST)

    def test_calls_that_take_no_time_at_all_do_no_harm(self) -> None:
        limiter, latency = Limiter(20, 10, 1000), Latency()
        window(limiter, latency, 0.0, 20, 0.0)
        window(limiter, latency, 0.0, 20, WINDOW)
        assert limiter.limit > 20

    @pytest.mark.parametrize(
        ("initial", "least", "most", "limit"), [(20, 10, 8, 8), (5, 10, 100, 10), (20, 10, 100, 20)]
    )
    def test_begins_within_its_bounds(self, initial: int, least: int, most: int, limit: int) -> None:
        limiter = Limiter(initial, least, most)
        assert limiter.limit == limit
        assert repr(limiter) == f"<Limiter {limit} of {min(least, most)}..{most}>"


class TestTheBaseline:
    def test_an_overload_does_not_become_the_norm(self) -> None:
        limiter, latency = learned()
        for number in range(1, 301):  # half a minute, three times as slow
            window(limiter, latency, 3 * FAST, 100, number * WINDOW, queued=True)
        assert latency.baseline < 2 * FAST

    def test_a_method_that_has_become_slower_is_believed_in_a_while(self) -> None:
        limiter, latency = learned()
        for number in range(1, 301):
            window(limiter, latency, 3 * FAST, 5, number * WINDOW)
        assert latency.baseline == pytest.approx(3 * FAST, rel=0.02)

    def test_one_that_has_become_quicker_at_once(self) -> None:
        limiter, latency = learned()
        for number in range(1, 11):
            window(limiter, latency, FAST / 2, 5, number * WINDOW)
        assert latency.baseline == pytest.approx(FAST / 2, rel=0.05)


class TestEndings:
    def test_failing_fast_is_not_being_fast(self) -> None:
        limiter, latency = learned()
        assert not limiter.sample(latency, 0.0001, 50, Ending.FAILED, 10.0)
        assert latency.count == 0
        assert latency.median == pytest.approx(FAST, rel=0.6)

    def test_a_cancelled_call_counts_only_for_how_slow_it_already_was(self) -> None:
        limiter, latency = learned()
        limiter.sample(latency, FAST / 2, 50, Ending.CANCELLED, 10.0)
        assert latency.count == 0
        limiter.sample(latency, FAST * 2, 50, Ending.CANCELLED, 10.0)
        assert latency.count == 1


def test_the_median_finds_the_middle_and_not_the_mean() -> None:
    limiter, latency = Limiter(20, 10, 1000), Latency()
    assert latency.median == 0.0  # unknown
    for number in range(400):
        # Two of three are fast, the third takes a second: the mean is over 300 ms.
        limiter.sample(latency, 1.0 if number % 3 == 0 else FAST, 1, Ending.OK, 0.0)
    # Each call moves it by a step of 5 %: the last few decide how far off it is.
    assert latency.median == pytest.approx(FAST, rel=0.2)
    assert repr(Latency()) == "<Latency baseline=0.0ms median=0.0ms>"
