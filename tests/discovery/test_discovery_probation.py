"""The flap guard: who stays though an answer leaves it out, and for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.discovery.probation import Probation
from mesh.model import Endpoint


def apply(probation: Probation, names: str, now: float) -> str:
    return "".join(endpoint.address for endpoint in probation.apply([Endpoint(name) for name in names], now))


def test_an_endpoint_that_one_answer_leaves_out_stays() -> None:
    probation = Probation(10)
    assert apply(probation, "ba", now=0) == "ab"
    assert apply(probation, "b", now=5) == "ab"
    assert probation.until == 15
    assert repr(probation) == "<Probation present=1 missing=1>"
    assert apply(probation, "ab", now=6) == "ab"
    assert probation.until is None


def test_one_that_stays_away_is_let_go() -> None:
    probation = Probation(10)
    apply(probation, "ab", now=0)
    apply(probation, "b", now=5)
    assert apply(probation, "b", now=14.9) == "ab"
    assert apply(probation, "b", now=15) == "b"
    assert probation.until is None


def test_a_name_server_that_gives_a_part_at_a_time_is_put_together() -> None:
    probation = Probation(10)
    assert [apply(probation, part, now=index * 4) for index, part in enumerate(["ab", "bc", "ca", "ab"])] == [
        "ab",
        "abc",
        "abc",
        "abc",
    ]


def test_what_an_endpoint_says_of_itself_is_the_latest() -> None:
    probation = Probation(10)
    probation.apply([Endpoint("a", weight=1)], now=0)
    assert probation.apply([Endpoint("a", weight=2)], now=1) == (Endpoint("a", weight=2),)
    assert probation.apply([], now=2) == (Endpoint("a", weight=2),)


@given(st.lists(st.tuples(st.sets(st.sampled_from("abcd")), st.floats(0, 7)), max_size=20))
def test_who_is_there_is_who_was_seen_within_the_hold(answers: list[tuple[set[str], float]]) -> None:
    probation = Probation(10)
    seen_until: dict[str, float] = {}  # the first answer without it
    present: set[str] = set()
    now = 0.0
    for names, pause in answers:
        now += pause
        for name in present - names:
            seen_until[name] = now
        present = names
        expected = names | {name for name, left in seen_until.items() if now - left < 10}
        # An instant on the edge may be rounded either way.
        edge = {name for name, left in seen_until.items() if abs(now - left - 10) < 1e-6} - names
        assert set(apply(probation, "".join(names), now)) | edge == expected | edge
