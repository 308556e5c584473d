"""A call's deadline, which covers all of its attempts, backoffs and hedges (docs/correctness.md, D1).

Instants are monotonic seconds; math.inf means no deadline.
"""

from __future__ import annotations

import math

from mesh.config.settings import MethodPolicy


def deadline_of(now: float, timeout: float | None, inherited: float | None, policy: MethodPolicy) -> float:
    """The earliest of: the call's own ``timeout`` (or the method's default), the method's maximum, the inbound call's
    deadline."""
    own = policy.default_timeout if timeout is None else timeout
    return min(now + own, now + policy.timeout, math.inf if inherited is None else inherited)
