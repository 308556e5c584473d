"""docs/diagrams.md: the breaker's states, from its table, and what a flow and its driver exchange, from the types in
mesh/model.py."""

from __future__ import annotations

import inspect
import re
from typing import get_args

from mesh import model
from mesh.policy.cluster.breaker import TRANSITIONS, State

HEAD = """\
<!-- Written by docs/generate.py from the table in the breaker's module and the types in mesh/model.py. -->
# Diagrams

## An endpoint's breaker

Outlier detection keeps one for each endpoint ([balancing.md](balancing.md)). An event that has no arrow from a state
changes nothing there. CLOSED gets calls; OPEN gets none; HALF_OPEN gets the next call, alone; PROBING waits for that
call's outcome.
"""

FLOW = """
## A call's flow and its driver

`call_flow` makes every decision of a call and does no IO: it yields steps, and is sent what happened (wake-ups, each
with the time). A driver performs the steps: one for blocking calls, one for events (futures, streams, asyncio). The
flow ends by returning a `Verdict`.
"""

RULES = """
A wake-up may come at any time, also for an attempt that is over; the flow then looks again. So a driver may wake it
early or twice. A flow that is closed half-way gives back what is in flight.
"""


def page() -> str:
    """The text of docs/diagrams.md."""
    return "\n".join([HEAD, *_breaker(), FLOW, *_flow(), RULES.rstrip(), ""])


def _breaker() -> list[str]:
    arrows = [f"    {before.name} --> {after.name}: {event.value}" for (before, event), after in TRANSITIONS.items()]
    return ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(State)).name}", *arrows, "```"]


def _flow() -> list[str]:
    steps = [f"flow->>driver: {step.__name__}: {_about(step)}" for step in get_args(model.Step)]
    wakes = [f"driver-->>flow: {wake.__name__}: {_about(wake)}" for wake in _wakes()]
    return [
        "```mermaid",
        "sequenceDiagram",
        "    participant caller",
        "    participant driver",
        "    participant flow as call_flow",
        "    caller->>driver: a call",
        "    loop until the verdict",
        *_one_of("a step", steps),
        *_one_of("then a wake-up", wakes),
        "    end",
        f"    flow->>driver: {model.Verdict.__name__}: {_about(model.Verdict)}",
        "    driver->>caller: the response or the error",
        "```",
    ]


def _one_of(what: str, messages: list[str]) -> list[str]:
    lines = [f"        alt {what}"]
    for message in messages:
        lines += [f"            {message}", "        else or"]
    return [*lines[:-1], "        end"]


def _wakes() -> list[type]:
    """The wake-ups, and those that are kinds of them."""
    return [
        kind
        for wake in get_args(model.Wake)
        for kind in (wake, *wake.__subclasses__())
        if kind.__module__ == model.__name__
    ]


def _about(kind: type) -> str:
    """What a docstring says first, on one line."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    found = re.match(r"(?:(?:Step|Wake-up): )?(.+?)[.,;:](?: |$)", text)
    if found is None:
        raise ValueError(f"{kind.__name__} has no docstring")
    return found[1].replace("``number``", "N").replace("``", "")
