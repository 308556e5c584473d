"""Forged or oversized requests: a quick INVALID_ARGUMENT with its cause, and no email in the log."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from google.protobuf.field_mask_pb2 import FieldMask

from services.common.paging import InvalidTokenError
from services.common.rpc import reject_unparsable
from services.notification import store as notification_store
from services.notification.servicer import NotificationServicer
from services.notification.store import NotificationStore
from services.order import store as order_store
from services.order.store import OrderStore
from services.user import store as user_store
from services.user.store import UserStore
from tests.services.calling import NOBODY, failure, violations
from tests.services.conftest import Open, serving
from tests.services.test_shop_fuzz import shop
from weft.notification.v1 import notification_pb2, notification_pb2_grpc
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

LISTING = "weft.user.v1.UserService/ListUsers?Listing(filter='', order_by='create_time', show_deleted=False)"

POSITIONS = {
    "before the first year": ["0001-01-01T00:00:00+23:59", 1],
    "after the last year": ["9999-12-31T23:59:59-23:59", 1],
    "half a surrogate": ["\ud800", 1],
    "zero": ["\0", 1],
    "too large": ["2026-01-01T00:00:00Z", 2**63],
    "not a number": ["2026-01-01T00:00:00Z", float("nan")],
    "nested": [[["deep"]], 1],
    "object": {"a": 1},
    "valid, but forged": ["2026-01-01T00:00:00+00:00", 1],
}


@pytest.fixture
async def channel(open_database: Open) -> AsyncIterator[grpc.aio.Channel]:
    async with shop(open_database) as channel:
        yield channel


def packed(position: object) -> bytes:
    return json.dumps(position).encode()


def with_checksum(position: object) -> str:
    """A token of an earlier release, which anybody can make."""
    checksum = hashlib.sha256(packed(position) + LISTING.encode()).digest()[:8]
    return base64.urlsafe_b64encode(checksum + packed(position)).decode()


def with_guessed_key(position: object) -> str:
    tag = hmac.digest(b"\0" * 32, hashlib.sha256(LISTING.encode()).digest() + packed(position), "sha256")[:16]
    return base64.urlsafe_b64encode(tag + packed(position)).decode()


@pytest.mark.parametrize("forge", [with_checksum, with_guessed_key])
@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
async def test_a_forged_page_token_is_an_invalid_argument(
    channel: grpc.aio.Channel, forge: Callable[[object], str], position: object
) -> None:
    request = user_pb2.ListUsersRequest(order_by="create_time", page_token=forge(position))
    error = await failure(user_pb2_grpc.UserServiceStub(channel).ListUsers(request, timeout=10))
    assert violations(error) == {"page_token": "INVALID_PAGE_TOKEN"}


async def test_a_signed_token_with_an_invalid_position_is_an_invalid_argument(open_database: Open) -> None:
    """Even with a valid signature, nothing reaches the database that it can't compare."""
    users = UserStore(open_database("user", user_store.VERSIONS))
    for at in ("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "yesterday"):
        with pytest.raises(InvalidTokenError):
            await users.list(1, (at, 1), user_store.Listing(order_by="create_time"))


async def test_page_tokens_work_at_all_replicas_of_a_service_and_at_no_other_service(
    open_database: Open,
) -> None:
    first, second = (UserStore(open_database("user", user_store.VERSIONS)) for _ in range(2))
    orders = OrderStore(open_database("order", order_store.VERSIONS))
    notifications = NotificationStore(open_database("notification", notification_store.VERSIONS))
    token = first.tokens.make("list", "a", 1)
    assert second.tokens.position("list", token) == ("a", 1)
    for other in (orders, notifications):
        with pytest.raises(InvalidTokenError):
            other.tokens.position("list", token)


async def test_every_changed_character_of_a_token_is_detected(open_sqlite: Open) -> None:
    tokens = UserStore(open_sqlite("user", user_store.VERSIONS)).tokens
    token = tokens.make("list", "ann@example.com", 7)
    for at in range(len(token)):
        changed = token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :]
        with pytest.raises(InvalidTokenError):
            tokens.position("list", changed)


def requests() -> dict[str, tuple[str, Any]]:
    """Oversized requests, by name, each with its method."""
    user, order = "weft.user.v1.UserService", "weft.order.v1.OrderService"
    nobody = user_pb2.User(id=NOBODY)
    a = "state = PENDING AND "
    return {
        "1,000 ids that are none": (f"/{user}/BatchGetUsers", user_pb2.BatchGetUsersRequest(ids=map(str, range(1000)))),
        "32,000 empty ids": (f"/{user}/BatchGetUsers", user_pb2.BatchGetUsersRequest(ids=[""] * 32_000)),
        "4 MB of ids": (f"/{user}/BatchGetUsers", user_pb2.BatchGetUsersRequest(ids=[NOBODY] * 100_000)),
        "32,000 empty items": (
            f"/{order}/CreateOrder",
            order_pb2.CreateOrderRequest(items=[order_pb2.OrderItem()] * 32_000),
        ),
        "a mask with a path of 60,000": (
            f"/{user}/UpdateUser",
            user_pb2.UpdateUserRequest(user=nobody, update_mask=FieldMask(paths=["\u20ac" * 20_000])),
        ),
        "a mask with 20,000 paths": (
            f"/{user}/UpdateUser",
            user_pb2.UpdateUserRequest(user=nobody, update_mask=FieldMask(paths=["x"] * 20_000)),
        ),
        "an id of 4 MB": (f"/{user}/GetUser", user_pb2.GetUserRequest(id="x" * 4_000_000)),
        "a filter of 60,000": (f"/{user}/ListUsers", user_pb2.ListUsersRequest(filter='name = "' + "x" * 60_000)),
        "a filter with 51 conditions and a wrong one": (
            f"/{order}/ListOrders",
            order_pb2.ListOrdersRequest(filter=a * 51 + "x"),
        ),
        "a value of 1,000 in a filter": (
            f"/{order}/ListOrders",
            order_pb2.ListOrdersRequest(filter=f'state = "{"€" * 1_000}"'),
        ),
        "a page token of 60,000": (f"/{user}/ListUsers", user_pb2.ListUsersRequest(page_token="A" * 60_000)),
        "a negative page": (f"/{user}/ListUsers", user_pb2.ListUsersRequest(page_size=-1)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "request_"), requests().values(), ids=requests())
async def test_a_request_that_is_too_large_is_an_invalid_argument_and_delays_no_other(
    open_sqlite: Open, method: str, request_: Any
) -> None:
    async with shop(open_sqlite) as channel:
        stub: Any = channel.unary_unary(method)
        await failure(user_pb2_grpc.UserServiceStub(channel).GetUser(user_pb2.GetUserRequest(id=NOBODY)))  # warm
        began = time.process_time()
        error = await failure(stub(request_.SerializeToString(), timeout=10))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
        # CPU of client and server together: how long another caller on this loop would wait.
        assert time.process_time() - began < 0.4
        assert len(str(error.details()).encode()) <= 503
        if len(request_.SerializeToString()) > 65536:
            assert "the limit is 65536" in str(error.details())


async def test_a_filter_may_have_50_conditions(open_database: Open) -> None:
    async with shop(open_database) as channel:
        orders = order_pb2_grpc.OrderServiceStub(channel)
        request = order_pb2.ListOrdersRequest(filter=" AND ".join(["state = PENDING"] * 50))
        assert not (await orders.ListOrders(request, timeout=10)).orders


async def test_a_forged_resume_token_is_an_invalid_argument(open_database: Open) -> None:
    servicer = NotificationServicer(NotificationStore(open_database("notification", notification_store.VERSIONS)))
    add = reject_unparsable(notification_pb2_grpc.add_NotificationServiceServicer_to_server)
    async with serving(lambda server: add(servicer, server)) as channel:
        request = notification_pb2.WatchNotificationsRequest(user_id=NOBODY, resume_token=with_guessed_key([1]))
        watch = notification_pb2_grpc.NotificationServiceStub(channel).WatchNotifications(request, timeout=10)
        assert violations(await failure(watch.read())) == {"resume_token": "INVALID_RESUME_TOKEN"}


async def test_a_trace_that_is_too_long_is_dropped_and_the_order_is_created(open_database: Open) -> None:
    async with shop(open_database) as channel:
        store = OrderStore(open_database("order", order_store.VERSIONS))
        user = await user_pb2_grpc.UserServiceStub(channel).CreateUser(
            user_pb2.CreateUserRequest(name="Ann", email="ann@example.com")
        )
        await order_pb2_grpc.OrderServiceStub(channel).CreateOrder(
            order_pb2.CreateOrderRequest(
                request_id=str(uuid.uuid4()),
                user_id=user.user.id,
                items=[order_pb2.OrderItem(sku="tea", quantity=1)],
            ),
            metadata=[("traceparent", "00-1-2-01"), ("tracestate", "x" * 5_000)],
        )
        (row,) = await store._database.read(lambda connection: order_store.outbox.pending(connection, 9))
        assert not isinstance(row.event, Exception)
        assert row.event.trace == {"traceparent": "00-1-2-01"}


@pytest.mark.slow
async def test_a_page_of_large_orders_never_exceeds_what_a_client_accepts(open_sqlite: Open) -> None:
    database = open_sqlite("order", order_store.VERSIONS)
    ids = [str(uuid.UUID(int=n)) for n in range(1, 501)]
    now = dt.datetime.now(dt.UTC)
    order = {"user_id": NOBODY, "create_time": now, "update_time": now}
    item = {"sku": "x" * 64, "quantity": 10**6, "currency": "EUR", "units": 10**9, "nanos": 1}

    def fill(connection: Any) -> None:
        connection.execute(order_store.orders.insert(), [{"id": each, **order} for each in ids])
        items = [{"order_id": each, "position": position, **item} for each in ids for position in range(100)]
        connection.execute(order_store.items.insert(), items)

    await database.write(fill)
    seen: list[str] = []
    async with shop(open_sqlite) as channel:
        orders = order_pb2_grpc.OrderServiceStub(channel)
        request = order_pb2.ListOrdersRequest(page_size=1_000)
        while True:
            page = await orders.ListOrders(request, timeout=30)
            seen += [each.id for each in page.orders]
            assert 0 < page.ByteSize() < 2 * 2**20
            request.page_token = page.next_page_token
            if not request.page_token:
                break
    assert seen == ids


EMAIL = "ada.lovelace@example.com"


@pytest.mark.parametrize("failing", ["taken", "as an id", "in a filter", "in a mask", "database"])
async def test_logs_contain_no_email(open_database: Open, caplog: pytest.LogCaptureFixture, failing: str) -> None:
    caplog.set_level(logging.DEBUG)
    database = open_database("user", user_store.VERSIONS)
    with structlog.testing.capture_logs() as lines:
        async with shop(open_database) as channel:
            users = user_pb2_grpc.UserServiceStub(channel)
            ada = user_pb2.CreateUserRequest(name="Ada Lovelace", email=EMAIL)
            if failing == "taken":
                await users.CreateUser(ada)
                error = await failure(users.CreateUser(ada))
                assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            elif failing == "as an id":
                error = await failure(users.GetUser(user_pb2.GetUserRequest(id=EMAIL)))
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            elif failing == "in a filter":
                error = await failure(users.ListUsers(user_pb2.ListUsersRequest(filter=f'create_time > "{EMAIL}"')))
                assert EMAIL in str(error.details())
            elif failing == "in a mask":
                mask = FieldMask(paths=[EMAIL])
                request = user_pb2.UpdateUserRequest(user=user_pb2.User(id=NOBODY), update_mask=mask)
                assert violations(await failure(users.UpdateUser(request))) == {"update_mask": "UNKNOWN_FIELD"}
            else:
                await database.write(lambda c: c.exec_driver_sql("ALTER TABLE users RENAME COLUMN name TO other"))
                error = await failure(users.CreateUser(ada))
                assert error.code() is grpc.StatusCode.INTERNAL
    assert any(line["event"] == "request failed" for line in lines)
    said = "\n".join([*map(_whole, lines), caplog.text])
    assert EMAIL not in said
    assert "Lovelace" not in said


def _whole(line: Any) -> str:
    """The log line as written, with its traceback."""
    return str(
        structlog.processors.JSONRenderer()(None, "", structlog.processors.format_exc_info(None, "", dict(line)))
    )
