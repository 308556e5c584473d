"""What the notification service promises: one notification per event, however many times it is delivered."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from mesh.server.aio import Server
from mesh.server.settings import ServerSettings
from services.common.database import Database
from services.common.errors import UnavailableError
from services.events import Event
from services.events.memory import MemoryBus
from services.notification import store as notification_store
from services.notification.consumer import CONSUMER, EVENT_TYPES, Message, OrderEvents
from services.notification.servicer import NotificationServicer
from services.notification.store import NotificationStore
from tests.services.conftest import Open, serving
from tests.services.test_shop_events import until
from weft.notification.v1 import notification_pb2 as pb
from weft.notification.v1 import notification_pb2_grpc
from weft.order.v1 import events_pb2, order_pb2

if TYPE_CHECKING:
    from weft.notification.v1.notification_pb2_grpc import NotificationServiceAsyncStub

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)
ANN, BEN = str(uuid.uuid4()), str(uuid.uuid4())


def happened(message: type[Message] = events_pb2.OrderCreated, user_id: str = ANN, order_id: str = "") -> Event:
    order = order_pb2.Order(id=order_id or str(uuid.uuid4()), user_id=user_id)
    return Event(
        str(uuid.uuid4()),
        "/weft/order",
        message.DESCRIPTOR.full_name,
        order.id,
        NOW - dt.timedelta(seconds=1),
        message(order=order).SerializeToString(),
    )


async def read(
    watch: grpc.aio.UnaryStreamCall[pb.WatchNotificationsRequest, pb.WatchNotificationsResponse],
) -> pb.WatchNotificationsResponse:
    response = await watch.read()
    assert isinstance(response, pb.WatchNotificationsResponse)
    return response


@pytest.fixture
def database(open_database: Open) -> Database:
    return open_database("notification", notification_store.VERSIONS)


@pytest.fixture
def store(database: Database) -> NotificationStore:
    return NotificationStore(database)


@pytest.fixture
def act(store: NotificationStore) -> OrderEvents:
    return OrderEvents(store, now=lambda: NOW)


@pytest.fixture
def servicer(store: NotificationStore) -> NotificationServicer:
    return NotificationServicer(store)


@pytest.fixture
async def service(servicer: NotificationServicer) -> AsyncIterator[NotificationServiceAsyncStub]:
    add = notification_pb2_grpc.add_NotificationServiceServicer_to_server
    async with serving(lambda server: add(servicer, server)) as channel:
        yield notification_pb2_grpc.NotificationServiceStub(channel)


async def test_the_migrations_create_what_the_code_expects(database: Database) -> None:
    changes = await database.read(
        lambda c: compare_metadata(MigrationContext.configure(c), notification_store.metadata)
    )
    assert changes == []


async def test_an_event_becomes_a_notification(act: OrderEvents, service: NotificationServiceAsyncStub) -> None:
    event = happened(events_pb2.OrderShipped, order_id="0a1b2c3d-0000-4000-8000-000000000000")
    await act(event)
    (told,) = (await service.ListNotifications(pb.ListNotificationsRequest())).notifications
    assert uuid.UUID(told.id).version == 4
    assert (told.user_id, told.order_id) == (ANN, event.subject)
    assert told.kind == pb.Notification.KIND_ORDER_SHIPPED
    assert told.text == "Your order 0a1b2c3d is on its way."
    assert told.event_time.ToDatetime(dt.UTC) == event.time
    assert told.create_time.ToDatetime(dt.UTC) == NOW


KINDS: dict[type[Message], pb.Notification.Kind.ValueType] = {
    events_pb2.OrderCreated: pb.Notification.KIND_ORDER_CREATED,
    events_pb2.OrderConfirmed: pb.Notification.KIND_ORDER_CONFIRMED,
    events_pb2.OrderShipped: pb.Notification.KIND_ORDER_SHIPPED,
    events_pb2.OrderDelivered: pb.Notification.KIND_ORDER_DELIVERED,
    events_pb2.OrderCancelled: pb.Notification.KIND_ORDER_CANCELLED,
}


@pytest.mark.parametrize(("message", "kind"), KINDS.items(), ids=lambda each: getattr(each, "__name__", ""))
async def test_each_event_of_an_order_has_its_notification(
    act: OrderEvents,
    service: NotificationServiceAsyncStub,
    message: type[Message],
    kind: pb.Notification.Kind.ValueType,
) -> None:
    await act(happened(message))
    (told,) = (await service.ListNotifications(pb.ListNotificationsRequest())).notifications
    assert told.kind == kind


def test_no_event_and_no_kind_is_left_out() -> None:
    assert {message.DESCRIPTOR.name for message in KINDS} == {*events_pb2.DESCRIPTOR.message_types_by_name}
    assert {pb.Notification.KIND_UNSPECIFIED, *KINDS.values()} == {*pb.Notification.Kind.values()}


async def test_an_event_that_is_delivered_repeatedly_is_processed_once(
    act: OrderEvents, store: NotificationStore
) -> None:
    event = happened()
    await asyncio.gather(*(act(event) for _ in range(10)))
    assert len((await store.list(10)).items) == 1


async def test_replaying_all_events_from_the_start_changes_nothing(act: OrderEvents, store: NotificationStore) -> None:
    bus = MemoryBus()
    happenings = [happened(message) for message in KINDS for _ in range(4)]
    for event in happenings:
        await bus.publish(event)
    seen = 0

    async def count(event: Event) -> None:
        nonlocal seen
        await act(event)
        seen += 1

    async with bus.consume(CONSUMER, EVENT_TYPES, count):
        await until(lambda: seen == len(happenings))
        before = await store.read(100)
        bus.replay(CONSUMER)
        await until(lambda: seen == 2 * len(happenings))
    assert len(before) == len(happenings)
    assert await store.read(100) == before


@pytest.mark.parametrize(
    ("type", "data", "reason"),
    [
        ("weft.order.v1.OrderEaten", b"", "unknown event type weft.order.v1.OrderEaten"),
        ("weft.order.v1.OrderCreated", b"\xff", "not a weft.order.v1.OrderCreated"),
        ("weft.order.v1.OrderCreated", b"", "is not a UUID"),
    ],
)
async def test_an_invalid_event_is_a_dead_letter(
    act: OrderEvents, store: NotificationStore, type: str, data: bytes, reason: str
) -> None:
    bus = MemoryBus()
    bad = Event(str(uuid.uuid4()), "/weft/order", type, "order", NOW, data)
    await bus.publish(bad)
    async with bus.consume(CONSUMER, EVENT_TYPES, act):
        await bus.publish(good := happened())
        while not (letters := await bus.dead_letters(CONSUMER)):  # noqa: ASYNC110 - bounded by the test's timeout
            await asyncio.sleep(0.005)
    assert [letter.event for letter in letters] == [bad]
    assert reason in letters[0].reason
    assert [told.order_id for told in (await store.list(10)).items] == [good.subject]


async def test_a_list_is_paged_and_filtered(act: OrderEvents, service: NotificationServiceAsyncStub) -> None:
    orders = [str(uuid.uuid4()) for _ in range(5)]
    for order_id in orders:
        await act(happened(order_id=order_id))
        await act(happened(user_id=BEN))
    await act(happened(events_pb2.OrderCancelled, order_id=orders[0]))

    async def listed(**wanted: str) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            page = await service.ListNotifications(pb.ListNotificationsRequest(page_size=2, page_token=token, **wanted))
            found += [told.order_id for told in page.notifications]
            token = page.next_page_token
            if not token:
                return found

    assert await listed(user_id=ANN.upper()) == [*orders, orders[0]]
    assert await listed(order_id=orders[0]) == [orders[0], orders[0]]
    assert await listed(user_id=BEN, order_id=orders[0]) == []
    assert len(await listed()) == 11


@pytest.mark.parametrize("wrong", [{"user_id": "ann"}, {"page_size": -1}, {"page_token": "mine"}])
async def test_an_invalid_request_is_an_invalid_argument(
    service: NotificationServiceAsyncStub, wrong: dict[str, object]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await service.ListNotifications(pb.ListNotificationsRequest(**wrong))  # type: ignore[arg-type]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_watch_streams_new_notifications_and_resumes_at_any_replica(
    act: OrderEvents, service: NotificationServiceAsyncStub, open_database: Open
) -> None:
    await act(happened())
    watch = service.WatchNotifications(pb.WatchNotificationsRequest(user_id=ANN))
    begin = await read(watch)
    assert begin.resume_token
    assert not begin.HasField("notification")

    first, second, third = (happened() for _ in range(3))
    # As another replica would do it.
    other = OrderEvents(NotificationStore(open_database("notification", notification_store.VERSIONS)))
    await other(first)
    await other(happened(user_id=BEN))
    seen = await read(watch)
    assert seen.notification.order_id == first.subject
    watch.cancel()

    await act(second)
    resumed = service.WatchNotifications(pb.WatchNotificationsRequest(user_id=ANN, resume_token=seen.resume_token))
    assert (await read(resumed)).notification.order_id == second.subject
    await act(third)
    assert (await read(resumed)).notification.order_id == third.subject
    again = service.WatchNotifications(pb.WatchNotificationsRequest(user_id=ANN, resume_token=begin.resume_token))
    orders = [(await read(again)).notification.order_id for _ in range(3)]
    assert orders == [first.subject, second.subject, third.subject]
    resumed.cancel()
    again.cancel()


async def test_a_resume_token_of_another_watch_is_an_invalid_argument(service: NotificationServiceAsyncStub) -> None:
    begin = await read(service.WatchNotifications(pb.WatchNotificationsRequest(user_id=ANN)))
    watch = service.WatchNotifications(pb.WatchNotificationsRequest(user_id=BEN, resume_token=begin.resume_token))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(watch)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "resume_token" in str(caught.value.details())


async def test_watches_end_with_the_server_so_that_clients_resume_at_another(servicer: NotificationServicer) -> None:
    settings = ServerSettings(listen="127.0.0.1:0", drain_wait=0, stream_grace=0)
    add = notification_pb2_grpc.add_NotificationServiceServicer_to_server
    async with Server([(add, servicer)], settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        service = notification_pb2_grpc.NotificationServiceStub(channel)
        watches = [service.WatchNotifications(pb.WatchNotificationsRequest()) for _ in range(3)]
        for watch in watches:
            assert (await read(watch)).resume_token
        await server.drain()
        for watch in watches:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.slow
async def test_a_watch_misses_nothing_while_replicas_write_concurrently(
    service: NotificationServiceAsyncStub, open_database: Open
) -> None:
    watch = service.WatchNotifications(pb.WatchNotificationsRequest())
    await read(watch)
    replicas = [
        OrderEvents(NotificationStore(open_database("notification", notification_store.VERSIONS))) for _ in range(3)
    ]
    happenings = [happened() for _ in range(150)]

    async def told(act: OrderEvents, event: Event) -> None:
        while True:
            try:
                return await act(event)
            except UnavailableError:
                pass  # locked by another replica; the bus would redeliver it, too

    working = asyncio.gather(*(told(replicas[n % 3], event) for n, event in enumerate(happenings)))
    seen = [(await read(watch)).notification.order_id for _ in happenings]
    await working
    watch.cancel()
    assert sorted(seen) == sorted(event.subject for event in happenings)
