"""What a service that publishes or consumes events is told by its environment."""

from __future__ import annotations

import pydantic

from services.common.settings import Settings


class EventSettings(Settings):
    """The settings of a service with events; a service's own stand in a subclass."""

    nats_url: str = pydantic.Field(
        default="",
        description="the broker, nats://host:port, several with commas between; without one, no event comes or goes",
    )

    @pydantic.field_validator("nats_url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        for each in filter(None, url.split(",")):
            if not each.startswith(("nats://", "tls://")) or not each.partition("://")[2]:
                raise ValueError("should be nats://host:port")
        return url
