"""Log lines about events: one a second of a kind at most, and none is lost without a word."""

from __future__ import annotations

import logging
import threading

import pytest

from mesh import lines
from mesh.lines import Limit
from tests.processes import eventually

LOG = logging.getLogger("mesh.test")
TO = (LOG, logging.INFO)


def test_a_flood_of_one_kind_is_a_line_a_second_that_says_how_many_were_left_out() -> None:
    limit = Limit()
    said = [limit.take("lost", at / 100, TO, f"lost {at}") for at in range(250)]
    assert [line for line in said if line] == [
        "lost 0",
        "lost 100 (99 more such lines left out)",
        "lost 200 (99 more such lines left out)",
    ]


def test_the_last_line_of_a_flood_is_logged_when_its_second_is_over() -> None:
    limit = Limit()
    for text in ("lost a", "lost b", "lost c"):
        limit.take("lost", 0.0, TO, text)
    assert limit.due(0.9) == []
    assert limit.due(1.0) == [(TO, "lost c (1 more such line left out)")]
    assert (limit.due(5.0), limit.holding) == ([], False)


def test_kinds_do_not_wait_for_each_other() -> None:
    limit = Limit()
    assert limit.take("lost", 0.0, TO, "lost a") == "lost a"
    assert limit.take("added", 0.0, TO, "added b") == "added b"
    limit.take("lost", 0.5, TO, "lost b")
    assert limit.due(1.2) == [(TO, "lost b")]


def test_a_line_that_is_held_back_goes_out_with_the_next_of_its_kind() -> None:
    limit = Limit()
    assert limit.take("lost", 0.0, TO, "lost a")
    assert not limit.take("lost", 0.1, TO, "lost b")
    assert limit.take("lost", 3.0, TO, "lost c") == "lost c (1 more such line left out)"


def test_lines_are_logged_at_info(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mesh.test"):
        lines.info(LOG, "begun", "%s begun", "a")
    with caplog.at_level(logging.INFO, "mesh.test"):
        lines.info(LOG, "begun", "%s begun", "b")
        lines.info(LOG, "done", "100 %")
    assert caplog.messages == ["b begun", "100 %"]


@pytest.mark.slow
def test_what_was_held_back_is_logged_soon(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mesh.test"):
        for each in "abc":
            lines.info(LOG, "lost", "%s lost", each)
        assert caplog.messages == ["a lost"]
        eventually(lambda: caplog.messages == ["a lost", "c lost (1 more such line left out)"])
        eventually(lambda: not any(thread.name == "mesh-lines" for thread in threading.enumerate()))
        for each in "de":
            lines.info(LOG, "lost", "%s lost", each)
        eventually(lambda: caplog.messages[-1].startswith("e lost"))
