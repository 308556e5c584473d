"""Whatever is sent to the shop's services, they never return INTERNAL or UNKNOWN, and keep serving."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import hypothesis
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from services.common.rpc import reject_unparsable
from services.order import store as order_store
from services.order.servicer import OrderServicer
from services.order.settings import OrderSettings
from services.order.store import OrderStore
from services.user import store as user_store
from services.user.servicer import UserServicer
from services.user.servicer_v2 import UserServicerV2
from services.user.store import UserStore
from tests.services.calling import NOBODY
from tests.services.conftest import Open, serving
from weft.order.v1 import order_pb2, order_pb2_grpc
from weft.user.v1 import user_pb2, user_pb2_grpc
from weft.user.v2 import user_pb2 as user_v2_pb2
from weft.user.v2 import user_pb2_grpc as user_v2_pb2_grpc

SERVICES = [
    user_pb2.DESCRIPTOR.services_by_name["UserService"],
    user_v2_pb2.DESCRIPTOR.services_by_name["UserService"],
    order_pb2.DESCRIPTOR.services_by_name["OrderService"],
]
METHODS: list[MethodDescriptor] = [method for service in SERVICES for method in service.methods]

BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED}
"""Codes that mean a broken service or connection."""

ANN = "11111111-1111-4111-8111-111111111111"

# Values of fields that the services check, valid and almost valid.
TELLING = [
    "",
    NOBODY,
    ANN,
    "ann@example.com",
    "ann@example.com\0",
    "An\0n",
    "EUR",
    "*",
    "name",
    "email",
    "name.given",
    "create_time desc",
    "name desc",
    'name = "Ann*"',
    'name = "\U0010ffff*"',
    'email != "ann@example.com" AND name = "A\0"',
    'create_time > "2026-01-01T00:00:00Z"',
    'create_time > "9999-12-31T23:59:59-12:00"',
    "state = PENDING",
    "1",
    "AAAAAAAAAAA=",
    "tea",
]
_NUMBERS = {
    FieldDescriptor.TYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(0, 3),
    FieldDescriptor.TYPE_INT64: st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3),
}


def messages(descriptor: Descriptor | None) -> st.SearchStrategy[Message]:
    """Messages of a type, with any values in any fields."""
    assert descriptor is not None
    kind = message_factory.GetMessageClass(descriptor)
    fields = {field.name: _values(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


def _values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        one: st.SearchStrategy[Any] = st.deferred(lambda: messages(field.message_type))
    elif field.type == FieldDescriptor.TYPE_ENUM:
        one = st.integers(-1, 9)
    elif field.type == FieldDescriptor.TYPE_BOOL:
        one = st.booleans()
    elif field.type == FieldDescriptor.TYPE_STRING:
        one = st.sampled_from(TELLING) | st.text(max_size=50) | st.uuids().map(str)
    else:
        one = _NUMBERS[field.type]
    return st.lists(one, max_size=3) if field.is_repeated else one


@asynccontextmanager
async def shop(open_database: Open) -> AsyncIterator[grpc.aio.Channel]:
    """The user service in both versions, and the order service, behind one port."""
    users = UserStore(open_database("user", user_store.VERSIONS))
    store = OrderStore(open_database("order", order_store.VERSIONS))

    def add_users(server: grpc.aio.Server) -> None:
        reject_unparsable(user_pb2_grpc.add_UserServiceServicer_to_server)(UserServicer(users), server)
        reject_unparsable(user_v2_pb2_grpc.add_UserServiceServicer_to_server)(UserServicerV2(users), server)

    async with serving(add_users) as asked:
        orders = OrderServicer(store, user_pb2_grpc.UserServiceStub(asked), OrderSettings(watch_interval=0.02))

        def add_all(server: grpc.aio.Server) -> None:
            add_users(server)
            reject_unparsable(order_pb2_grpc.add_OrderServiceServicer_to_server)(orders, server)

        async with serving(add_all) as channel:
            yield channel


async def answer(channel: grpc.aio.Channel, method: MethodDescriptor, data: bytes) -> grpc.StatusCode:
    """The status of a call with these bytes; OK for a stream that starts."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    stub: Any
    if method.server_streaming:
        stub = channel.unary_stream(path)
        call = stub(data, timeout=10)
        try:
            if await call.read() is not grpc.aio.EOF:
                return grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            call.cancel()
    try:
        stub = channel.unary_unary(path)
        await stub(data, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name.removeprefix("weft."))
def test_every_request_in_the_proto_gets_a_proper_status(
    open_database: Open, runner: asyncio.Runner, method: MethodDescriptor
) -> None:
    serving_shop = shop(open_database)
    channel = runner.run(serving_shop.__aenter__())
    try:

        @hypothesis.settings(
            max_examples=60,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(messages(method.input_type))
        def fuzz(request: Message) -> None:
            code = runner.run(answer(channel, method, request.SerializeToString()))
            assert code not in BROKEN, request

        fuzz()
    finally:
        runner.run(serving_shop.__aexit__(None, None, None))


def strings(count: int, rng: random.Random) -> Sequence[bytes]:
    """Byte strings: half of them random, half of them messages that are truncated, doubled or have a flipped bit."""
    whole = order_pb2.CreateOrderRequest(
        request_id=NOBODY, user_id=ANN, items=[order_pb2.OrderItem(sku="tea", quantity=1)]
    ).SerializeToString()

    def one(n: int) -> bytes:
        if n % 2:
            return rng.randbytes(rng.choice([0, 1, 2, 8, 64, 512]))
        at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
        flipped = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
        return rng.choice([whole[:at], flipped, flipped + whole, whole[at:] + flipped])

    return [one(n) for n in range(count)]


@pytest.mark.slow
async def test_ten_thousand_random_byte_strings_get_a_proper_status(open_sqlite: Open) -> None:
    rng = random.Random(6)
    at_a_time = 50
    async with shop(open_sqlite) as channel:
        sent = [(rng.choice(METHODS), data) for data in strings(10_000, rng)]
        codes: set[grpc.StatusCode] = set()
        for begin in range(0, len(sent), at_a_time):
            calls = (answer(channel, method, data) for method, data in sent[begin : begin + at_a_time])
            codes.update(await asyncio.gather(*calls))
        assert not codes & BROKEN
        assert grpc.StatusCode.INVALID_ARGUMENT in codes
        listed = await user_pb2_grpc.UserServiceStub(channel).ListUsers(user_pb2.ListUsersRequest(), timeout=10)
        assert list(listed.users) == []
