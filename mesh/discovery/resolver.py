"""What every resolver is: an asynchronous stream of updates."""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from mesh.model import Endpoint


@dataclass(frozen=True, slots=True)
class Update:
    """What a resolver has learned.

    ``endpoints``: all endpoints there are now; None when the resolver could not find out, and what was known holds.
    ``error``: why it could not find out, or why there are none.
    ``final``: while no endpoints were ever known, calls fail at once with ``error`` (a name that doesn't exist, a
    registry that refuses connections) instead of waiting until their deadline (a registry that doesn't answer).
    ``service_config``: the JSON of the config that holds for the service, empty when there is none; None when this says
    nothing of it, and what was known holds.
    """

    endpoints: tuple[Endpoint, ...] | None
    error: str = ""
    final: bool = False
    service_config: str | None = None


class Resolver(abc.ABC):
    """Finds the endpoints of one target. Made without IO; everything happens in ``updates``.

    ``configures``: its updates bring a service config, so calls wait for the first one that does.
    ``source``: what it asks, as errors name it.
    """

    configures = False
    source = "the resolver"

    @abc.abstractmethod
    def updates(self) -> AsyncGenerator[Update, None]:
        """Yield what is known, then each change, for as long as it is iterated; closing the iterator frees all of it.

        Never raises for what happens outside the process (a server away, garbage from it): that becomes an ``Update``
        with an ``error``, and the resolver tries again by itself, with backoff and jitter.
        """

    def resolve_now(self) -> None:  # noqa: B027 - a hint that a resolver may ignore
        """An endpoint failed: look again soon, if looking is what this resolver does. Called on the resolver's loop."""
