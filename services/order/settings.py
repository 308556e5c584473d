"""The order service's settings."""

from __future__ import annotations

from typing import Literal

import pydantic

from services.events.settings import EventSettings


class OrderSettings(EventSettings):
    """Settings of the order service only, beside those of every service."""

    user_service: str = pydantic.Field(
        default="mesh:///weft.user.v1.UserService", description="the user service's target"
    )
    user_away: Literal["refuse", "accept"] = pydantic.Field(
        default="refuse",
        description="what happens to new orders while the user service is unavailable: refuse all, or accept those of "
        "users it has confirmed before",
    )
    user_timeout: float = pydantic.Field(
        default=2.0, gt=0, le=60, description="seconds after which the user service counts as unavailable"
    )
    watch_interval: float = pydantic.Field(
        default=0.25,
        gt=0,
        le=60,
        description="seconds between two checks for changes made by other replicas, for watches",
    )
