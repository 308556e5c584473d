"""What both servers share: how they start, serve, register and drain. ``sync`` and ``aio`` do the waiting.

``_assemble`` defines the order of a start, ``_drain_steps`` that of a drain.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2_grpc  # type: ignore[import-untyped]

from mesh import context as mesh_context
from mesh import deprecation, lines, variables
from mesh.health import NOT_SERVING, SERVING, HealthStatuses
from mesh.listening import Listener
from mesh.policy.server.reasons import Reason
from mesh.server.handlers.admission import ServerAdmission
from mesh.server.handlers.registrar import HandlerRegistrar, Servicers
from mesh.server.handlers.scope import LOG, Handler, scope_from_metadata
from mesh.server.listening import advertised_address, display_address, listen
from mesh.server.readiness import Readiness
from mesh.server.registration import Registration
from mesh.server.settings import ServerSettings
from weft.mesh.v1 import registry_pb2 as pb

SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""Signals that stop a server: the first drains it, the second kills it."""

BAD_START = 2
"""The exit code when a server can't start with its settings."""

START_ERRORS = (ValueError, OSError)
"""Errors of a server that can't start with its settings."""

KILL_TIMEOUT = 1.0
"""Seconds that a server gets to stop once its calls are cancelled: when it is killed, or its grace is over."""

_S = TypeVar("_S")
_A = TypeVar("_A", bound=ServerAdmission)
_R = TypeVar("_R")
_R_co = TypeVar("_R_co", covariant=True)


class _Registered(Protocol[_R_co]):
    def close(self, seconds: float) -> _R_co: ...


class ServerBase(Generic[_S, _A, _R]):
    """The parts of a server that never wait. ``_S``: gRPC's server. ``_A``: its admission. ``_R``: what a step of a
    drain returns: None, or a coroutine."""

    _KIND = "mesh"

    admission: _A
    _health: HealthStatuses

    def __init__(self, servicers: Servicers, settings: ServerSettings | None = None) -> None:
        variables.warn_once()
        self.settings = settings if settings is not None else ServerSettings.from_env()
        self.services: tuple[str, ...] = ()
        self.port = 0
        self.address = ""
        self._servicers = servicers
        self._listener = Listener()
        self._server: _S | None = None
        self._registration: _Registered[_R] | None = None

    @property
    def gate(self) -> _A:
        """Deprecated: use ``admission``."""
        deprecation.warn("Server.gate", "Server.admission")
        return self.admission

    def _assemble(self, server: Any, wrap: Callable[[Handler, str], Handler]) -> Readiness:
        """Add servicers, health and the other built-in services to ``server``, and bind its port. Doesn't start it."""
        settings = self.settings
        readiness = Readiness(settings.ready)
        registrar = HandlerRegistrar(server, wrap, self._on_arrival, settings.observer)
        registrar.add(self._servicers)
        self.services = registrar.services
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        _add_reflection((*self.services, health.SERVICE_NAME), server, settings)
        _add_channelz(server, settings)
        self._listener = listen(server, settings)
        self.port = self._listener.port
        self.address = advertised_address(settings, self.port)
        lines.info(LOG, "listening", "listening on %s", display_address(settings.listen, self.port, self.address))
        if readiness.given:
            self.admission.policy.close(Reason.STARTING)
        self._health.set(NOT_SERVING, self.services)
        return readiness

    def _on_arrival(self, call: grpc.HandlerCallDetails) -> None:
        self.admission.arrivals += 1
        mesh_context.enter(scope_from_metadata(call.invocation_metadata))

    def _begin_serving(self) -> Registration | None:
        """Accept calls. Returns the registration to start, if the settings name a registry."""
        settings = self.settings
        self.admission.policy.open()
        self._health.set(SERVING, self.services)
        lines.info(LOG, "serving", "serving %s on %s", ", ".join(self.services) or "no services", self.address)
        if not settings.registry:
            return None
        return Registration(settings.registry, instances(self.services, settings, self.address), settings.lease_ttl)

    def _drain_steps(self) -> Iterator[tuple[Callable[[float], _R], float]]:
        """The steps of a drain, in order: what to call, and the seconds it gets."""
        self._health.set(NOT_SERVING, self.services)
        if self._registration is not None:
            yield self._registration.close, self.settings.deregister_timeout
        yield self._wait_for_clients, self.settings.drain_wait
        self.admission.policy.close(Reason.DRAINING)
        self._end_own_streams()
        yield self._stop, self.settings.grace

    def _end_own_streams(self) -> None:
        """End the streams of the mesh's own services: a client may keep one open forever."""
        self._health.end_watches()

    def _wait_for_clients(self, seconds: float) -> _R:
        """Give clients time to notice that the server is leaving."""
        raise NotImplementedError

    def _stop(self, grace: float) -> _R:
        """Stop the server; calls get ``grace`` seconds to end."""
        raise NotImplementedError

    def __repr__(self) -> str:
        services = ", ".join(self.services) or "not started"
        return f"<{self._KIND} Server {services} on {self.address or self.settings.listen}>"


def report_bad_start(error: Exception) -> int:
    """Print one line on stderr that says why the server can't start. Returns the exit code."""
    print(error.strerror if isinstance(error, OSError) else error, file=sys.stderr)
    return BAD_START


def _add_reflection(services: Iterable[str], server: Any, settings: ServerSettings) -> None:
    """Serve reflection, if the settings ask for it and grpcio-reflection is installed."""
    if not settings.reflection:
        return
    try:
        from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]
    except ImportError:
        LOG.warning("serving without reflection: grpcio-reflection isn't installed")
        return
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)


def _add_channelz(server: Any, settings: ServerSettings) -> None:
    """Serve channelz, if grpcio-channelz is installed."""
    if not settings.channelz:
        return
    try:
        from grpc_channelz.v1 import channelz  # type: ignore[import-untyped]
    except ImportError:
        return
    channelz.add_channelz_servicer(server)


def instances(services: Iterable[str], settings: ServerSettings, address: str) -> list[pb.Instance]:
    """What to register: an instance of each service, under one id."""
    return [
        pb.Instance(
            id=settings.instance_id or address,
            service=service,
            address=address,
            locality=pb.Locality(region=settings.region, zone=settings.zone, sub_zone=settings.sub_zone),
            weight=settings.weight,
            metadata=settings.metadata,
        )
        for service in services
    ]
