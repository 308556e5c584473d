"""``FakeClock``: time that only the test moves."""

from __future__ import annotations

import pytest

from mesh.testing import FakeClock


def test_time_stands_still_until_the_test_moves_it() -> None:
    clock = FakeClock(100.0)
    assert (clock(), clock()) == (100.0, 100.0)
    clock.advance(2.5)
    assert clock() == 102.5


def test_a_clock_that_ticks_shows_no_instant_twice() -> None:
    clock = FakeClock(tick=1.0)
    assert [clock() for _ in range(3)] == [0.0, 1.0, 2.0]


def test_it_jumps_in_both_directions_but_advances_only_forwards() -> None:
    clock = FakeClock(100.0)
    clock.jump(7.0)
    assert clock() == 7.0
    with pytest.raises(ValueError, match="expected 0 seconds or more, got -1"):
        clock.advance(-1)
    with pytest.raises(ValueError, match="expected 0 seconds or more, got nan"):
        clock.advance(float("nan"))
    assert clock() == 7.0


def test_it_says_what_time_it_is() -> None:
    assert repr(FakeClock(1.5)) == "<FakeClock 1.5>"
