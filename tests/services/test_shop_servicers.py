"""What a caller of the shop sees: responses, and errors with their code and details, over a real socket."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
import structlog

from services.common import logs
from services.common.database import Database
from services.order import store as order_store
from services.order.servicer import OrderServicer
from services.order.settings import OrderSettings
from services.order.store import OrderStore
from services.user import store as user_store
from services.user.servicer import UserServicer
from services.user.store import UserStore
from tests.services.calling import NOBODY, error_info, failure, violations
from tests.services.conftest import Open, serving
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

if TYPE_CHECKING:
    from weft.order.v1.order_pb2_grpc import OrderServiceAsyncStub
    from weft.user.v1.user_pb2_grpc import UserServiceAsyncStub

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


@pytest.fixture
def database(open_database: Open) -> Database:
    return open_database("user", user_store.VERSIONS)


@pytest.fixture
async def users(database: Database) -> AsyncIterator[UserServiceAsyncStub]:
    servicer = UserServicer(UserStore(database), now=lambda: NOW)
    async with serving(lambda server: user_pb2_grpc.add_UserServiceServicer_to_server(servicer, server)) as channel:
        yield user_pb2_grpc.UserServiceStub(channel)


@pytest.fixture
async def orders(users: UserServiceAsyncStub, open_database: Open) -> AsyncIterator[OrderServiceAsyncStub]:
    servicer = OrderServicer(OrderStore(open_database("order", order_store.VERSIONS)), users, now=lambda: NOW)
    async with serving(lambda server: order_pb2_grpc.add_OrderServiceServicer_to_server(servicer, server)) as channel:
        yield order_pb2_grpc.OrderServiceStub(channel)


def ann(**changes: str) -> user_pb2.CreateUserRequest:
    return user_pb2.CreateUserRequest(**{"name": "Ann", "email": "ann@example.com", **changes})


def tea(user_id: str, request_id: str = "", *, quantity: int = 1) -> order_pb2.CreateOrderRequest:
    items = [order_pb2.OrderItem(sku="tea", quantity=quantity)]
    return order_pb2.CreateOrderRequest(request_id=request_id or str(uuid.uuid4()), user_id=user_id, items=items)


async def test_a_user_is_created_and_read(users: UserServiceAsyncStub) -> None:
    created = (await users.CreateUser(ann())).user
    assert uuid.UUID(created.id).version == 4
    assert (created.name, created.email) == ("Ann", "ann@example.com")
    assert created.create_time.ToDatetime(dt.UTC) == created.update_time.ToDatetime(dt.UTC) == NOW
    assert (await users.GetUser(user_pb2.GetUserRequest(id=created.id))).user == created
    assert (await users.GetUser(user_pb2.GetUserRequest(id=created.id.upper()))).user == created


async def test_a_missing_user_is_not_found(users: UserServiceAsyncStub) -> None:
    error = await failure(users.GetUser(user_pb2.GetUserRequest(id=NOBODY)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(error) == ("USER_NOT_FOUND", "user.weft", {"user_id": NOBODY})


async def test_a_taken_email_already_exists(users: UserServiceAsyncStub) -> None:
    await users.CreateUser(ann())
    error = await failure(users.CreateUser(ann(email="ANN@example.com")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_info(error) == ("EMAIL_TAKEN", "user.weft", {"email": "ANN@example.com"})


async def test_a_request_id_can_not_be_reused_with_different_content(users: UserServiceAsyncStub) -> None:
    request_id = str(uuid.uuid4())
    first = await users.CreateUser(ann(request_id=request_id))
    assert await users.CreateUser(ann(request_id=request_id.upper())) == first
    error = await failure(users.CreateUser(ann(request_id=request_id, name="Anne")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_info(error) == ("REQUEST_ID_REUSED", "user.weft", {"request_id": request_id})


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (user_pb2.CreateUserRequest(), {"name": "string.min_len", "email": "string.email_empty"}),
        (ann(name="x" * 101), {"name": "string.max_len"}),
        (ann(name="An\0n"), {"name": "NUL_CHARACTER"}),
        (ann(email="ann"), {"email": "string.email"}),
        (ann(request_id="1"), {"request_id": "string.uuid"}),
    ],
    ids=["empty", "long name", "NUL", "email", "request_id"],
)
async def test_an_invalid_user_is_rejected_with_all_its_violations(
    users: UserServiceAsyncStub, request_: user_pb2.CreateUserRequest, expected: dict[str, str]
) -> None:
    assert violations(await failure(users.CreateUser(request_))) == expected


async def test_an_id_that_is_not_a_uuid_is_rejected(users: UserServiceAsyncStub) -> None:
    error = await failure(users.GetUser(user_pb2.GetUserRequest(id="42")))
    assert violations(error) == {"id": "string.uuid"}
    assert error.details() == "id: must be a valid UUID"


async def test_users_are_listed_page_by_page(users: UserServiceAsyncStub) -> None:
    created = [(await users.CreateUser(ann(email=f"{n}@example.com"))).user for n in range(5)]
    listed: list[user_pb2.User] = []
    sizes, token = [], ""
    while True:
        page = await users.ListUsers(user_pb2.ListUsersRequest(page_size=2, page_token=token))
        listed += page.users
        sizes.append(len(page.users))
        token = page.next_page_token
        if not token:
            break
    assert listed == created
    assert sizes == [2, 2, 1]
    assert list((await users.ListUsers(user_pb2.ListUsersRequest(page_size=2**31 - 1))).users) == created


async def test_an_invalid_list_request_is_rejected(users: UserServiceAsyncStub) -> None:
    negative = await failure(users.ListUsers(user_pb2.ListUsersRequest(page_size=-1)))
    assert violations(negative) == {"page_size": "int32.gte"}
    made_up = await failure(users.ListUsers(user_pb2.ListUsersRequest(page_token="made up")))
    assert violations(made_up) == {"page_token": "INVALID_PAGE_TOKEN"}


async def test_an_order_is_created_read_and_listed(users: UserServiceAsyncStub, orders: OrderServiceAsyncStub) -> None:
    user_id = (await users.CreateUser(ann())).user.id
    request = tea(user_id)
    taken = (await orders.CreateOrder(request)).order
    assert uuid.UUID(taken.id).version == 4
    assert (taken.user_id, list(taken.items)) == (user_id, list(request.items))
    assert taken.create_time.ToDatetime(dt.UTC) == taken.update_time.ToDatetime(dt.UTC) == NOW
    assert (await orders.GetOrder(order_pb2.GetOrderRequest(id=taken.id))).order == taken
    assert list((await orders.ListOrders(order_pb2.ListOrdersRequest())).orders) == [taken]
    assert list((await orders.ListOrders(order_pb2.ListOrdersRequest(user_id=user_id))).orders) == [taken]
    assert list((await orders.ListOrders(order_pb2.ListOrdersRequest(user_id=NOBODY))).orders) == []


async def test_a_token_of_one_users_orders_is_invalid_for_another_users(
    users: UserServiceAsyncStub, orders: OrderServiceAsyncStub
) -> None:
    user_id = (await users.CreateUser(ann())).user.id
    for _ in range(2):
        await orders.CreateOrder(tea(user_id))
    page = await orders.ListOrders(order_pb2.ListOrdersRequest(user_id=user_id, page_size=1))
    assert page.next_page_token
    error = await failure(orders.ListOrders(order_pb2.ListOrdersRequest(page_token=page.next_page_token)))
    assert violations(error) == {"page_token": "INVALID_PAGE_TOKEN"}


async def test_a_missing_order_is_not_found(orders: OrderServiceAsyncStub) -> None:
    error = await failure(orders.GetOrder(order_pb2.GetOrderRequest(id=NOBODY)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(error) == ("ORDER_NOT_FOUND", "order.weft", {"order_id": NOBODY})


async def test_an_unknown_user_can_not_order(orders: OrderServiceAsyncStub) -> None:
    error = await failure(orders.CreateOrder(tea(NOBODY)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(error) == ("USER_NOT_FOUND", "order.weft", {"user_id": NOBODY})
    assert list((await orders.ListOrders(order_pb2.ListOrdersRequest())).orders) == []


async def test_an_invalid_order_is_rejected_with_all_its_violations(orders: OrderServiceAsyncStub) -> None:
    empty = await failure(orders.CreateOrder(order_pb2.CreateOrderRequest()))
    assert violations(empty) == {
        "request_id": "string.uuid_empty",
        "user_id": "string.uuid_empty",
        "items": "repeated.min_items",
    }
    request = tea(NOBODY)
    request.items.add(sku="!", quantity=0)
    lines = await failure(orders.CreateOrder(request))
    assert violations(lines) == {"items[1].sku": "string.pattern", "items[1].quantity": "int32.gte_lte"}


async def test_concurrent_retries_create_one_order(users: UserServiceAsyncStub, orders: OrderServiceAsyncStub) -> None:
    request = tea((await users.CreateUser(ann())).user.id)
    taken = await asyncio.gather(*(orders.CreateOrder(request) for _ in range(20)))
    assert all(each == taken[0] for each in taken)
    assert list((await orders.ListOrders(order_pb2.ListOrdersRequest())).orders) == [taken[0].order]


async def test_a_request_id_can_not_be_reused_for_another_order(
    users: UserServiceAsyncStub, orders: OrderServiceAsyncStub
) -> None:
    request = tea((await users.CreateUser(ann())).user.id)
    await orders.CreateOrder(request)
    request.items[0].quantity = 2
    error = await failure(orders.CreateOrder(request))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error_info(error) == ("REQUEST_ID_REUSED", "order.weft", {"request_id": request.request_id})


class AilingUsers(user_pb2_grpc.UserServiceServicer):
    """A user service that fails every GetUser with ``code``, or never responds if there is none."""

    def __init__(self, code: grpc.StatusCode | None) -> None:
        self.code = code

    async def GetUser(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        if self.code is None:
            await asyncio.Event().wait()
        await context.abort(self.code or grpc.StatusCode.UNKNOWN, "on purpose")

    async def _not_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    CreateUser = BatchGetUsers = ListUsers = UpdateUser = DeleteUser = UndeleteUser = _not_asked


@pytest.mark.parametrize(
    ("code", "answer", "details"),
    [
        (None, grpc.StatusCode.UNAVAILABLE, "the user service is unavailable: DEADLINE_EXCEEDED"),
        (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAVAILABLE, "is unavailable: UNAVAILABLE: on purpose"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, "is unavailable: RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.INTERNAL, grpc.StatusCode.INTERNAL, "internal error"),
    ],
    ids=["hangs", "away", "overloaded", "broken"],
)
async def test_no_order_is_created_while_the_user_service_fails(
    open_database: Open,
    code: grpc.StatusCode | None,
    answer: grpc.StatusCode,
    details: str,
) -> None:
    store = OrderStore(open_database("order", order_store.VERSIONS))
    ailing = AilingUsers(code)
    async with serving(lambda server: user_pb2_grpc.add_UserServiceServicer_to_server(ailing, server)) as channel:
        orders = OrderServicer(store, user_pb2_grpc.UserServiceStub(channel), OrderSettings(user_timeout=0.1))
        async with serving(lambda server: order_pb2_grpc.add_OrderServiceServicer_to_server(orders, server)) as front:
            error = await failure(order_pb2_grpc.OrderServiceStub(front).CreateOrder(tea(NOBODY)))
    assert error.code() is answer
    assert details in (error.details() or "")
    if answer is grpc.StatusCode.UNAVAILABLE:
        reason, domain, _ = error_info(error)
        assert (reason, domain) == ("USER_SERVICE_UNAVAILABLE", "order.weft")
    assert list((await store.list(10)).items) == []


async def test_a_repeated_request_gets_its_order_while_the_user_service_is_unavailable(
    users: UserServiceAsyncStub, orders: OrderServiceAsyncStub, open_database: Open
) -> None:
    request = tea((await users.CreateUser(ann())).user.id)
    taken = await orders.CreateOrder(request)
    away = AilingUsers(grpc.StatusCode.UNAVAILABLE)
    store = OrderStore(open_database("order", order_store.VERSIONS))
    async with serving(lambda server: user_pb2_grpc.add_UserServiceServicer_to_server(away, server)) as channel:
        replica = OrderServicer(store, user_pb2_grpc.UserServiceStub(channel))
        async with serving(lambda server: order_pb2_grpc.add_OrderServiceServicer_to_server(replica, server)) as front:
            assert await order_pb2_grpc.OrderServiceStub(front).CreateOrder(request) == taken


@pytest.fixture
def json_logs() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The service's log lines."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # so that they aren't closed
    lines = io.StringIO()
    logs.configure("user", "info", lines)
    yield lambda: [json.loads(line) for line in lines.getvalue().splitlines()]
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


async def test_only_failed_requests_are_logged(
    users: UserServiceAsyncStub, json_logs: Callable[[], list[dict[str, Any]]]
) -> None:
    created = (await users.CreateUser(ann())).user
    await users.GetUser(user_pb2.GetUserRequest(id=created.id))
    assert json_logs() == []
    await failure(users.GetUser(user_pb2.GetUserRequest(id=NOBODY)))
    (line,) = json_logs()
    assert (line["event"], line["level"], line["code"]) == ("request failed", "info", "NOT_FOUND")


async def test_a_bug_is_internal_and_its_traceback_stays_in_the_log(
    users: UserServiceAsyncStub, database: Database, json_logs: Callable[[], list[dict[str, Any]]]
) -> None:
    await database.write(lambda connection: connection.exec_driver_sql("ALTER TABLE users RENAME TO lost"))
    error = await failure(users.GetUser(user_pb2.GetUserRequest(id=NOBODY)))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "internal error; see the service's log"
    raised, failed = json_logs()
    assert (raised["service"], raised["level"]) == ("user", "error")
    assert re.search("no such table: users|relation .users. does not exist", raised["exception"])
    assert (failed["event"], failed["level"], failed["code"]) == ("request failed", "warning", "INTERNAL")
    assert failed["method"] == "UserServicer.GetUser"
