"""The error text of a call for which there was no endpoint: the endpoints, their states, since when, and why.

It is made when a call fails, on any thread, while states may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mesh.model import Connectivity

LISTED = 3
"""How many endpoints an error names."""


@dataclass(frozen=True, slots=True)
class EndpointState:
    """An endpoint's state, and since when (monotonic seconds)."""

    state: Connectivity
    since: float


def describe(
    states: Mapping[str, EndpointState], causes: Mapping[str, str], now: float, waited: float | None = None
) -> str:
    """ "0 of 3 endpoints connected after 10.0 s: 127.0.0.1:5 CONNECTING for 9.8 s, ...", those with a cause first.

    ``waited``: how long the call has waited; None when it didn't.
    """
    endpoints = sorted(states.items(), key=lambda item: not causes.get(item[0]))
    listed = [_one(address, each, causes.get(address, ""), now) for address, each in endpoints[:LISTED]]
    if len(endpoints) > LISTED:
        listed.append(f"and {len(endpoints) - LISTED} more")
    text = ", ".join(listed)
    if waited is None and len(endpoints) == 1:
        return text
    ready = sum(each.state == Connectivity.READY for each in states.values())
    after = "" if waited is None else f" after {waited:.1f} s"
    return f"{ready} of {len(endpoints)} endpoints connected{after}: {text}"


def _one(address: str, state: EndpointState, cause: str, now: float) -> str:
    if cause and state.state == Connectivity.TRANSIENT_FAILURE:
        return f"{address}: {cause}"
    return f"{address} {state.state.name} for {max(0.0, now - state.since):.1f} s"
