"""How much a call matters: Google's SRE book, "Handling Overload"."""

from __future__ import annotations

import enum

CRITICALITY = "weft-criticality"
"""The metadata key that says how much a call matters: CRITICAL_PLUS, CRITICAL, SHEDDABLE_PLUS or SHEDDABLE."""


class Criticality(enum.IntEnum):
    """How much a call matters, from the last to be shed to the first. Calls that say nothing are CRITICAL."""

    CRITICAL_PLUS = 0
    CRITICAL = 1
    SHEDDABLE_PLUS = 2
    SHEDDABLE = 3


BY_NAME = {criticality.name: criticality for criticality in Criticality}
"""The values of the metadata key."""

SHARES = (1.0, 1.0, 0.9, 0.8)
"""How much of a limit calls of each criticality may fill: the sheddable leave room, so that the rest seldom wait."""
