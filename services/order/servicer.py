"""The order service's gRPC surface, v1."""
# ruff: noqa: ARG002, N802 - gRPC gives the names and the parameters

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import grpc

from services import paging
from services.errors import UnavailableError
from services.order.domain import Item, Order, UserNotFoundError
from services.order.store import OrderStore
from services.rpc import answered, timestamp
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2

if TYPE_CHECKING:
    from weft.user.v1.user_pb2_grpc import UserServiceAsyncStub

USER_TIMEOUT = 5.0
"""Seconds that CreateOrder waits for the user service at the most; less, when its caller gives it less."""

_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED})

Context = grpc.aio.ServicerContext[Any, Any]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class OrderServicer(order_pb2_grpc.OrderServiceServicer):
    """Serves the orders of ``store``, for the users that ``users`` knows. ``now``: the wall clock, in UTC."""

    error_domain = "order.weft"

    def __init__(self, store: OrderStore, users: UserServiceAsyncStub, now: Callable[[], dt.datetime] = _now) -> None:
        self._store = store
        self._users = users
        self._now = now

    @answered
    async def CreateOrder(
        self, request: order_pb2.CreateOrderRequest, context: Context
    ) -> order_pb2.CreateOrderResponse:
        request_id = request.request_id.lower()
        order = Order.new(
            str(uuid.uuid4()),
            user_id=request.user_id.lower(),
            items=tuple(Item(item.sku, item.quantity) for item in request.items),
            now=self._now(),
        )
        # Above the user check, because a repeated request gets its order even while the user service is away.
        taken = await self._store.find(order, request_id)
        if taken is None:
            await self._require_user(order.user_id)
            taken = await self._store.create(order, request_id)
        return order_pb2.CreateOrderResponse(order=_message(taken))

    @answered
    async def GetOrder(self, request: order_pb2.GetOrderRequest, context: Context) -> order_pb2.GetOrderResponse:
        return order_pb2.GetOrderResponse(order=_message(await self._store.get(request.id.lower())))

    @answered
    async def ListOrders(self, request: order_pb2.ListOrdersRequest, context: Context) -> order_pb2.ListOrdersResponse:
        user_id = request.user_id.lower()
        listing = f"weft.order.v1.OrderService/ListOrders?user_id={user_id}"
        page = await self._store.list(
            paging.size(request.page_size), paging.after(listing, request.page_token), user_id
        )
        return order_pb2.ListOrdersResponse(
            orders=map(_message, page.items), next_page_token=paging.token(listing, page.last) if page.more else ""
        )

    async def _require_user(self, user_id: str) -> None:
        try:
            await self._users.GetUser(user_pb2.GetUserRequest(id=user_id), timeout=USER_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise UserNotFoundError(user_id) from error
            if error.code() in _AWAY:
                raise UnavailableError(
                    "USER_SERVICE_UNAVAILABLE",
                    f"the user service could not be asked: {error.code().name}: {error.details()}",
                ) from error
            raise


def _message(order: Order) -> order_pb2.Order:
    return order_pb2.Order(
        id=order.id,
        user_id=order.user_id,
        items=[order_pb2.OrderItem(sku=item.sku, quantity=item.quantity) for item in order.items],
        create_time=timestamp(order.create_time),
        update_time=timestamp(order.update_time),
    )
