"""The registry's limits: what one peer sends, however much and however odd, is bounded and harms nobody else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mesh.registry import book as books
from mesh.registry.book import Book
from mesh.registry.limits import MAX_CONFIGS, MAX_INSTANCE_BYTES, MAX_METADATA
from tests.registry.serving import BOUND, ORDER, USER, Serving, instance, serving
from weft.mesh.v1 import registry_pb2 as pb

CONFIG = '{"methodConfig": [{"name": [{}], "timeout": "1s"}]}'


@pytest.fixture
async def registry() -> AsyncIterator[Serving]:
    async with serving() as registry:
        yield registry


async def refused(call: grpc.aio.UnaryUnaryCall[Any, Any]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return f"{raised.value.code().name}: {raised.value.details()}"


def unknown(number: int, size: int) -> bytes:
    """A field that no message has, as a newer or hostile peer may send it."""
    tag = number << 3 | 2
    return bytes([tag & 0x7F | 0x80, tag >> 7]) + pb.Locality(region="x" * size).SerializeToString()[1:]


async def test_unknown_fields_are_neither_kept_nor_relayed(registry: Serving) -> None:
    plain = instance("a", label="x")
    parts = (plain, pb.Locality(region="r"))
    encoded = plain.SerializeToString() + unknown(99, 100_000)
    # Also in messages within.
    where = pb.Locality.FromString(parts[1].SerializeToString() + unknown(98, 100_000))
    told = pb.Instance.FromString(encoded)
    told.locality.CopyFrom(where)
    assert told.ByteSize() > 200_000

    await registry.register(told)

    expected = instance("a", label="x")
    expected.locality.region = "r"
    (kept,) = registry.book.snapshot(USER)
    assert kept.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)
    step = await registry.stub.Watch(pb.WatchRequest(service=USER), timeout=BOUND).read()
    assert isinstance(step, pb.WatchResponse)
    assert step.ByteSize() < 1_000


async def test_an_instance_with_all_labels_at_full_length_is_registered(registry: Serving) -> None:
    await registry.register(instance("a", **{f"{n:03}": "x" * 1024 for n in range(MAX_METADATA)}))

    wide = instance("b", **{f"{n:03}": "\U0001f600" * 1024 for n in range(MAX_METADATA)})
    said = await refused(registry.stub.Register(pb.RegisterRequest(instance=wide)))
    assert said == f"INVALID_ARGUMENT: instance: has {wide.ByteSize()} bytes; the limit is {MAX_INSTANCE_BYTES}"


async def test_a_service_that_is_full_refuses_instances_and_the_others_go_on(
    registry: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "MAX_SERVICE_BYTES", 10_000)
    lease = ""
    for n in range(9):
        lease = await registry.register(instance(str(n), label="x" * 1_000))

    said = await refused(registry.stub.Register(pb.RegisterRequest(instance=instance("9", label="x" * 1_000))))
    assert said == f"RESOURCE_EXHAUSTED: the instances of {USER} would exceed 10000 bytes, the limit of a service"
    await registry.register(instance("9", ORDER, label="x" * 1_000))
    await registry.register(instance("8", label="y" * 1_000))  # in place of itself
    await registry.register(instance("small"))

    await registry.stub.Deregister(pb.DeregisterRequest(lease_id=lease))
    assert len(registry.book.snapshot(USER)) == 10, "its lease was replaced"


def test_a_book_counts_what_it_holds_and_gives_back_what_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "MAX_INSTANCES", 3)
    book = Book("e")
    leases = [book.register(instance(str(n)), 10, now=0) for n in range(3)]
    assert book.refusal(instance("3")) == "the registry knows 3 instances, its limit"
    assert book.refusal(instance("2", label="more")) == ""

    book.deregister(leases[0])
    assert book.refusal(instance("3")) == ""
    book.register(instance("3"), 10, now=5)
    assert len(book.expire(now=10)) == 2

    monkeypatch.setattr(books, "MAX_TOTAL_BYTES", 2 * instance("3").ByteSize())
    assert book.refusal(instance("4")) == ""
    book.register(instance("4", ORDER), 10, now=5)
    assert book.refusal(instance("5")) == (
        f"the instances of all services would exceed {2 * instance('3').ByteSize()} bytes, the registry's limit"
    )
    book.expire(now=15)
    assert book._size == 0
    assert all(service.size == 0 for service in book._services.values())


async def test_the_number_and_the_bytes_of_service_configs_are_limited(
    registry: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "MAX_CONFIGS", 2)
    monkeypatch.setattr(books, "MAX_CONFIGS_BYTES", 2_000)

    def configure(service: str, text: str = CONFIG) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        return registry.stub.SetServiceConfig(pb.SetServiceConfigRequest(service=service, service_config=text))

    await configure("weft.A")
    await configure("weft.B")
    assert await refused(configure("weft.C")) == (
        "RESOURCE_EXHAUSTED: the registry has the configs of 2 services, its limit"
    )
    assert await refused(configure("weft.B", CONFIG + " " * 2_000)) == (
        "RESOURCE_EXHAUSTED: all service configs would exceed 2000 bytes, the registry's limit"
    )
    assert registry.book.config("weft.B") == CONFIG

    await configure("weft.A", "")
    await configure("weft.C", CONFIG + " " * 1_000)
    await configure("weft.C", CONFIG)
    assert registry.book.configs() == {"weft.B": CONFIG, "weft.C": CONFIG}
    assert MAX_CONFIGS >= 100
