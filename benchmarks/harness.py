"""What the benchmarks share: replicas, interleaved rounds, and a table of results."""

from __future__ import annotations

import contextlib
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Work = Callable[[int], None]
"""Does what is measured, so many times."""


@contextlib.contextmanager
def replicas(count: int, *arguments: str) -> Iterator[list[int]]:
    """Runs ``count`` replicas, a process each; yields their ports."""
    command = [sys.executable, "-m", "benchmarks.replica", *arguments]
    with contextlib.ExitStack() as stack:
        ports = []
        for _ in range(count):
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdout is not None
            assert process.stdin is not None
            stack.callback(process.stdin.close)
            ports.append(int(process.stdout.readline()))
        yield ports


def cpu_seconds(work: Work, times: int) -> float:
    """CPU seconds of this process per repetition."""
    begun = time.process_time()
    work(times)
    return (time.process_time() - begun) / times


def interleaved(sides: Mapping[str, Work], times: int, rounds: int = 12) -> dict[str, list[float]]:
    """CPU seconds per repetition of each side, round by round; the order rotates with each round."""
    for work in sides.values():
        work(max(times // 4, 1))  # warm up
    results: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            results[name].append(cpu_seconds(sides[name], times))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def ratio(results: Mapping[str, list[float]], side: str, against: str) -> float:
    """The median of the rounds' ratios of one side's cost to another's."""
    return statistics.median(a / b for a, b in zip(results[side], results[against], strict=True))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. ``target``: the most that ``measured`` should be; math.inf: no target."""

    what: str
    against: str
    measured: float
    target: float
    unit: str = ""

    def __str__(self) -> str:
        if self.target == math.inf:
            return f"{self.what:<58} {self.against:<34} {self.measured:>8.3f}{self.unit:<3} {'':>9}  for comparison"
        verdict = "met" if self.measured <= self.target else "NOT met"
        return (
            f"{self.what:<58} {self.against:<34} {self.measured:>8.3f}{self.unit:<3}"
            f" {'≤ ' + format(self.target, 'g') + self.unit:>9}  {verdict}"
        )


def table(title: str, rows: list[Row]) -> None:
    """Print the rows."""
    print(f"\n{title}\n{'what':<58} {'against':<34} {'measured':>11} {'target':>9}")
    for row in rows:
        print(row)
