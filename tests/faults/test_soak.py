"""After any number of calls, streams, stubs, channels, configs and services everything returns to its base.

The program that makes and drops them all, ``tests/soak.py``, says after each round what is left.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.processes import REPOSITORY

WARM = 2
"""Rounds after which everything that lasts is there."""

SLACK = {"descriptors": 4, "threads": 4, "tasks": 4, "timers": 4}
"""What may come and go. A round opens and closes 15 channels, so that one of anything that is kept for each shows."""

PER_CHANNEL = ("Channel", "Assembly", "Cluster", "Node", "Subchannel", "Pool", "Resolver", "Roster", "_StateWatch")
CHANNELS = 4
CALLS = 100
"""Objects of one class that may come and go: for each channel, and of any other kind (a round makes 2,000 calls, and
waits of the last of them may still be running)."""

GROWTH = 6.0
"""Megabytes that a process may grow by: what allocators and caches take until they level off."""


def rounds(seconds: float, count: int, within: float) -> list[dict[str, Any]]:
    """What the program says of each round."""
    command = [sys.executable, "-m", "tests.soak", str(seconds), str(count)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=within, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def at_base(measured: list[dict[str, Any]]) -> None:
    """Fails unless the last rounds left no more than the first ones did."""
    base, last = measured[WARM - 1 : WARM + 1], measured[-2:]
    for name, slack in SLACK.items():
        least = min(each[name] for each in last)
        assert least <= max(each[name] for each in base) + slack, (name, [each[name] for each in measured])
    grown = {}
    for kind in {kind for each in last for kind in each["objects"]}:
        slack = CHANNELS if kind.endswith(PER_CHANNEL) else CALLS
        before = max(each["objects"].get(kind, 0) for each in base)
        after = min(each["objects"].get(kind, 0) for each in last)
        if after > before + slack:
            grown[kind] = before, after
    assert not grown


@pytest.mark.faults
@pytest.mark.timeout(120)
def test_a_few_rounds_of_everything_leave_nothing() -> None:
    at_base(rounds(0, 8, within=100))


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_ninety_seconds_of_everything_leave_nothing_and_memory_levels_off() -> None:
    measured = rounds(90, 20, within=220)
    at_base(measured)
    memory = [each["memory"] for each in measured]
    assert min(memory[-3:]) <= memory[len(memory) // 3] + GROWTH, memory
