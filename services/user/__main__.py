"""``python -m services.user``: one replica of the user service."""

import sys

import mesh.aio
from mesh.server.settings import ServerSettings
from services.common import process
from services.common.database import Database
from services.common.rpc import reject_unparsable
from services.common.settings import Settings
from services.user.servicer import UserServicer
from services.user.servicer_v2 import UserServicerV2
from services.user.store import VERSIONS, UserStore
from weft.user.v1 import user_pb2_grpc
from weft.user.v2 import user_pb2_grpc as user_v2_pb2_grpc


async def serve(database: Database, own: Settings, server: ServerSettings) -> int:  # noqa: ARG001
    """Serve the users in ``database``, in both API versions, until signalled to stop; returns the exit code."""
    store = UserStore(database)
    return await mesh.aio.serve(
        [
            (reject_unparsable(user_pb2_grpc.add_UserServiceServicer_to_server), UserServicer(store)),
            (reject_unparsable(user_v2_pb2_grpc.add_UserServiceServicer_to_server), UserServicerV2(store)),
        ],
        server,
    )


if __name__ == "__main__":
    sys.exit(process.main("user", VERSIONS, serve, Settings))
