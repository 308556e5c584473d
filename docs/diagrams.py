"""docs/diagrams.md: the breaker's states, from its transition table, and the messages between a flow and its driver,
from the types in mesh/model.py."""

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

Outlier detection keeps one for each endpoint ([balancing.md](balancing.md)). An endpoint that is CLOSED gets calls.
OPEN means ejected: it gets none. HALF_OPEN gets a single call, the probe; PROBING waits for its outcome. In a state
from which an event has no arrow, the event is ignored.
"""

FLOW = """
## A call's flow and its driver

`call_flow` makes every decision about a call and does no IO: it yields steps, and is sent wake-ups, which say what
happened and when. A driver performs the steps: there is one for blocking calls, and an event-driven one for futures,
streams and asyncio. The flow ends by returning a `Verdict`.
"""

RULES = """
A wake-up may arrive at any time, even for an attempt that has already ended; the flow then simply decides again. So a
driver may wake it early, or more than once. Closing a flow before its verdict releases its in-flight counts.
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
        *_one_of("the flow yields a step", steps),
        *_one_of("the driver sends a wake-up", wakes),
        "    end",
        f"    flow->>driver: {model.Verdict.__name__}: {_about(model.Verdict)}",
        "    driver->>caller: the response or the error",
        "```",
    ]


def _one_of(what: str, messages: list[str]) -> list[str]:
    lines = [f"        alt {what}"]
    for message in messages:
        lines += [f"            {message}", "        else"]
    return [*lines[:-1], "        end"]


def _wakes() -> list[type]:
    """The types of wake-ups, with their subclasses."""
    return [
        kind
        for wake in get_args(model.Wake)
        for kind in (wake, *wake.__subclasses__())
        if kind.__module__ == model.__name__
    ]


def _about(kind: type) -> str:
    """The first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(kind) or "").split())
    found = re.match(r"(?:(?:Step|Wake-up): )?(.+?)[.,;:](?: |$)", text)
    if found is None:
        raise ValueError(f"{kind.__name__} has no docstring")
    said = found[1].replace("``number``", "N").replace("``", "")
    return said[0].lower() + said[1:]
