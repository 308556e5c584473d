"""How much a call matters: Google's SRE book, "Handling Overload"."""

from __future__ import annotations

import enum
from collections.abc import Iterable

CRITICALITY = "weft-criticality"
"""The metadata key that says how much a call matters: CRITICAL_PLUS, CRITICAL, SHEDDABLE_PLUS or SHEDDABLE."""


class Criticality(enum.IntEnum):
    """How much a call matters, from the last to be shed to the first. Calls without the metadata are CRITICAL."""

    CRITICAL_PLUS = 0
    CRITICAL = 1
    SHEDDABLE_PLUS = 2
    SHEDDABLE = 3


BY_NAME = {criticality.name: criticality for criticality in Criticality}
"""The values of the metadata key."""

LIMIT_SHARES = (1.0, 1.0, 0.9, 0.8)
"""The share of a limit that each criticality may use: sheddable calls leave room, so that others rarely wait."""


def criticality_of(name: str) -> Criticality:
    """The criticality with that name; CRITICAL for any other text."""
    return BY_NAME.get(name, Criticality.CRITICAL)


def criticality_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> Criticality:
    """The criticality in a call's metadata."""
    for key, value in metadata or ():
        if key == CRITICALITY:
            return BY_NAME.get(str(value), Criticality.CRITICAL)
    return Criticality.CRITICAL
