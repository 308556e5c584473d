"""The order service's gRPC surface, v1."""
# ruff: noqa: ARG002, N802 - gRPC defines the names and the parameters

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import grpc
import structlog

from services.common import paging
from services.common.errors import RefusedError, UnavailableError
from services.common.rpc import Context, call_trace, stream_method, unary_method
from services.order.domain import Order, State, UserDeletedError, UserNotFoundError
from services.order.messages import items, order_message
from services.order.settings import OrderSettings
from services.order.store import Listing, OrderStore
from services.order.watch import Watches
from weft.order.v1 import order_pb2 as pb
from weft.order.v1 import order_pb2_grpc
from weft.user.v1 import user_pb2

if TYPE_CHECKING:
    from weft.user.v1.user_pb2_grpc import UserServiceAsyncStub

_UNAVAILABLE = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
)

log = structlog.stdlib.get_logger()


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class OrderServicer(order_pb2_grpc.OrderServiceServicer):
    """Serves the orders in ``store``. ``users``: the user service. ``now``: the wall clock, in UTC."""

    error_domain = "order.weft"

    def __init__(
        self,
        store: OrderStore,
        users: UserServiceAsyncStub,
        settings: OrderSettings | None = None,
        now: Callable[[], dt.datetime] = _now,
    ) -> None:
        self._store = store
        self._users = users
        self._settings = settings if settings is not None else OrderSettings()
        self._now = now
        self._watches = Watches(store.versions, self._settings.watch_interval)

    @unary_method
    async def CreateOrder(self, request: pb.CreateOrderRequest, context: Context) -> pb.CreateOrderResponse:
        request_id = request.request_id.lower()
        order = Order.new(str(uuid.uuid4()), user_id=request.user_id.lower(), items=items(request), now=self._now())
        try:
            stale = await self._is_stale(order.user_id)
        except RefusedError:
            # A repeated request gets its order, even if the user service is unavailable or the user has been deleted
            # since.
            created = await self._store.find(order, request_id)
            if created is None:
                raise
            return pb.CreateOrderResponse(order=order_message(created))
        trace = call_trace(context)
        created = await self._store.create(dataclasses.replace(order, user_stale=stale), request_id, trace)
        if created.id == order.id:
            log.info("order created", order_id=created.id, request_id=request_id, user_stale=stale, **trace)
        return pb.CreateOrderResponse(order=order_message(created))

    @unary_method
    async def GetOrder(self, request: pb.GetOrderRequest, context: Context) -> pb.GetOrderResponse:
        return pb.GetOrderResponse(order=order_message(await self._store.get(request.id.lower())))

    @unary_method
    async def ListOrders(self, request: pb.ListOrdersRequest, context: Context) -> pb.ListOrdersResponse:
        listing = Listing(request.user_id.lower(), request.filter)
        key = f"weft.order.v1.OrderService/ListOrders?{listing}"
        after = self._store.tokens.after(key, request.page_token)
        page = await self._store.list(paging.size(request.page_size), after, listing)
        return pb.ListOrdersResponse(
            orders=map(order_message, page.items),
            next_page_token=self._store.tokens.make(key, page.last) if page.more else "",
        )

    @unary_method
    async def ConfirmOrder(self, request: pb.ConfirmOrderRequest, context: Context) -> pb.ConfirmOrderResponse:
        return pb.ConfirmOrderResponse(order=await self._move(request.id, State.CONFIRMED, context))

    @unary_method
    async def ShipOrder(self, request: pb.ShipOrderRequest, context: Context) -> pb.ShipOrderResponse:
        return pb.ShipOrderResponse(order=await self._move(request.id, State.SHIPPED, context))

    @unary_method
    async def DeliverOrder(self, request: pb.DeliverOrderRequest, context: Context) -> pb.DeliverOrderResponse:
        return pb.DeliverOrderResponse(order=await self._move(request.id, State.DELIVERED, context))

    @unary_method
    async def CancelOrder(self, request: pb.CancelOrderRequest, context: Context) -> pb.CancelOrderResponse:
        return pb.CancelOrderResponse(order=await self._move(request.id, State.CANCELLED, context))

    @stream_method
    async def WatchOrder(self, request: pb.WatchOrderRequest, context: Context) -> AsyncIterator[pb.WatchOrderResponse]:
        order_id = request.id.lower()
        key = f"weft.order.v1.OrderService/WatchOrder?{order_id}"
        if request.resume_token:
            seen = self._store.tokens.after(key, request.resume_token, field="resume_token")
        else:
            seen = (await self._store.get(order_id)).version - 1
        while True:
            for order in await self._store.history(order_id, seen):
                token = self._store.tokens.make(key, order.version)
                yield pb.WatchOrderResponse(order=order_message(order), resume_token=token)
                seen = order.version
            now = await self._store.get(order_id)
            if now.version > seen:
                continue  # it has changed since its history was read
            if now.state.final:
                return
            await self._watches.wait(order_id, seen)

    async def _move(self, order_id: str, state: State, context: Context) -> pb.Order:
        trace = call_trace(context)
        order = await self._store.move(order_id.lower(), state, self._now(), trace)
        self._watches.changed(order.id, order.version)
        log.info("order state changed", order_id=order.id, state=state.value, **trace)
        return order_message(order)

    async def _is_stale(self, user_id: str) -> bool:
        """Whether the user service is unavailable and the user is only known from before.

        Raises UserNotFoundError, UserDeletedError, and UnavailableError if the user isn't known.
        """
        try:
            found = await self._users.GetUser(user_pb2.GetUserRequest(id=user_id), timeout=self._settings.user_timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                raise UserNotFoundError(user_id) from error
            if error.code() not in _UNAVAILABLE:
                raise
            if self._settings.user_away == "accept" and await self._store.knows(user_id):
                return True
            raise UnavailableError(
                "USER_SERVICE_UNAVAILABLE",
                f"the user service is unavailable: {error.code().name}: {error.details()}",
            ) from error
        if found.user.HasField("delete_time"):
            await self._store.forget(user_id)
            raise UserDeletedError(user_id)
        return False
