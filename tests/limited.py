"""Runs code in a child process whose memory is limited, so that what takes too much fails rather than the machine."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.processes import REPOSITORY

_LIMIT = """\
import resource
with open("/proc/self/statm") as statm:
    had = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (had + {more}, had + {more}))
"""


def run(imports: str, code: str, *arguments: str, more: int, within: float = 20.0) -> tuple[str, float]:
    """What ``code`` prints, with ``more`` bytes of memory beside those that a Python with ``imports`` has, and the
    seconds that it all took. AssertionError when it fails or isn't over ``within`` seconds."""
    began = time.monotonic()
    program = f"{imports}\n{_LIMIT.format(more=more)}{code}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not over within {within:g} s: {error.output!r}") from None
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout, time.monotonic() - began
