"""``python -m services.order``: one replica of the order service."""

import contextlib
import sys
import uuid

import mesh.aio
from mesh.server.settings import ServerSettings
from services.common import process
from services.common.database import Database
from services.common.rpc import reject_unparsable
from services.events.nats import NatsBus
from services.events.relay import Relay
from services.order.servicer import OrderServicer
from services.order.settings import OrderSettings
from services.order.store import VERSIONS, OrderStore, outbox
from weft.order.v1 import order_pb2_grpc
from weft.user.v1 import user_pb2_grpc


async def serve(database: Database, own: OrderSettings, server: ServerSettings) -> int:
    """Serve the orders in ``database``, and relay their events, until signalled to stop; returns the exit code."""
    try:
        channel = mesh.aio.insecure_channel(own.user_service)
    except ValueError as error:
        raise process.CannotStartError(f"MESH_USER_SERVICE={own.user_service!r}: {error}") from error
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(channel)
        if own.nats_url:
            bus = await stack.enter_async_context(NatsBus(own.nats_url))
            # Exited after the server has stopped and before the bus and the database close, so that the last events
            # are published.
            await stack.enter_async_context(Relay(database, outbox, bus, server.instance_id or str(uuid.uuid4())))
        servicer = OrderServicer(OrderStore(database), user_pb2_grpc.UserServiceStub(channel), own)
        add = reject_unparsable(order_pb2_grpc.add_OrderServiceServicer_to_server)
        return await mesh.aio.serve([(add, servicer)], server)


if __name__ == "__main__":
    sys.exit(process.main("order", VERSIONS, serve, OrderSettings))
