"""Orders: exact money, states, an event for every change, watches, and an unavailable user service."""

from __future__ import annotations

import asyncio
import datetime as dt
import uuid
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.type import money_pb2  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from services.common.rpc import reject_unparsable
from services.events import Event
from services.order import store as order_store
from services.order.domain import NANOS, Item, Money, Order, State, WrongStateError, totals
from services.order.servicer import OrderServicer
from services.order.settings import OrderSettings
from services.order.store import OrderStore
from tests.services.calling import NOBODY, failure, reason, violations
from tests.services.conftest import Open, serving
from weft.order.v1 import events_pb2, order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc

if TYPE_CHECKING:
    from weft.order.v1.order_pb2_grpc import OrderServiceAsyncStub

NOW = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Users(user_pb2_grpc.UserServiceServicer):
    """A user service that has a user for every id, unless the test sets otherwise."""

    def __init__(self) -> None:
        self.fails: grpc.StatusCode | None = None
        self.deleted = False

    async def GetUser(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:  # noqa: N802
        if self.fails is not None:
            await context.abort(self.fails, "on purpose")
        user = user_pb2.User(id=request.id)
        if self.deleted:
            user.delete_time.GetCurrentTime()
        return user_pb2.GetUserResponse(user=user)

    async def _not_asked(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    CreateUser = BatchGetUsers = ListUsers = UpdateUser = DeleteUser = UndeleteUser = _not_asked


@asynccontextmanager
async def order_service(
    store: OrderStore, users: Users, settings: OrderSettings | None = None
) -> AsyncIterator[OrderServiceAsyncStub]:
    async with serving(lambda server: user_pb2_grpc.add_UserServiceServicer_to_server(users, server)) as channel:
        servicer = OrderServicer(
            store, user_pb2_grpc.UserServiceStub(channel), settings or OrderSettings(watch_interval=0.02), lambda: NOW
        )
        add = reject_unparsable(order_pb2_grpc.add_OrderServiceServicer_to_server)
        async with serving(lambda server: add(servicer, server)) as front:
            yield order_pb2_grpc.OrderServiceStub(front)


@pytest.fixture
def users() -> Users:
    return Users()


@pytest.fixture
def store(open_database: Open) -> OrderStore:
    return OrderStore(open_database("order", order_store.VERSIONS))


@pytest.fixture
async def orders(store: OrderStore, users: Users) -> AsyncIterator[OrderServiceAsyncStub]:
    async with order_service(store, users) as stub:
        yield stub


def line(sku: str, quantity: int, price: str = "", nanos: int = 0) -> order_pb2.OrderItem:
    """``price``: "12 EUR"; none if empty."""
    units, _, currency = price.partition(" ")
    money = money_pb2.Money(units=int(units), nanos=nanos, currency_code=currency) if price else None
    return order_pb2.OrderItem(sku=sku, quantity=quantity, unit_price=money)


def asked(*items: order_pb2.OrderItem, user_id: str = NOBODY) -> order_pb2.CreateOrderRequest:
    return order_pb2.CreateOrderRequest(
        request_id=str(uuid.uuid4()), user_id=user_id, items=items or [line("tea", 2, "3 EUR", 500_000_000)]
    )


async def take(orders: OrderServiceAsyncStub, *items: order_pb2.OrderItem) -> order_pb2.Order:
    return (await orders.CreateOrder(asked(*items))).order


def move(orders: OrderServiceAsyncStub, state: State, order_id: str) -> Awaitable[Any]:
    match state:
        case State.CONFIRMED:
            return orders.ConfirmOrder(order_pb2.ConfirmOrderRequest(id=order_id))
        case State.SHIPPED:
            return orders.ShipOrder(order_pb2.ShipOrderRequest(id=order_id))
        case State.DELIVERED:
            return orders.DeliverOrder(order_pb2.DeliverOrderRequest(id=order_id))
        case State.CANCELLED:
            return orders.CancelOrder(order_pb2.CancelOrderRequest(id=order_id))
        case State.PENDING:
            raise AssertionError("nothing leads back there")


async def read(watch: Any) -> order_pb2.WatchOrderResponse:
    """The next change in a watch."""
    change = await watch.read()
    assert isinstance(change, order_pb2.WatchOrderResponse)
    return change


async def rest(watch: Any) -> list[order_pb2.Order]:
    """The order after each remaining change, until the stream ends."""
    found = []
    while isinstance(change := await watch.read(), order_pb2.WatchOrderResponse):
        found.append(change.order)
    return found


async def waiting(store: OrderStore) -> Sequence[tuple[str, Any]]:
    """The events in the outbox: type and message."""
    rows = await store._database.read(lambda connection: order_store.outbox.pending(connection, 100))
    events = [row.event for row in rows if isinstance(row.event, Event)]
    names = [event.type.removeprefix("weft.order.v1.") for event in events]
    return [(name, getattr(events_pb2, name).FromString(e.data)) for name, e in zip(names, events, strict=True)]


# Money


PRICES = st.builds(Money, st.sampled_from(["EUR", "USD", "JPY"]), st.integers(0, 10**18))


@given(st.lists(st.builds(Item, st.just("tea"), st.integers(1, 10**6), PRICES), max_size=20))
def test_totals_are_exact_in_each_currency(items: list[Item]) -> None:
    found = {total.currency: total for total in totals(items)}
    assert list(found) == sorted({item.price.currency for item in items if item.price})
    for currency, total in found.items():
        exact = sum(
            (
                item.quantity * Fraction(item.price.nanos, NANOS)
                for item in items
                if item.price and item.price.currency == currency
            ),
            Fraction(0),
        )
        assert total.units + Fraction(total.fraction, NANOS) == exact
        assert 0 <= total.fraction < NANOS


async def test_an_order_has_a_total_for_each_currency(orders: OrderServiceAsyncStub) -> None:
    taken = await take(
        orders,
        line("tea", 3, "0 EUR", 100_000_000),
        line("milk", 1_000_000, "9 USD", 999_999_999),
        line("cup", 1, "2 EUR", 700_000_000),
        line("gift", 5),
    )
    assert [(total.currency_code, total.units, total.nanos) for total in taken.totals] == [
        ("EUR", 3, 0),
        ("USD", 9_999_999, 999_000_000),
    ]
    assert not taken.items[3].HasField("unit_price")
    assert (await orders.GetOrder(order_pb2.GetOrderRequest(id=taken.id))).order == taken


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (money_pb2.Money(currency_code="eur", units=1), {"items[1].unit_price.currency_code": "INVALID_CURRENCY"}),
        (money_pb2.Money(units=1), {"items[1].unit_price.currency_code": "INVALID_CURRENCY"}),
        (money_pb2.Money(currency_code="EUR", units=-1), {"items[1].unit_price.units": "NEGATIVE_AMOUNT"}),
        (money_pb2.Money(currency_code="EUR", nanos=-1), {"items[1].unit_price.nanos": "INVALID_NANOS"}),
        (money_pb2.Money(currency_code="EUR", nanos=10**9), {"items[1].unit_price.nanos": "INVALID_NANOS"}),
        (money_pb2.Money(currency_code="EUR", units=2**63 - 1), {"items": "TOTAL_TOO_LARGE"}),
    ],
    ids=["lower case", "no currency", "negative", "negative nanos", "nanos", "total"],
)
async def test_an_invalid_price_is_rejected(
    orders: OrderServiceAsyncStub, price: Any, expected: dict[str, str]
) -> None:
    wrong = asked(line("tea", 1), order_pb2.OrderItem(sku="milk", quantity=2, unit_price=price))
    assert violations(await failure(orders.CreateOrder(wrong))) == expected


async def test_orders_with_different_prices_have_different_contents(orders: OrderServiceAsyncStub) -> None:
    request = asked(line("tea", 1, "1 EUR"))
    first = await orders.CreateOrder(request)
    assert await orders.CreateOrder(request) == first
    request.items[0].unit_price.nanos = 1
    assert reason(await failure(orders.CreateOrder(request))) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_REUSED",
    )


def test_requests_without_prices_keep_their_fingerprint() -> None:
    order = Order.new("1", user_id="ann", items=(Item("tea", 1), Item("milk", 2)), now=NOW)
    # As stored by release 0001 for this content.
    assert order.fingerprint == "6190ccd72dceb16d66e27c51002f3a36a76a1bf98bde2a3e3f3bca0012b93b18"


# States


ALLOWED = {
    State.PENDING: {State.CONFIRMED, State.CANCELLED},
    State.CONFIRMED: {State.SHIPPED, State.CANCELLED},
    State.SHIPPED: {State.DELIVERED},
    State.DELIVERED: set(),
    State.CANCELLED: set(),
}


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_an_order_goes_from_state_to_state_and_is_cancelled_until_it_is_shipped(before: State, after: State) -> None:
    order = Order("1", "ann", (), NOW, NOW, before)
    if after is before:
        assert order.moved(after, NOW) is order
    elif after in ALLOWED[before]:
        moved = order.moved(after, NOW - dt.timedelta(seconds=1))
        assert (moved.state, moved.version, moved.update_time) == (after, 2, NOW)
    else:
        with pytest.raises(WrongStateError, match=f"is {before.value} and can't become {after.value}"):
            order.moved(after, NOW)


def test_two_states_are_final() -> None:
    assert {state for state in State if state.final} == {State.DELIVERED, State.CANCELLED}


async def test_every_change_writes_one_event_with_the_changed_order(
    orders: OrderServiceAsyncStub, store: OrderStore
) -> None:
    request = asked()
    steps = [(await orders.CreateOrder(request)).order]
    assert (await orders.CreateOrder(request)).order == steps[0]
    for state in (State.CONFIRMED, State.SHIPPED, State.DELIVERED):
        steps.append((await move(orders, state, steps[0].id)).order)
        assert (await move(orders, state, steps[0].id)).order == steps[-1]
    events = await waiting(store)
    assert [kind for kind, _ in events] == ["OrderCreated", "OrderConfirmed", "OrderShipped", "OrderDelivered"]
    assert [event.order for _, event in events] == steps


async def test_a_refused_change_writes_nothing(orders: OrderServiceAsyncStub, store: OrderStore) -> None:
    taken = await take(orders)
    error = await failure(move(orders, State.DELIVERED, taken.id))
    assert reason(error) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_STATE")
    missing = await failure(move(orders, State.CANCELLED, NOBODY))
    assert reason(missing) == (grpc.StatusCode.NOT_FOUND, "ORDER_NOT_FOUND")
    assert (await orders.GetOrder(order_pb2.GetOrderRequest(id=taken.id))).order == taken
    assert [kind for kind, _ in await waiting(store)] == ["OrderCreated"]


async def test_of_two_concurrent_changes_one_succeeds_with_one_event(
    orders: OrderServiceAsyncStub, store: OrderStore
) -> None:
    taken = await take(orders)
    await move(orders, State.CONFIRMED, taken.id)
    attempts = [move(orders, state, taken.id) for state in (State.SHIPPED, State.CANCELLED) * 10]
    ended = await asyncio.gather(*attempts, return_exceptions=True)
    won = {answer.order.state for answer in ended if not isinstance(answer, BaseException)}
    assert len(won) == 1
    assert sum(isinstance(answer, grpc.aio.AioRpcError) for answer in ended) == 10
    assert len(await waiting(store)) == 3


async def test_an_event_carries_the_trace_of_the_call_that_caused_it(
    orders: OrderServiceAsyncStub, store: OrderStore
) -> None:
    await orders.CreateOrder(asked(), metadata=[("traceparent", TRACE), ("other", "1")])
    (row,) = await store._database.read(lambda connection: order_store.outbox.pending(connection, 9))
    assert isinstance(row.event, Event)
    assert row.event.trace == {"traceparent": TRACE}


async def test_concurrent_retries_at_several_replicas_create_one_order_and_one_event(
    open_database: Open, users: Users
) -> None:
    stores = [OrderStore(open_database("order", order_store.VERSIONS)) for _ in range(3)]
    request = asked()
    order = Order.new("", user_id=NOBODY, items=(Item("tea", 1),), now=NOW)

    async def retry(store: OrderStore) -> Order:
        own = Order.new(str(uuid.uuid4()), user_id=NOBODY, items=order.items, now=NOW)
        return await store.create(own, request.request_id)

    taken = await asyncio.gather(*(retry(stores[n % 3]) for n in range(60)))
    assert len({each.id for each in taken}) == 1
    assert len(await waiting(stores[0])) == 1


async def test_orders_are_filtered_by_state(orders: OrderServiceAsyncStub) -> None:
    taken = [await take(orders) for _ in range(5)]
    for order in taken[::2]:
        await move(orders, State.CONFIRMED, order.id)
    await move(orders, State.CANCELLED, taken[0].id)
    found: list[str] = []
    token = ""
    while True:
        page = await orders.ListOrders(
            order_pb2.ListOrdersRequest(filter="state = CONFIRMED", page_size=1, page_token=token)
        )
        found += [order.id for order in page.orders]
        token = page.next_page_token
        if not token:
            break
    assert found == [taken[2].id, taken[4].id]
    both = 'state != CONFIRMED AND create_time >= "2026-01-02T03:04:05Z"'
    others = await orders.ListOrders(order_pb2.ListOrdersRequest(filter=both, user_id=NOBODY))
    assert [order.id for order in others.orders] == [taken[0].id, taken[1].id, taken[3].id]
    for wrong in ("state = LOST", "state > PENDING", "user_id = 1"):
        error = await failure(orders.ListOrders(order_pb2.ListOrdersRequest(filter=wrong)))
        assert violations(error) == {"filter": "INVALID_FILTER"}


# Watches


State_ = order_pb2.Order.State


async def test_a_watch_tells_what_is_then_what_happens_and_ends_with_the_order(
    orders: OrderServiceAsyncStub,
) -> None:
    taken = await take(orders)
    watch = orders.WatchOrder(order_pb2.WatchOrderRequest(id=taken.id))
    assert (await read(watch)).order == taken
    steps = [(await move(orders, state, taken.id)).order for state in (State.CONFIRMED, State.SHIPPED, State.DELIVERED)]
    assert await rest(watch) == steps


async def test_a_watch_sees_what_another_replica_does(open_database: Open, users: Users) -> None:
    here, there = (OrderStore(open_database("order", order_store.VERSIONS)) for _ in range(2))
    async with order_service(here, users) as orders:
        taken = await take(orders)
        watches = [orders.WatchOrder(order_pb2.WatchOrderRequest(id=taken.id)) for _ in range(3)]
        for watch in watches:
            await watch.read()
        await there.move(taken.id, State.CANCELLED, NOW)
        for watch in watches:
            assert [order.state for order in await rest(watch)] == [State_.STATE_CANCELLED]


async def test_a_watch_resumes_after_the_last_received_change(orders: OrderServiceAsyncStub) -> None:
    taken = await take(orders)
    watch = orders.WatchOrder(order_pb2.WatchOrderRequest(id=taken.id))
    token = (await read(watch)).resume_token
    watch.cancel()
    for state in (State.CONFIRMED, State.SHIPPED, State.DELIVERED):
        await move(orders, state, taken.id)

    async def resumed(token: str) -> list[order_pb2.WatchOrderResponse]:
        request = order_pb2.WatchOrderRequest(id=taken.id, resume_token=token)
        return [change async for change in orders.WatchOrder(request)]

    missed = await resumed(token)
    assert [change.order.state for change in missed] == [
        State_.STATE_CONFIRMED,
        State_.STATE_SHIPPED,
        State_.STATE_DELIVERED,
    ]
    for n, change in enumerate(missed):
        assert await resumed(change.resume_token) == missed[n + 1 :]
    assert [change.order.state for change in await resumed("")] == [State_.STATE_DELIVERED]


async def test_a_watch_of_a_missing_order_fails_immediately(orders: OrderServiceAsyncStub) -> None:
    missing = await failure(orders.WatchOrder(order_pb2.WatchOrderRequest(id=NOBODY)).read())
    assert reason(missing) == (grpc.StatusCode.NOT_FOUND, "ORDER_NOT_FOUND")
    malformed = await failure(orders.WatchOrder(order_pb2.WatchOrderRequest(id="1")).read())
    assert violations(malformed) == {"id": "string.uuid"}
    one, other = await take(orders), await take(orders)
    watch = orders.WatchOrder(order_pb2.WatchOrderRequest(id=one.id))
    token = (await read(watch)).resume_token
    watch.cancel()
    stranger = order_pb2.WatchOrderRequest(id=other.id, resume_token=token)
    assert violations(await failure(orders.WatchOrder(stranger).read())) == {"resume_token": "INVALID_RESUME_TOKEN"}


async def test_a_watch_ends_as_unavailable_when_its_database_does(open_sqlite: Open, users: Users) -> None:
    database = open_sqlite("order", order_store.VERSIONS)
    async with order_service(OrderStore(database), users) as orders:
        taken = await take(orders)
        watch = orders.WatchOrder(order_pb2.WatchOrderRequest(id=taken.id))
        await watch.read()
        file = database.file
        assert file is not None
        database.engine.dispose()
        file.rename(file.with_suffix(".away"))
        file.mkdir()
        error = await failure(watch.read())
        assert reason(error) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_AWAY")


# An unavailable user service


UNAVAILABLE = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED]


@pytest.mark.parametrize("code", UNAVAILABLE)
async def test_with_accept_it_creates_orders_of_confirmed_users_and_marks_them_stale(
    store: OrderStore, users: Users, code: grpc.StatusCode
) -> None:
    async with order_service(store, users, OrderSettings(user_away="accept")) as orders:
        fresh = (await orders.CreateOrder(asked())).order
        assert not fresh.user_stale
        users.fails = code
        stale = (await orders.CreateOrder(asked())).order
        assert stale.user_stale
        assert (await orders.GetOrder(order_pb2.GetOrderRequest(id=stale.id))).order == stale
        stranger = await failure(orders.CreateOrder(asked(user_id=str(uuid.uuid4()))))
        assert reason(stranger) == (grpc.StatusCode.UNAVAILABLE, "USER_SERVICE_UNAVAILABLE")
        users.fails = None
        assert not (await orders.CreateOrder(asked())).order.user_stale


async def test_with_refuse_it_rejects_new_orders_and_serves_existing_ones(store: OrderStore, users: Users) -> None:
    async with order_service(store, users, OrderSettings(user_away="refuse")) as orders:
        taken = (await orders.CreateOrder(asked())).order
        users.fails = grpc.StatusCode.UNAVAILABLE
        error = await failure(orders.CreateOrder(asked()))
        assert reason(error) == (grpc.StatusCode.UNAVAILABLE, "USER_SERVICE_UNAVAILABLE")
        assert (await orders.GetOrder(order_pb2.GetOrderRequest(id=taken.id))).order == taken
        assert list((await orders.ListOrders(order_pb2.ListOrdersRequest())).orders) == [taken]
        assert (await move(orders, State.CANCELLED, taken.id)).order.state == State_.STATE_CANCELLED


async def test_a_deleted_user_can_not_order_while_the_user_service_is_unavailable(
    store: OrderStore, users: Users
) -> None:
    async with order_service(store, users, OrderSettings(user_away="accept")) as orders:
        await orders.CreateOrder(asked())
        users.deleted = True
        error = await failure(orders.CreateOrder(asked()))
        assert reason(error) == (grpc.StatusCode.FAILED_PRECONDITION, "USER_DELETED")
        users.fails = grpc.StatusCode.UNAVAILABLE
        away = await failure(orders.CreateOrder(asked()))
        assert reason(away) == (grpc.StatusCode.UNAVAILABLE, "USER_SERVICE_UNAVAILABLE")
