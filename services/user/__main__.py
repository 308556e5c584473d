"""``python -m services.user``: one replica of the user service."""

import sys

import mesh.aio
from mesh.server.settings import ServerSettings
from services import process
from services.database import Database
from services.user.servicer import UserServicer
from services.user.store import VERSIONS, UserStore
from weft.user.v1 import user_pb2_grpc


async def serve(database: Database, settings: ServerSettings) -> int:
    """Serve the users in ``database`` until told to stop; returns the exit code."""
    servicer = UserServicer(UserStore(database))
    return await mesh.aio.serve([(user_pb2_grpc.add_UserServiceServicer_to_server, servicer)], settings)


if __name__ == "__main__":
    sys.exit(process.main("user", VERSIONS, serve))
