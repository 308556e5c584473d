"""Settings of a service that publishes or consumes events."""

from __future__ import annotations

import pydantic

from services.common.settings import Settings


class EventSettings(Settings):
    """The settings of a service with events. Settings of one service are in a subclass."""

    nats_url: str = pydantic.Field(
        default="",
        description="the broker, nats://host:port, or several, comma-separated; if empty, events are neither published "
        "nor consumed",
    )

    @pydantic.field_validator("nats_url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        for each in filter(None, url.split(",")):
            if not each.startswith(("nats://", "tls://")) or not each.partition("://")[2]:
                raise ValueError("expected nats://host:port")
        return url
