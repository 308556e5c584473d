"""What the order service is told, beside what every service is."""

from __future__ import annotations

from typing import Literal

import pydantic

from services.events.settings import EventSettings


class OrderSettings(EventSettings):
    """The order service's own settings."""

    user_service: str = pydantic.Field(
        default="mesh:///weft.user.v1.UserService", description="the user service, as a target of the mesh"
    )
    user_away: Literal["refuse", "accept"] = pydantic.Field(
        default="refuse",
        description="what becomes of orders while the user service is away: refuse them, or accept them for users that "
        "it has answered for before",
    )
    user_timeout: float = pydantic.Field(
        default=2.0, gt=0, le=60, description="seconds that the user service has to answer before it counts as away"
    )
    watch_interval: float = pydantic.Field(
        default=0.25, gt=0, le=60, description="seconds between two looks for what other replicas changed, for watches"
    )
