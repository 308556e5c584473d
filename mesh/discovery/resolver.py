"""The interface of resolvers: an asynchronous stream of updates."""

from __future__ import annotations

import abc
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from mesh.model import Endpoint


@dataclass(frozen=True, slots=True)
class Update:
    """A resolver's result.

    ``endpoints``: all current endpoints; None when resolution failed, so that the previous ones stay.
    ``error``: why resolution failed, or why there are no endpoints.
    ``final``: if no endpoints have ever been known, calls fail at once with ``error`` (a name that doesn't exist, a
    registry that refuses connections) instead of waiting until their deadline (a registry that doesn't respond).
    ``service_config``: the service config's JSON, empty when there is none; None when it isn't known, so that the
    previous one stays.
    """

    endpoints: tuple[Endpoint, ...] | None
    error: str = ""
    final: bool = False
    service_config: str | None = None


class Resolver(abc.ABC):
    """Resolves one target to its endpoints. The constructor does no IO; ``updates`` does.

    ``configures``: its updates have a service config, so calls wait for the first one that has.
    ``source``: the source of its results, for error texts.
    """

    configures = False
    source = "the resolver"

    @abc.abstractmethod
    def updates(self) -> AsyncGenerator[Update, None]:
        """Yield the current endpoints, then each change, until the iterator is closed, which releases its resources.

        It doesn't raise for failures outside the process (a server that is down or sends garbage): they become an
        ``Update`` with an ``error``, and the resolver retries with backoff and jitter.
        """

    def resolve_now(self) -> None:  # noqa: B027 - a hint that a resolver may ignore
        """An endpoint has failed: re-resolve soon, if this resolver polls. Called on the resolver's loop."""
