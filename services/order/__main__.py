"""``python -m services.order``: one replica of the order service."""

import sys

import mesh.aio
from mesh.server.settings import ServerSettings
from services import process
from services.database import Database
from services.order.servicer import OrderServicer
from services.order.store import VERSIONS, OrderStore
from weft.order.v1 import order_pb2_grpc
from weft.user.v1 import user_pb2_grpc


async def serve(database: Database, settings: ServerSettings) -> int:
    """Serve the orders in ``database`` until told to stop; returns the exit code."""
    async with mesh.aio.insecure_channel("mesh:///weft.user.v1.UserService") as channel:
        servicer = OrderServicer(OrderStore(database), user_pb2_grpc.UserServiceStub(channel))
        return await mesh.aio.serve([(order_pb2_grpc.add_OrderServiceServicer_to_server, servicer)], settings)


if __name__ == "__main__":
    sys.exit(process.main("order", VERSIONS, serve))
