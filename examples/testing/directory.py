"""Client code as it runs in production: it calls users over the mesh, and knows nothing of tests."""

import time
from collections.abc import Callable
from types import TracebackType

import grpc

import mesh
from weft.user.v1 import user_pb2, user_pb2_grpc


class Directory:
    """The names of users, kept for a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = mesh.insecure_channel("mesh:///weft.user.v1.UserService")  # MESH_REGISTRY has the registry
        self._users = user_pb2_grpc.UserServiceStub(self._channel)
        self._clock = clock
        self._names: dict[str, tuple[str, float]] = {}

    def name_of(self, user_id: str) -> str:
        """The user's name; "nobody" when there is no such user. Raises grpc.RpcError when it can't be found out."""
        name, until = self._names.get(user_id, ("", 0.0))
        if self._clock() < until:
            return name
        try:
            name = self._users.GetUser(user_pb2.GetUserRequest(id=user_id), timeout=5).user.name
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            name = "nobody"
        self._names[user_id] = name, self._clock() + 60
        return name

    def __enter__(self) -> "Directory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()
