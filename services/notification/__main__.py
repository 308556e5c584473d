"""``python -m services.notification``: one replica of the notification service."""

import contextlib
import sys

import mesh.aio
from mesh.server.settings import ServerSettings
from services.common import process
from services.common.database import Database
from services.common.rpc import reject_unparsable
from services.events.nats import NatsBus
from services.events.settings import EventSettings
from services.notification.consumer import CONSUMER, EVENT_TYPES, OrderEvents
from services.notification.servicer import NotificationServicer
from services.notification.store import VERSIONS, NotificationStore
from weft.notification.v1 import notification_pb2_grpc


async def serve(database: Database, settings: EventSettings, server: ServerSettings) -> int:
    """Serve the notifications in ``database``, and process events, until signalled to stop; returns the exit code."""
    store = NotificationStore(database)
    add = reject_unparsable(notification_pb2_grpc.add_NotificationServiceServicer_to_server)
    async with contextlib.AsyncExitStack() as stack:
        if settings.nats_url:
            bus = await stack.enter_async_context(NatsBus(settings.nats_url))
            # Exited after the server has stopped and before the bus and the database close, so that events in progress
            # are finished.
            await stack.enter_async_context(bus.consume(CONSUMER, EVENT_TYPES, OrderEvents(store)))
        return await mesh.aio.serve([(add, NotificationServicer(store))], server)


if __name__ == "__main__":
    sys.exit(process.main("notification", VERSIONS, serve, EventSettings))
